"""The relational losses against the oracle; what the queue holds.

test_parity.py compares all losses with the published code, test_wiring.py with the oracle.
"""

import math
from unittest.mock import Mock

import pytest
import torch

import losses
import oracle
from losses import MemoryP2P, diversity, intra_sample_p2p

gen = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=gen)


def test_diversity_of_a_probability_that_has_underflowed():
    probs = torch.tensor([1., 0., 0.], requires_grad=True)
    value = diversity(probs)
    value.backward()
    assert abs(value.item()) < 1e-30 and probs.grad.isfinite().all()


@pytest.mark.parametrize('group, chunk, tau', [
    (None, 2 ** 22, 1.), (4, 50, 0.1), (2, 2 ** 22, 0.1), (2, 50, 1.), (1, 1, 1.), (None, 1, 0.1)])
def test_intra_is_the_double_loop(group, chunk, tau):
    map_S, map_T = randn(4, 5, 2, 3).requires_grad_(), randn(4, 5, 2, 3).requires_grad_()
    expected = oracle.intra_loss(map_S, map_T, tau, group or 4)
    expected_grad, = torch.autograd.grad(expected, map_S)
    loss = intra_sample_p2p(map_S, map_T, tau, group, chunk)
    (3 * loss).backward()       # the factor must reach the gradient
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (map_S.grad - 3 * expected_grad).abs().max() < 3e-4 * expected_grad.abs().max()
    assert map_T.grad is None


@pytest.mark.parametrize('group', [None, 8])
def test_one_chunk_of_similarities_is_held(group, monkeypatch):
    log_softmax = Mock(wraps=losses.F.log_softmax)
    monkeypatch.setattr(losses.F, 'log_softmax', log_softmax)
    monkeypatch.setattr(losses, 'CHUNK_ENTRIES', 16 * 512)
    map_S, map_T = randn(32, 8, 4, 4).requires_grad_(), randn(32, 8, 4, 4)
    intra_sample_p2p(map_S, map_T, group=group, chunk_entries=16 * 512)
    MemoryP2P(8, 1000, 400)(map_S, map_T)
    assert max(call.args[0].numel() for call in log_softmax.call_args_list) == 16 * 512


def test_vectors_that_are_not_finite_are_left_out():
    memory = MemoryP2P(4, queue_size=6, contrast_size=2, update_size=2)
    before = memory.queue.clone()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(6))       # random ones at first
    memory.enqueue(torch.tensor([[math.nan, 0, 0, 0], [0, 2., 0, 0]]))
    assert torch.equal(memory.queue[0], before[0]) and memory.queue[1].tolist() == [0, 1, 0, 0]


def test_contrast_rows():
    """Drawn anew in every step, of all rows, none twice. Nor does a pixel enter twice."""
    memory, seen = MemoryP2P(3, 100, 10), set()
    for seed in range(40):
        memory.choose_contrast(torch.Generator().manual_seed(seed))
        rows = set(memory.contrast.tolist())
        assert len(rows) == 10
        seen |= rows
    assert sorted(memory.choose_pixels(12, gen).tolist()) == list(range(12))
    assert len(seen) > 90       # (9/10)^40 of 100 rows are expected to be missed
