"""The relational losses against the oracle and known answers; what the queue holds."""

import math
from unittest.mock import Mock

import pytest
import torch

import losses
import oracle
from losses import MemoryP2P, diversity, entropy, feature_kl, intra_sample_p2p

gen = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=gen)


# Feature loss, entropy, diversity

def test_feature_kl():
    """f_T / 0.5 = (log 3, 0), so p_T = (3/4, 1/4); the student is not divided: p_S = (1/3, 2/3)."""
    feature_T = torch.tensor([[math.log(3) / 2, 0.], [0., math.log(3) / 2]])
    feature_S = torch.tensor([[0., math.log(2)], [math.log(2), 0.]])
    expected = 0.75 * math.log(9 / 4) + 0.25 * math.log(3 / 8)
    assert feature_kl(feature_S, feature_T, 0.5).item() == pytest.approx(expected, rel=1e-5)


def test_entropy():
    logits = torch.tensor([[math.log(3), 0., -200.], [0., 0., -200.]])     # the last one is 0
    expected = (-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + math.log(2)) / 2
    assert entropy(logits).item() == pytest.approx(expected, rel=1e-5)


def test_diversity():
    assert diversity(torch.full((4,), 0.25)).item() == pytest.approx(-math.log(4), rel=1e-6)
    probs = torch.tensor([1., 0., 0.], requires_grad=True)
    value = diversity(probs)
    value.backward()
    assert abs(value.item()) < 1e-30 and probs.grad.isfinite().all()


# Relations

@pytest.mark.parametrize('group, chunk, tau', [
    (None, 2 ** 22, 1.), (4, 50, 0.1), (2, 2 ** 22, 0.1), (2, 50, 1.), (1, 1, 1.), (None, 1, 0.1)])
def test_intra_is_the_double_loop(group, chunk, tau, monkeypatch):
    monkeypatch.setattr(losses, 'CHUNK_ENTRIES', chunk)
    map_S, map_T = randn(4, 5, 2, 3).requires_grad_(), randn(4, 5, 2, 3).requires_grad_()
    expected = oracle.intra_loss(map_S, map_T, tau, group or 4)
    expected_grad, = torch.autograd.grad(expected, map_S)
    loss = intra_sample_p2p(map_S, map_T, tau, group)
    (3 * loss).backward()       # the factor must reach the gradient
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (map_S.grad - 3 * expected_grad).abs().max() < 3e-4 * expected_grad.abs().max()
    assert map_T.grad is None
    assert intra_sample_p2p(map_S, map_S, tau, group).item() == pytest.approx(0, abs=1e-6)


def test_memory_is_its_definition(monkeypatch):
    """Gradients reach the student and the head alone; in chunks of two pixels."""
    monkeypatch.setattr(losses, 'CHUNK_ENTRIES', 12)
    memory = MemoryP2P(4, 12, 5, contrast_temperature=0.2)
    memory.choose_contrast(gen)
    map_S, map_T = randn(2, 4, 2, 2).requires_grad_(), randn(2, 4, 2, 2).requires_grad_()
    projected = memory.project_head(map_S)
    expected = oracle.memory_loss(projected, map_T, memory.queue[memory.contrast], 0.2)
    expected_grad, = torch.autograd.grad(expected, map_S, retain_graph=True)
    loss = memory(projected, map_T)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (map_S.grad - expected_grad).abs().max() < 1e-4 * expected_grad.abs().max()
    head = list(memory.project_head.parameters())
    assert len(list(memory.parameters())) == len(head) == 4
    assert all(p.grad is not None for p in head) and map_T.grad is None


@pytest.mark.parametrize('group', [None, 8])
def test_one_chunk_of_similarities_is_held(group, monkeypatch):
    log_softmax = Mock(wraps=losses.F.log_softmax)
    monkeypatch.setattr(losses.F, 'log_softmax', log_softmax)
    monkeypatch.setattr(losses, 'CHUNK_ENTRIES', 16 * 512)
    map_S, map_T = randn(32, 8, 4, 4).requires_grad_(), randn(32, 8, 4, 4)
    intra_sample_p2p(map_S, map_T, group=group)
    MemoryP2P(8, 1000, 400)(map_S, map_T)
    assert max(call.args[0].numel() for call in log_softmax.call_args_list) == 16 * 512


# Memory queue

def test_vectors_that_are_not_finite_are_left_out():
    memory = MemoryP2P(4, queue_size=6, contrast_size=2, update_size=2)
    before = memory.queue.clone()
    memory.enqueue(torch.tensor([[math.nan, 0, 0, 0], [0, 2., 0, 0]]))
    assert torch.equal(memory.queue[0], before[0]) and memory.queue[1].tolist() == [0, 1, 0, 0]
    assert memory.pointer == 2


def test_queue_is_random_unit_vectors_at_first():
    torch.manual_seed(1)
    queue = MemoryP2P(8, 50, 6).queue
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(50))
    assert queue.t().cov().diag().mean() < 0.2 and queue.mean().abs() < 0.1


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
