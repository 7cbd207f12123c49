"""Every fast path against the plain one: numbers and gradients."""

import copy

import pytest
import torch

from classifier import build_classifier
from losses import MemoryP2P, intra_sample_p2p
from model import Dropout, UNet
from runtime import data, seeding, training
from runtime.measure import peak_mib
from runtime.options import UserError
from runtime.plain import Fast, Plain, PlainMemory, plain_intra

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


def step(net, autocast=None, context=None):
    """Output of a network on four images, and the gradient of a sum of its squares."""
    with context or Fast.context(), autocast or Fast.context():
        out = net(randn(4, 3, 8, 8), torch.arange(4))
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
def plain():
    side = Plain(CPU)
    return step(side.network(small_unet()), context=side.context())


def test_unet_in_channels_last_with_fused_attention(plain):
    net = Fast(CPU).network(small_unet())
    assert net.head.weight.is_contiguous(memory_format=torch.channels_last)
    assert_near(step(net), plain, 1e-5)


def test_plain_attention_is_explicit(plain, monkeypatch):
    """Without the replacement, the plain side would compare fused attention with itself."""
    def refused(*args):
        raise AssertionError('fused attention')
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', refused)
    step(small_unet(), context=Plain(CPU).context())
    with pytest.raises(AssertionError, match='fused'):
        step(small_unet())


def test_unet_in_bfloat16(plain):
    """Three significant digits in every product: near, not equal."""
    side = Fast(CPU, amp='bf16')
    found = step(side.network(small_unet()), autocast=side.autocast())
    assert not torch.equal(found[0], plain[0])
    assert_near(found[:1], plain[:1], 0.03)


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
    if training.TORCH < (2, 2):
        pytest.skip(f'--compile needs torch 2.2, this is {torch.__version__}')
    with_code = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda function, **how: with_code(
        function, backend='aot_eager', **how))
    torch._dynamo.reset()


def test_compiled_is_eager(captured):
    """In place, with the same names, in one graph."""
    eager, found = small_unet([1]), []
    compiled = copy.deepcopy(eager)
    training.compile_networks(True, CPU, compiled)
    before = torch._dynamo.utils.counters['stats']['unique_graphs']
    for net in (eager, compiled):
        found.append(step(net))
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == before + 1
    assert_near(found[1], found[0], 1e-5)
    copy.deepcopy(compiled)


def test_compiled_dropout_belongs_to_the_image(captured):
    """Masks may be others than without compiling, but shares of a batch still get the same."""
    layer, x = Dropout(.5), torch.ones(4, 8, 3, 3)
    training.compile_networks(True, CPU, layer)
    found = []
    for rows in (slice(0, 4), slice(0, 2), slice(2, 4)):
        training.seed_dropout(layer, rows, 4, 1, 2, 3)
        found.append(layer(x[rows]))
    assert torch.equal(torch.cat(found[1:]), found[0])
    assert found[0].unique().tolist() == [0, 2] and not torch.equal(*found[1:])


def test_compiling_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(training, 'TORCH', (2, 2))
    def broken(*args, **how):
        raise RuntimeError('no C++ compiler\nand a long story')
    monkeypatch.setattr(torch, 'compile', broken)
    training.compile_networks(False, CPU)
    with pytest.raises(UserError, match=r'--compile .*\(no C\+\+ compiler\); leave it out') as e:
        training.compile_networks(True, CPU)
    assert e.value.code == 1
    monkeypatch.setattr(training, 'TORCH', (2, 1))
    with pytest.raises(UserError, match='it needs torch 2.2'):
        training.compile_networks(True, CPU)


# Losses: their definition is tested in test_losses.py, here the two forms at a larger size

def value_and_gradients(loss, inputs):
    return [loss.detach()[None]] + list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize('group', [None, 2])
def test_intra(group):
    map_S, map_T = randn(8, 48, 4, 4).requires_grad_(), randn(8, 48, 4, 4, seed=1)
    fast, plain = (value_and_gradients(form(map_S, map_T, .3, group), [map_S])
                   for form in (intra_sample_p2p, plain_intra))
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


@pytest.mark.parametrize('form, keys', [('intra', 512), ('Memory', 400)])
def test_one_chunk_of_similarities(form, keys, monkeypatch):
    """The fast forms hold a few chunks beyond vectors of the pixels; the plain ones all."""
    monkeypatch.setattr('losses.CHUNK_ENTRIES', 16 * keys)
    map_S, map_T = randn(32, 8, 4, 4).requires_grad_(), randn(32, 8, 4, 4, seed=1)
    found, vectors, everything = {}, 512 * 8 * 4 / 2 ** 20, 512 * keys * 4 / 2 ** 20
    for side in (Fast(CPU), Plain(CPU)):
        torch.manual_seed(0)
        loss = side.Memory(8, 1000, keys) if form == 'Memory' else (
            lambda S, T: intra_sample_p2p(S, T, chunk_entries=16 * keys)
            if side.name == 'fast' else plain_intra(S, T))
        found[side.name] = peak_mib(
            side, lambda: torch.autograd.grad(loss(map_S, map_T), [map_S]))
    assert found['fast'] < 16 * vectors + 6 * everything * 16 / 512 < everything
    assert found['plain'] > 3 * everything


# Optimiser

def trained(side, steps=3):
    """Parameters and averages after some steps of the side's own Adam, clipped."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    ema = training.frozen(copy.deepcopy(net))
    params = list(net.parameters())
    optim = side.adam(params, 1e-2, 1e-3)
    for i in range(steps):
        (10 * net(randn(4, 5, seed=i))).square().sum().backward()
        side.update(optim, params, 1.)
        side.ema(ema, net, .9)
    return [p.detach() for p in (*params, *ema.parameters())]


def test_fused_adam_and_average():
    fast, plain = trained(Fast(CPU)), trained(Plain(CPU))
    assert_near(fast, plain, 1e-5)
    assert not torch.equal(plain[0], plain[4])      # the average lags behind


# Scores

def test_frechet():
    features, probs = randn(60, 8).double(), torch.full((60, 2), .5)
    other = [v.numpy() for v in (randn(8).double(), torch.eye(8).double())]
    fast, plain = (side.frechet(features, probs, other) for side in (Fast(CPU), Plain(CPU)))
    assert fast == pytest.approx(plain, rel=1e-9) and fast > 1


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
            numbers = memory.choose_pixels(8 * 16, rng)
            memory.enqueue(memory.pixels_at(maps[1].detach(), numbers, 0, 8))
            memory.choose_contrast(rng)
            (intra_sample_p2p(*maps) + memory(*maps)).backward()
        finally:
            torch.cuda.set_sync_debug_mode('default')
