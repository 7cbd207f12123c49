"""Every fast path against the plain one: numbers and gradients."""

import copy
import functools
import math

import pytest
import torch

import runtime.run
from classifier import build_classifier
from classifier.networks import DenseBlock
from losses import MemoryP2P, intra_sample_p2p
from model import UNet, draw_dropout_noise, dropout
from runtime import data, distributed, precision, seeding
from runtime.cli import UserError
from runtime.log import Meter
from runtime.optim import frozen
from runtime.torchvision_cpu import torchvision
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


# Fewer operations for a GPU to start, with the results of the plain form

def test_frozen_weights_in_bfloat16_change_no_bit():
    """Autocast converts them to the same values; output and gradient of the input are equal."""
    torch.manual_seed(0)
    unet = UNet(8, 32, [1, 2], [1], 1, conditional=True, class_num=10).eval()
    for p in unet.parameters():
        p.data += .02 * torch.randn_like(p)
    for network, inputs in ((unet, (torch.arange(4), torch.arange(4))),
                            (build_classifier('densenet_small', 10).eval(), ())):
        found = []
        for prepared in (False, True):
            network = frozen(channels_last(copy.deepcopy(network)))
            if prepared:
                precision.prepare('bf16', False, CPU, network)
            x = randn(4, 3, 8, 8).requires_grad_()
            with precision.autocast('bf16', CPU):
                out = network(x, *inputs)
            out = out if isinstance(out, tuple) else (out,)
            sum(v.float().square().sum() for v in out).backward()
            found.append([v.detach() for v in out] + [x.grad])
        assert all(torch.equal(one, other) for one, other in zip(*found))
        dtypes = {name: p.dtype for name, p in network.named_parameters()}
        assert torch.bfloat16 in dtypes.values()
        assert all(dtype == torch.float32 for name, dtype in dtypes.items()
                   if 'norm' in name or name.startswith(UNet.in_float32))


def test_prepare_leaves_the_rest_alone():
    """Nothing changes in float32, and weights that are trained are refused."""
    net = small_unet()
    precision.prepare('none', False, CPU, net)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    with pytest.raises(ValueError, match='is trained'):
        precision.prepare('bf16', False, CPU, net)


def test_last_layers_in_float32():
    """Under autocast, the tail gets what the blocks made and keeps all digits of its own."""
    net, seen = channels_last(small_unet()), []
    net.tail.register_forward_hook(lambda tail, inputs, out: seen.append((inputs[0], out)))
    with torch.no_grad(), precision.autocast('bf16', CPU):
        out = net(randn(4, 3, 8, 8), torch.arange(4))
    (h, _), = seen
    assert h.dtype == out.dtype == torch.float32
    assert torch.equal(out, net.tail(h)) and not torch.equal(out, out.bfloat16().float())


def test_time_projections_in_one_product():
    """Shift of every block as its own layer makes it; gradients of these layers and of temb."""
    net, found = small_unet(), []
    temb = randn(4, 128).requires_grad_()
    blocks = net.res_blocks()
    weights = [p for block in blocks for p in block.temb_proj.parameters()]
    for shifts in ([shift for shift, in net._inputs_of_blocks(temb, None)],
                   [block.temb_proj(temb) for block in blocks]):
        loss = sum((i + 1) * shift.square().sum() for i, shift in enumerate(shifts))
        found.append([*(v.detach() for v in shifts), *torch.autograd.grad(loss, [temb, *weights])])
    assert len(blocks) == 8
    assert_near(*found, 1e-5)


@pytest.mark.parametrize('training', [False, True])
def test_dense_block_against_torchvision(training):
    """The layers of torchvision's block; equal outputs, gradients added up in another order."""
    torch.manual_seed(0)
    block = DenseBlock(torchvision().models.DenseNet(8, (4,), 16, 2).features.denseblock1.items())
    theirs = torchvision().models.densenet._DenseBlock(4, 16, 2, 8, 0)
    theirs.load_state_dict(block.state_dict())
    found = []
    for form in (block.train(training), theirs.train(training)):
        x = randn(4, 16, 4, 4).requires_grad_()
        out = form(x)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(p.grad for p in form.parameters())])
    assert torch.equal(found[0][0], found[1][0])
    assert_near(*found, 1e-4)


def test_meter_adds_up_now_and_then():
    """Many values, some not finite, under names that come and go."""
    meter = Meter()
    for i in range(250):
        meter.add(loss=torch.tensor(float(i) if i % 50 else math.inf), other=2.)
        if i % 2:
            meter.add(norm=torch.tensor(float(i)))
    means = meter.mean()
    assert means['loss'] == pytest.approx(sum(i for i in range(250) if i % 50) / 245)
    assert (means['other'], means['norm']) == (2, 125) and not meter.recent


def test_noise_ahead():
    """The numbers of `noise_of_images`, batch by batch, and none for no batch."""
    batches = [range(3), range(3, 6), range(6, 7)]
    for indices, (same, x_T) in zip(batches, seeding.noise_ahead(5, batches, (3, 4, 4), CPU)):
        assert same == indices
        assert torch.equal(x_T, seeding.noise_of_images(5, indices, (3, 4, 4), CPU))
    assert len(list(seeding.noise_ahead(5, batches, (3, 4, 4), CPU))) == 3
    assert not list(seeding.noise_ahead(5, [], (3, 4, 4), CPU))


@pytest.mark.parametrize('device, graphs, mode', [
    ('cuda', True, dict(mode='reduce-overhead')), ('cuda', False, {}), ('cpu', True, {})])
def test_graphs_on_a_gpu_alone(device, graphs, mode, monkeypatch):
    seen, layer = [], torch.nn.Linear(2, 2)
    monkeypatch.setattr(precision, 'TORCH', (2, 13))
    monkeypatch.setattr(torch, 'compile', lambda function, **how: function)
    monkeypatch.setattr(torch, 'zeros', lambda *size, device: torch.ones(*size))
    monkeypatch.setattr(layer, 'compile', lambda **how: seen.append(how))
    precision.compile_networks(True, torch.device(device), layer, graphs=graphs)
    assert seen == [dict(mode, dynamic=False)]


def test_set_up_gpu(monkeypatch):
    """What --tf32 allows; by default what torch allows."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    try:
        for tf32, allowed in (('none', (False, False)), ('all', (True, True)),
                              ('conv', (True, False))):
            distributed.set_up_gpu(tf32)
            assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == (*allowed, True)
        assert allowed == before[:2]
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


@pytest.mark.parametrize('device, how', [
    ('cuda:1', dict(timeout=distributed.PATIENCE_OF_GPUS, device_id=torch.device('cuda:1'))),
    ('cpu', dict(timeout=distributed.PATIENCE))])
def test_group_knows_its_device(device, how, monkeypatch):
    """Time-outs by device; the hosts have a group of their own beside NCCL."""
    seen, groups = [], []
    store = torch.distributed.HashStore()
    monkeypatch.setattr(distributed, '_hosts', None)
    monkeypatch.setattr(distributed.dist, 'rendezvous', lambda url: iter([(store, 1, 2)]))
    monkeypatch.setattr(distributed.dist, 'new_group', lambda **more: groups.append(more))

    def init_process_group(backend, store, rank, world_size, timeout, device_id=None):
        seen.append(dict(backend=backend, timeout=timeout,
                         **({} if device_id is None else dict(device_id=device_id))))

    monkeypatch.setattr(distributed.dist, 'init_process_group', init_process_group)
    distributed.join(torch.device(device), 2)
    gpu = device != 'cpu'
    assert seen == [dict(how, backend='nccl' if gpu else 'gloo')] and len(groups) == gpu


@pytest.mark.parametrize('fast', [True, False])
def test_amp_auto(fast, monkeypatch):
    """bfloat16 where it is fast, but not to distil from fine grids."""
    monkeypatch.setattr(precision, 'has_fast_bf16', lambda device: fast)
    choices = [precision.choose('auto', CPU, steps) for steps in (0, 64, 65, 512)]
    assert choices == (['bf16', 'bf16', 'none', 'none'] if fast else ['none'] * 4)
    assert precision.choose('bf16', CPU, 512) == 'bf16' and precision.choose('none', CPU) == 'none'


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
