"""Dropout as a hash of seed, step, layer, image and position."""

import pytest
import torch

from model import UNet, draw_dropout_noise, dropout
from runtime import seeding

NET = UNet(8, 32, [1, 2], [], 1, dropout=.5)
LAYERS = 8                      # residual blocks of NET
IMAGES, SIZE = 8, 8
SHAPE = (IMAGES, 32, SIZE, SIZE)


def noise(seed=0, rows=slice(0, IMAGES), total=IMAGES):
    return draw_dropout_noise(NET, SIZE, total, rows, seeding.generator('cpu', seed, 1))


def mask(p, layer=0, shape=SHAPE, **how):
    """Ones and zeros of a layer."""
    keys, positions = noise(**how)
    return (dropout(torch.ones(shape), p, keys[layer], positions) != 0).float()


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@pytest.mark.parametrize('p', [.1, .25, .5, .9])
def test_rate_and_scale(p):
    """16,384 bits: the share of zeros within four standard deviations; the mean is kept."""
    keys, positions = noise()
    out = dropout(torch.ones(SHAPE), p, keys[0], positions)
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    deviation = (p * (1 - p) / out.numel()) ** .5
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=4 * deviation)


def test_independent():
    """Of images, layers, positions and seeds, each pair: correlations of 1 / sqrt(2,048) at most.

    Four standard deviations are allowed; pairs of seeds, layers and images are all compared.
    """
    masks = torch.stack([mask(.5, layer, seed=seed) for seed in (0, 1) for layer in range(LAYERS)])
    bits = masks.flatten(0, 1).flatten(1)       # (seeds * layers * images, positions)
    pairs = torch.corrcoef(bits)
    pairs = pairs[~torch.eye(len(pairs), dtype=torch.bool)]
    assert len(bits) == 2 * LAYERS * IMAGES and bits.shape[1] == 2048
    assert pairs.abs().max() < 5.5 / 2048 ** .5 and pairs.mean().abs() < .01
    assert pairs.std().item() == pytest.approx(2048 ** -.5, rel=.1)


@pytest.mark.parametrize('dim', [1, 2, 3])
def test_neighbours_are_independent(dim):
    """Channels, rows and columns beside each other."""
    one = mask(.5)
    length = one.shape[dim] - 1
    found = correlation(one.narrow(dim, 0, length), one.narrow(dim, 1, length))
    assert abs(found) < 4 / one.numel() ** .5


def test_masks_belong_to_the_image():
    """Shares of a batch, on processes or in parts, get the masks that the whole batch would."""
    for layer in (0, LAYERS - 1):
        whole = mask(.25, layer)
        for rows in (slice(0, 2), slice(2, 4), slice(4, 8)):
            share = mask(.25, layer, (rows.stop - rows.start, *SHAPE[1:]), rows=rows)
            assert torch.equal(share, whole[rows])


def test_another_seed_gives_another_mask():
    assert torch.equal(mask(.5), mask(.5)) and not torch.equal(mask(.5), mask(.5, seed=1))
    assert not torch.equal(mask(.5), mask(.5, layer=1))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_the_layout_in_memory_changes_nothing(memory_format):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    keys, positions = noise()
    found = dropout(x.to(memory_format=memory_format), .5, keys[0], positions)
    assert torch.equal(found, x * mask(.5) * 2)


def test_all_and_nothing():
    keys, positions = noise()
    x = torch.randn(SHAPE, requires_grad=True)
    assert torch.equal(dropout(x, 0., keys[0], positions), x)
    gone = dropout(x, 1., keys[0], positions)
    assert not gone.any()
    gone.sum().backward()
    assert not x.grad.any()


def test_gradient_is_masked():
    x, (keys, positions) = torch.randn(SHAPE, requires_grad=True), noise()
    dropout(x, .25, keys[0], positions).sum().backward()
    assert torch.equal(x.grad, mask(.25) * (1 / .75))


def test_memory_kept_for_the_backward():
    """No more than the share of this process, and no whole positions times images."""
    keys, positions = noise(rows=slice(0, 2))
    x, kept = torch.ones(2, *SHAPE[1:], requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        dropout(x, .25, keys[0], positions)
    assert max(v.untyped_storage().nbytes() for v in kept) <= x.numel() * 4


def test_in_the_network():
    """Every block has a row of keys of its own; eval mode ignores the noise."""
    torch.manual_seed(0)
    net = UNet(8, 32, [1, 2], [0], 1, dropout=.5)
    for p in net.parameters():      # layers that start near 0 would hide the rest
        if p.requires_grad:
            p.data += .05 * torch.randn_like(p)
    x, t = torch.randn(4, 3, 8, 8), torch.arange(4)
    with torch.no_grad():
        given = noise(total=4, rows=slice(0, 4))
        one, again, other = (net(x, t, noise=n) for n in (given, given, noise(1, slice(0, 4), 4)))
        assert torch.equal(one, again) and not torch.equal(one, other)
        halves = [net(x[rows], t[rows], noise=noise(total=4, rows=rows))
                  for rows in (slice(0, 2), slice(2, 4))]
        torch.testing.assert_close(torch.cat(halves), one, rtol=1e-4, atol=1e-5)
        for layer in range(LAYERS):
            changed = given._replace(keys=given.keys.clone())
            changed.keys[layer] += 1
            assert not torch.equal(net(x, t, noise=changed), one), layer
        assert len(given.keys) == LAYERS
        net.eval()
        assert torch.equal(net(x, t, noise=given), net(x, t))
