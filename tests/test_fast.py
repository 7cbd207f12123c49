"""Every fast path against the plain one: numbers and gradients."""

import copy
import functools

import pytest
import torch

import runtime.run
from classifier import build_classifier
from losses import MemoryP2P, intra_sample_p2p
from model import UNet, draw_dropout_noise, dropout
from runtime import data, precision, seeding
from runtime.cli import UserError
from runtime.optim import frozen
from tools import bench_rows
from tools.measure import Peak
from tools.plain import PlainMemory, plain, plain_intra

CPU = torch.device('cpu')


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_unet(ch_mult=(1, 2)):
    torch.manual_seed(0)
    net = UNet(8, 32, ch_mult, [len(ch_mult) - 1], 1)
    for module in net.modules():        # layers that start near 0 would hide the rest
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.xavier_uniform_(module.weight)
    return net


def channels_last(net):
    """As the scripts do it, and `plain` undoes it."""
    return net.to(memory_format=torch.channels_last)


def step(net, amp='none', **inputs):
    """Output of a network on four images, and the gradient of a sum of its squares."""
    with precision.autocast(amp, CPU):
        out = net(randn(4, 3, 8, 8), torch.arange(4), **inputs)
        out.float().square().sum().backward()
    # in one vector: the gradient of some biases is 0 but for rounding
    return [out.detach().float(),
            torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad])]


def assert_near(found, expected, rel):
    """Largest difference relative to the largest value, tensor by tensor."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        assert other.abs().max() > 0
        assert ((one - other).abs().max() / other.abs().max()).item() <= rel


# Networks

@pytest.fixture(scope='module')
def expected():
    with plain():
        net = channels_last(small_unet())
        assert net.head.weight.is_contiguous()
        return step(net)


def test_unet_in_channels_last_with_fused_attention(expected):
    net = channels_last(small_unet())
    assert net.head.weight.is_contiguous(memory_format=torch.channels_last)
    assert_near(step(net), expected, 1e-5)


def test_plain_attention_is_explicit(monkeypatch):
    """Without the replacement, the plain side would compare fused attention with itself."""
    def refused(*args):
        raise AssertionError('fused attention')
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', refused)
    with plain():
        step(small_unet())
    with pytest.raises(AssertionError, match='fused'):
        step(small_unet())


def test_unet_in_bfloat16(expected):
    """Three significant digits in every product: near, not equal."""
    found = step(channels_last(small_unet()), amp='bf16')
    assert not torch.equal(found[0], expected[0])
    assert_near(found[:1], expected[:1], 0.03)


def test_classifier_in_channels_last():
    torch.manual_seed(0)
    net, found = build_classifier('densenet_small', 10).eval(), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = randn(2, 3, 8, 8).requires_grad_()
        out = net.to(memory_format=memory_format)(x)
        sum(v.square().sum() for v in out).backward()
        found.append([v.detach() for v in out] + [x.grad])
    assert_near(found[1], found[0], 1e-4)


@pytest.fixture
def captured(monkeypatch):
    """torch.compile that runs the captured graphs without generating code, which takes minutes."""
    if precision.TORCH < (2, 2):
        pytest.skip(f'--compile needs torch 2.2, this is {torch.__version__}')
    with_code = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda function, **how: with_code(
        function, backend='aot_eager', **how))
    torch._dynamo.reset()


def test_compiled_is_eager(captured):
    """In place, with the same names, in one graph."""
    eager, found = small_unet([1]), []
    compiled = copy.deepcopy(eager)
    precision.compile_networks(True, CPU, compiled)
    before = torch._dynamo.utils.counters['stats']['unique_graphs']
    for net in (eager, compiled):
        found.append(step(net))
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == before + 1
    assert_near(found[1], found[0], 1e-5)
    copy.deepcopy(compiled)


class Half(torch.nn.Module):
    """Dropout at rate 1/2."""

    def forward(self, x, keys, positions):
        return dropout(x, .5, keys, positions)


def test_compiled_dropout_is_eager(captured):
    """The same masks, for the whole batch and for shares of it."""
    rng = seeding.generator(CPU, 1)
    keys, positions = draw_dropout_noise(small_unet([1]), 8, 4, slice(0, 4), rng)
    layer, x = Half(), torch.ones(4, 8, 3, 3)
    whole = layer(x, keys[0], positions)
    precision.compile_networks(True, CPU, layer)
    for rows in (slice(0, 4), slice(0, 2), slice(2, 4)):
        assert torch.equal(layer(x[rows], keys[0, rows], positions), whole[rows])
    assert whole.unique().tolist() == [0, 2] and not torch.equal(whole[:2], whole[2:])


def test_compiling_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(precision, 'TORCH', (2, 2))
    def broken(*args, **how):
        raise RuntimeError('no C++ compiler\nand a long story')
    monkeypatch.setattr(torch, 'compile', broken)
    precision.compile_networks(False, CPU)
    with pytest.raises(UserError, match=r'--compile .*\(no C\+\+ compiler\); leave it out') as e:
        precision.compile_networks(True, CPU)
    assert e.value.code == 1
    monkeypatch.setattr(precision, 'TORCH', (2, 1))
    with pytest.raises(UserError, match='it needs torch 2.2'):
        precision.compile_networks(True, CPU)


# Losses: their definition is tested in test_losses.py, here the two forms at a larger size

def value_and_gradients(loss, inputs):
    return [loss.detach()[None]] + list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize('group, chunk', [(None, 2 ** 22), (2, 2 ** 22), (2, 1000)])
def test_intra(group, chunk):
    map_S, map_T = randn(8, 48, 4, 4).requires_grad_(), randn(8, 48, 4, 4, seed=1)
    chunked = functools.partial(intra_sample_p2p, chunk_entries=chunk)
    fast, plain = (value_and_gradients(form(map_S, map_T, .3, group), [map_S])
                   for form in (chunked, plain_intra))
    assert_near(fast[1:], plain[1:], 1e-5)
    assert fast[0].item() == pytest.approx(plain[0].item(), rel=1e-5)


def test_memory():
    map_S, map_T = randn(8, 48, 4, 4).requires_grad_(), randn(8, 48, 4, 4, seed=1)
    found = []
    for form in (MemoryP2P, PlainMemory):
        torch.manual_seed(0)
        memory = form(48, 400, 100, temperature=.5)
        found.append(value_and_gradients(memory(map_S, map_T), [map_S, *memory.parameters()]))
    scale = [max(v.abs().max(), 1e-6) for v in found[1]]
    assert_near(*([v / s for v, s in zip(values, scale)] for values in found), 1e-5)


@pytest.mark.parametrize('form, keys', [('intra', 512), ('memory', 400)])
def test_one_chunk_of_similarities(form, keys, monkeypatch):
    """The fast forms hold a few chunks beyond vectors of the pixels; the plain ones all."""
    monkeypatch.setattr('losses.CHUNK_ENTRIES', 16 * keys)
    map_S, map_T = randn(32, 8, 4, 4).requires_grad_(), randn(32, 8, 4, 4, seed=1)
    found, vectors, everything = {}, 512 * 8 * 4 / 2 ** 20, 512 * keys * 4 / 2 ** 20
    pairs = dict(fast=(intra_sample_p2p, MemoryP2P), plain=(plain_intra, PlainMemory))
    for side, (intra, memory) in pairs.items():
        how = dict(chunk_entries=16 * keys) if side == 'fast' and form == 'intra' else {}
        loss = functools.partial(intra, **how) if form == 'intra' else memory(8, 1000, keys)
        with Peak(CPU) as peak:
            torch.autograd.grad(loss(map_S, map_T), [map_S])
        found[side] = peak.mib
    assert found['fast'] < 16 * vectors + 6 * everything * 16 / 512 < everything
    assert found['plain'] > 3 * everything


# Optimiser

def trained(steps=3):
    """Parameters and averages after some steps with the functions that a run uses."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    ema = frozen(copy.deepcopy(net))
    params = list(net.parameters())
    optim = runtime.run.adam(params, 1e-2, 1e-3)
    for i in range(steps):
        (10 * net(randn(4, 5, seed=i))).square().sum().backward()
        finite = runtime.run.clip_gradient(params, 1.).isfinite()
        runtime.run.step_optimizer(optim, finite, 2e-2)
        runtime.run.ema_update(ema, net, .9)
    return [p.detach() for p in (*params, *ema.parameters())], optim.param_groups[0]['fused']


def test_fused_adam_and_average():
    fast, _ = trained()
    with plain(runtime.run):
        expected, fused = trained()
    assert_near(fast, expected, 1e-5)
    assert not torch.equal(expected[0], expected[4])      # the average lags behind
    assert fused is False


# Scores

def test_frechet():
    features, probs = randn(60, 8).double(), torch.full((60, 2), .5)
    other = [v.numpy() for v in (randn(8).double(), torch.eye(8).double())]
    fast = bench_rows.frechet(features, probs, *other)
    with plain(bench_rows):
        expected = bench_rows.frechet(features, probs, *other)
    assert fast == pytest.approx(expected, rel=1e-9) and fast > 1 and fast != expected


def test_plain_replaces_and_restores():
    """In the modules that it is given, for as long as the block lasts."""
    before = dict(vars(bench_rows)), dict(vars(runtime.run))
    with plain(bench_rows):
        assert bench_rows.intra_sample_p2p is plain_intra and bench_rows.MemoryP2P is PlainMemory
        assert torch.channels_last is torch.contiguous_format
        assert vars(runtime.run) == before[1]
        with bench_rows.autocast('bf16', CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert (vars(bench_rows), vars(runtime.run)) == before
    assert torch.channels_last is not torch.contiguous_format


# A GPU

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_nothing_waits_for_the_gpu():
    """Batches, the queue and both relational losses, without a copy that stops the host."""
    device = torch.device('cuda')
    images = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8)
    batches = data.batches(data.Images('random', 'train', 8, [0] * 32, 10, images), 8, 0, device)
    memory = MemoryP2P(16, 100, 20, 10).to(device)
    maps = [randn(8, 16, 4, 4, seed=i).to(device).requires_grad_() for i in range(2)]
    for mode in ('default', 'error'):       # the first time allocates
        next(batches)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            next(batches)
            rng = seeding.generator(device, 0, seeding.PIXELS, 1)
            indices = memory.choose_pixels(8 * 16, rng)
            memory.enqueue(memory.pixels_at(maps[1].detach(), indices, 0, 8))
            memory.choose_contrast(rng)
            loss = intra_sample_p2p(*maps) + memory(*maps)
            loss.backward()
            if mode == 'error':         # it does notice a host that waits
                with pytest.raises(RuntimeError, match='synchroni'):
                    loss.item()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert loss.isfinite() and maps[0].grad.abs().sum() > 0
