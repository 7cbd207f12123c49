"""Fewer operations for a GPU to start, with the results of the plain form; settings for GPUs."""

import copy
import math
import platform
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from classifier import build_classifier
from classifier.frozen import fold_batch_norms, load_frozen
from classifier.imagenet import ImageNetClassifier
from classifier.networks import DenseBlock
from model import AttnBlock, GroupNorm, UNet
from runtime import checkpoint, distributed, precision, seeding
from runtime.log import Meter
from runtime.optim import frozen
from runtime.torchvision_cpu import torchvision
from tools.plain import plain_attention
from helpers import launch
from test_fast import CPU, assert_near, channels_last, randn, small_unet


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


def test_group_norm_in_float32():
    """On a CPU as on a GPU: bfloat16 goes in, and nothing is rounded inside."""
    norm, x = GroupNorm(64), randn(2, 64, 4, 4).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.nn.GroupNorm(32, 64)(x.float()))


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


def test_queries_keys_and_values_in_one_product():
    """Output and gradients of attention whose projections are layers of their own."""
    torch.manual_seed(0)
    block, found = AttnBlock(32).double(), []
    weights = [p for name, p in block.named_parameters() if name != 'proj_k.bias']  # no effect
    for p in block.parameters():
        p.data += .1 * torch.randn_like(p)

    def layer_by_layer(x):
        h = block.group_norm(x)
        q, k, v = (proj(h).flatten(2).mT for proj in (block.proj_q, block.proj_k, block.proj_v))
        h = plain_attention(q, k, v)
        return x + block.proj(h.mT.reshape(x.shape))

    for form in (block, layer_by_layer):
        x = channels_last(randn(2, 32, 4, 2).double()).requires_grad_()
        out = form(x)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, *weights])])
    assert_near(*found, 1e-10)


@pytest.mark.parametrize('name, left', [
    ('densenet_small', 1 + 14 + 1), ('resnet18', 0), ('resnet50', 0), ('convnet_small', 0),
    ('imagenet_densenet121', 1 + 58 + 3), ('imagenet_resnet18', 0)])
def test_batch_norms_in_the_convolutions(name, left):
    """The same outputs and gradient; only batch norms that come before a convolution are left."""
    torch.manual_seed(0)
    if name.startswith('imagenet'):
        network = ImageNetClassifier(name, getattr(torchvision().models, name[9:])(weights=None))
    else:
        network = build_classifier(name, 10)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        for values in (norm.running_mean, norm.bias):
            values.data.normal_(0, .1)
        for values in (norm.running_var, norm.weight):
            values.data.uniform_(.5, 1.5)
    network, found = frozen(network).double(), []
    for prepare in (frozen, fold_batch_norms):      # as it is, and folded
        x = randn(2, 3, 16, 16).double().requires_grad_()
        outputs = prepare(network)(x)
        found.append([*outputs, *torch.autograd.grad(outputs[2].square().sum(), x)])
    assert_near(*found, 1e-10)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules()) == left
    assert not any(p.requires_grad for p in network.parameters())


def test_the_classifier_of_a_distillation_is_folded(tmp_path):
    network = build_classifier('convnet_small', 10)
    checkpoint.save(tmp_path / 'ckpt.pt', dict(model=network.state_dict()))
    folded = load_frozen('convnet_small', tmp_path, Mock(num_classes=10), 'stored', CPU)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    x = randn(2, 3, 8, 8)
    assert_near(folded(x), network.eval()(x), 1e-5)


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


PAGES = """
import resource
import torch
from runtime import distributed
distributed.init()
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.empty(mib, 2 ** 18).fill_(1) for mib in (64, *32 * [1])]      # freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(new_pages() for _ in range(30)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='malloc is not that of glibc')
@pytest.mark.skipif(platform.machine() == 'aarch64', reason='torch has an allocator of its own')
def test_freed_memory_is_kept():
    """The system hands out the pages of tensors, large and small, a few times, and not for ever."""
    pages = [int(word) for word in launch(['-c', PAGES]).split()[-30:]]
    assert pages[-1] < pages[0] / 10


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


@pytest.mark.parametrize('line, fast', [
    ('flags : fpu avx512f avx512_bf16', True), ('flags : fpu amx_bf16', True),
    ('flags : fpu avx512f avx_vnni', False)])
def test_cpus_with_fast_bf16(line, fast, monkeypatch):
    monkeypatch.setattr(Path, 'read_text', lambda file: line)
    assert precision.has_fast_bf16(CPU) == fast


@pytest.mark.parametrize('fast', [True, False])
def test_amp_auto(fast, monkeypatch):
    """bfloat16 where it is fast, but not to distil from fine grids."""
    monkeypatch.setattr(precision, 'has_fast_bf16', lambda device: fast)
    choices = [precision.choose('auto', CPU, steps) for steps in (0, 64, 65, 512)]
    assert choices == (['bf16', 'bf16', 'none', 'none'] if fast else ['none'] * 4)
    assert precision.choose('bf16', CPU, 512) == 'bf16' and precision.choose('none', CPU) == 'none'
