"""The relational losses against naive forms and known answers; what the queue holds."""

import math

import pytest
import torch

import oracle
from losses import MemoryP2P, diversity, entropy, feature_kl, intra_sample_p2p

gen = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=gen)


# Feature loss, entropy, diversity

def test_feature_kl_known_answer():
    """p_S = (1/2, 1/2); f_T / 0.5 = (log 3, 0), so p_T = (3/4, 1/4)."""
    feature_S = torch.tensor([[0., 0.], [1., 1.]])
    feature_T = torch.tensor([[math.log(3) / 2, 0.], [0., math.log(3) / 2]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert feature_kl(feature_S, feature_T, 0.5).item() == pytest.approx(expected, rel=1e-5)


def test_only_the_teacher_is_divided():
    feature = randn(3, 5)
    assert feature_kl(feature / 0.9, feature, 0.9).item() == pytest.approx(0, abs=1e-6)
    assert feature_kl(feature, feature, 0.9).item() > 1e-4
    assert feature_kl(2 * feature, feature, 1.).item() != pytest.approx(
        feature_kl(feature, 2 * feature, 1.).item(), rel=1e-2)      # teacher || student


def test_entropy():
    assert entropy(torch.zeros(3, 4)).item() == pytest.approx(math.log(4), rel=1e-6)
    assert entropy(100 * torch.eye(4)).item() == pytest.approx(0, abs=1e-6)
    logits = torch.tensor([[math.log(3), 0.], [0., 0.]])
    expected = (-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + math.log(2)) / 2
    assert entropy(logits).item() == pytest.approx(expected, rel=1e-5)


def test_diversity():
    assert diversity(torch.full((4,), 0.25)).item() == pytest.approx(-math.log(4), rel=1e-6)
    probs = torch.tensor([1., 0., 0.], requires_grad=True)
    value = diversity(probs)
    value.backward()
    assert abs(value.item()) < 1e-30 and probs.grad.isfinite().all()


# Relations within the batch

@pytest.mark.parametrize('group', [None, 4, 2, 1])
@pytest.mark.parametrize('chunk', [2 ** 22, 50, 1])
@pytest.mark.parametrize('tau', [1., 0.1])
def test_intra_is_the_double_loop(group, chunk, tau):
    map_S, map_T = randn(4, 5, 2, 3).requires_grad_(), randn(4, 5, 2, 3)
    expected = oracle.intra_loss(map_S, map_T, tau, group or 4)
    expected_grad, = torch.autograd.grad(expected, map_S)
    loss = intra_sample_p2p(map_S, map_T, tau, group, chunk)
    grad, = torch.autograd.grad(3 * loss, map_S)        # the factor must reach the gradient
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (grad - 3 * expected_grad).abs().max() < 1e-4 * 3 * expected_grad.abs().max()


def test_intra_properties():
    map_S, map_T = randn(4, 5, 2, 2).requires_grad_(), randn(4, 5, 2, 2).requires_grad_()
    assert intra_sample_p2p(map_T, map_T, 0.1).item() == pytest.approx(0, abs=1e-6)
    intra_sample_p2p(map_S, map_T).backward()
    assert map_S.grad.abs().max() > 0 and map_T.grad is None
    with pytest.raises(ValueError, match='groups of 3'):
        intra_sample_p2p(map_S, map_T, group=3)


# Memory queue

def labelled(B, C, H, W):
    """A map whose pixel n (image by image, row by row) is a vector that no other pixel has."""
    return (torch.arange(B * C * H * W).float().view(B, C, H, W) * 0.37).sin() + 1.5


def true_pixel(feature_map, n):
    B, C, H, W = feature_map.shape
    image, rest = divmod(n, H * W)
    vector = feature_map[image, :, rest // W, rest % W]
    return vector / vector.norm()


@pytest.mark.parametrize('layout', ['pixels', 'released'])
def test_queue_of_several_steps(layout):
    """Also at its end, where the released layout writes the last rows again and starts at row 0."""
    memory, pointer = MemoryP2P(5, 30, 6, update_size=12, layout=layout), 0
    for step in range(4):
        feature_map = randn(3, 5, 2, 2)
        indices = memory.choose_pixels(12, gen)
        assert sorted(indices.tolist()) == list(range(12))
        expected, pointer = oracle.enqueued(memory.queue, pointer, feature_map, indices, layout)
        memory.enqueue(memory.pixels_at(feature_map, indices, 0, 3))
        torch.testing.assert_close(memory.queue, expected)
        assert memory.pointer == pointer


def test_queue_is_random_unit_vectors_at_first():
    queue = MemoryP2P(8, 50, 6, generator=torch.Generator().manual_seed(1)).queue
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(50))
    assert torch.equal(queue, MemoryP2P(8, 50, 6, generator=torch.Generator().manual_seed(1)).queue)
    assert queue.t().cov().diag().mean() < 0.2 and queue.mean().abs() < 0.1


def test_released_layout_is_the_view_without_permute():
    """The published code takes columns of map.view(C, B H W): channels and images get mixed."""
    feature_map = labelled(2, 3, 2, 2)
    unit = feature_map / feature_map.norm(dim=1, keepdim=True)
    memory = MemoryP2P(3, 20, 6, layout='released')
    found = memory.pixels_at(feature_map, torch.tensor([0, 5]), 0, 2)
    # number 0 by hand: channel 0 of image 0, channel 2 of image 0, channel 1 of image 1
    by_hand = torch.stack([unit[0, 0, 0, 0], unit[0, 2, 0, 0], unit[1, 1, 0, 0]])
    torch.testing.assert_close(found[0], by_hand)
    assert (found[1] - true_pixel(feature_map, 5)).abs().max() > 0.1


def test_contrast_rows_are_drawn_anew():
    memory = MemoryP2P(3, 100, 10)
    seen = set()
    for seed in range(40):
        memory.choose_contrast(torch.Generator().manual_seed(seed))
        assert len(set(memory.contrast.tolist())) == 10
        seen |= set(memory.contrast.tolist())
    assert len(seen) > 90       # (9/10)^40 of 100 rows are expected to be missed
    released = MemoryP2P(3, 100, 10, layout='released')
    before = released.contrast.clone()
    released.choose_contrast(gen)
    assert torch.equal(released.contrast, before)
    assert before.tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]


def test_memory_is_its_definition():
    memory = MemoryP2P(4, 12, 5, contrast_temperature=0.2, temperature=0.7)
    memory.choose_contrast(gen)
    map_S, map_T = randn(2, 4, 2, 2), randn(2, 4, 2, 2)
    expected = oracle.memory_loss(map_S, map_T, memory.queue[memory.contrast], 0.2 * 0.7)
    assert memory(map_S, map_T).item() == pytest.approx(expected.item(), rel=1e-4)


def test_gradients_reach_student_and_head_only():
    memory = MemoryP2P(4, 12, 5)
    map_S, map_T = randn(2, 4, 2, 2).requires_grad_(), randn(2, 4, 2, 2).requires_grad_()
    memory(memory.project_head(map_S), map_T).backward()
    assert map_S.grad.abs().max() > 0 and map_T.grad is None
    head = list(memory.project_head.parameters())
    assert all(p.grad is not None for p in head) and not memory.queue.requires_grad
    assert len(list(memory.parameters())) == len(head) == 4
