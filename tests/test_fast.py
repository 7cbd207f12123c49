"""Fast forms against what they replace: outputs and gradients; precision; settings for GPUs."""

import copy
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from classifier import build_classifier
from classifier.frozen import fold_batch_norms, load_frozen
from classifier.imagenet import ImageNetClassifier
from classifier.networks import DenseBlock
from losses import MemoryP2P, intra_sample_p2p, unit_pixels
from model import AttnBlock, GroupNorm, ResBlock, UNet
from runtime import checkpoint, distributed, precision
from runtime.cli import UserError
from runtime.optim import frozen
from runtime.torchvision_cpu import torchvision

CPU = torch.device('cpu')


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_unet(ch_mult=(1, 2), **how):
    torch.manual_seed(0)
    net = UNet(8, 32, ch_mult, [len(ch_mult) - 1], 1, **how)
    for module in net.modules():        # layers that start near 0 would hide the rest
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.xavier_uniform_(module.weight)
    return net


def step(net):
    """Output of a network on four images, and the gradient of a sum of its squares."""
    out = net(randn(4, 3, 8, 8), torch.arange(4))
    out.square().sum().backward()
    # in one vector: the gradient of some biases is 0 but for rounding
    return [out.detach(),
            torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad])]


def assert_near(found, expected, rel):
    """Largest difference relative to the largest value, tensor by tensor."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        assert other.abs().max() > 0
        assert ((one - other).abs().max() / other.abs().max()).item() <= rel


# Precision

def test_frozen_weights_in_bfloat16_change_no_bit():
    """Autocast converts them to the same values; output and gradient of the input are equal."""
    unet = small_unet(conditional=True, class_num=10)
    for network, inputs in ((unet, (torch.arange(2), torch.arange(2))),
                            (build_classifier('densenet_small', 10), ())):
        found = []
        for prepared in (False, True):
            network = frozen(copy.deepcopy(network).to(memory_format=torch.channels_last))
            if prepared:
                precision.prepare('bf16', False, CPU, network)
            x = randn(2, 3, 8, 8).requires_grad_()
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
    with pytest.raises(ValueError, match='is trained'):
        precision.prepare('bf16', False, CPU, small_unet())


def test_group_norm_in_float32():
    """On a CPU as on a GPU: bfloat16 goes in, and nothing is rounded inside."""
    norm, x = GroupNorm(64), randn(2, 64, 4, 4).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.nn.GroupNorm(32, 64)(x.float()))


def test_last_layers_in_float32():
    """Under autocast, the tail gets what the blocks made and keeps all digits of its own."""
    net, seen = small_unet().to(memory_format=torch.channels_last), []
    exact, _ = step(net)
    net.tail.register_forward_hook(lambda tail, inputs, out: seen.append((inputs[0], out)))
    with torch.no_grad(), precision.autocast('bf16', CPU):
        out = net(randn(4, 3, 8, 8), torch.arange(4))
    (h, _), = seen
    assert h.dtype == out.dtype == torch.float32
    assert torch.equal(out, net.tail(h)) and not torch.equal(out, out.bfloat16().float())
    assert not torch.equal(out, exact)      # three significant digits in every other product
    assert_near([out], [exact], .03)


@pytest.mark.parametrize('cpu, fast', [
    ('fpu avx512f avx512_bf16', True), ('fpu amx_bf16', True), ('fpu avx512f avx_vnni', False)])
def test_amp_auto(cpu, fast, monkeypatch):
    """bfloat16 where the hardware has it, but not to distil from fine grids."""
    monkeypatch.setattr(Path, 'read_text', lambda file: f'flags : {cpu}')
    choices = [precision.choose('auto', CPU, steps) for steps in (0, 64, 65, 512)]
    assert choices == (['bf16', 'bf16', 'none', 'none'] if fast else ['none'] * 4)
    assert precision.choose('bf16', CPU, 512) == 'bf16' and precision.choose('none', CPU) == 'none'


# Layers

def test_time_projections_in_one_product():
    """Shift of every block as its own layer makes it; gradients of these layers and of temb."""
    net, shifts = small_unet(), []
    blocks = [module for module in net.modules() if isinstance(module, ResBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda block, inputs: shifts.append((block, inputs[1])))
    t = torch.arange(4)
    net(randn(4, 3, 8, 8), t)
    assert len(shifts) == len(blocks) == 8
    weights = [p for module in (net.time_embedding, *(block.temb_proj for block in blocks))
               for p in module.parameters() if p.requires_grad]
    found = []
    for form in (lambda block, shift: shift,
                 lambda block, _: block.temb_proj(net.time_embedding(t))):
        values = [form(*pair) for pair in shifts]
        loss = sum((i + 1) * value.square().sum() for i, value in enumerate(values))
        found.append([*(v.detach() for v in values), *torch.autograd.grad(loss, weights)])
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
        h = (q @ k.mT * 32 ** -.5).softmax(-1) @ v
        return x + block.proj(h.mT.reshape(x.shape))

    for form in (block, layer_by_layer):
        x = randn(2, 32, 4, 2).double().to(memory_format=torch.channels_last).requires_grad_()
        out = form(x)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, *weights])])
    assert_near(*found, 1e-10)


def batch_norms(network):
    return [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]


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
    for norm in batch_norms(network):
        for values in (norm.running_mean, norm.bias):
            values.data.normal_(0, .1)
        for values in (norm.running_var, norm.weight):
            values.data.uniform_(.5, 1.5)
    network, found = frozen(network).double(), []
    for prepare in (frozen, fold_batch_norms):      # as it is, and folded
        x = randn(1, 3, 8, 8).double().requires_grad_()
        outputs = prepare(network)(x)
        found.append([*outputs, *torch.autograd.grad(outputs[2].square().sum(), x)])
    assert_near(*found, 1e-10)
    assert len(batch_norms(network)) == left
    assert not any(p.requires_grad for p in network.parameters())


def test_the_classifier_of_a_distillation_is_folded(tmp_path):
    network = build_classifier('convnet_small', 10)
    checkpoint.save(tmp_path / 'ckpt.pt', dict(model=network.state_dict()))
    dataset = Mock(num_classes=10, img_size=8)
    folded = load_frozen('convnet_small', tmp_path, dataset, 'stored', CPU)
    assert not batch_norms(folded)
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


# Relational losses in chunks; test_losses.py has the definition of IS_P2P

class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that is made inside."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.entries = max(self.entries, out.numel())
        return out


def test_memory_in_chunks(monkeypatch):
    """Value and gradient of autograd with all similarities; they are never held together."""
    monkeypatch.setattr('losses.CHUNK_ENTRIES', 16 * 400)
    torch.manual_seed(0)
    memory = MemoryP2P(8, 1000, 400, temperature=.5)
    projected_S, map_T = randn(32, 8, 4, 4).requires_grad_(), randn(32, 8, 4, 4, seed=1)
    log_p_S, log_p_T = ((unit_pixels(v) @ memory.queue[memory.contrast].t() / .05).log_softmax(1)
                        for v in (projected_S, map_T))
    expected = F.kl_div(log_p_S, log_p_T, reduction='batchmean', log_target=True)
    with Largest() as largest:
        loss = memory(projected_S, map_T)
        grad, = torch.autograd.grad(loss, projected_S)
    expected_grad, = torch.autograd.grad(expected, projected_S)
    assert_near([loss[None], grad], [expected[None], expected_grad], 1e-5)
    assert largest.entries == 16 * 400 < 32 * 16 * 400


def test_relations_of_a_batch_in_chunks():
    map_S, map_T = randn(32, 8, 4, 4).requires_grad_(), randn(32, 8, 4, 4, seed=1)
    with Largest() as largest:
        intra_sample_p2p(map_S, map_T, chunk_entries=16 * 512).backward()
    assert largest.entries == 16 * 512 < 512 ** 2


# torch.compile

def test_compiled_is_eager(monkeypatch):
    """In place, with the same names, in one graph; without generating code, which takes minutes."""
    if precision.TORCH < (2, 2):
        pytest.skip(f'--compile needs torch 2.2, this is {torch.__version__}')
    with_code = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda function, **how: with_code(
        function, backend='aot_eager', **how))
    torch._dynamo.reset()
    eager = small_unet([1])
    compiled = copy.deepcopy(eager)
    precision.compile_networks(True, CPU, compiled)
    before = torch._dynamo.utils.counters['stats']['unique_graphs']
    found = step(compiled)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == before + 1
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert_near(found, step(eager), 1e-5)
    copy.deepcopy(compiled)


def test_compiling_that_fails_is_one_sentence(monkeypatch):
    monkeypatch.setattr(precision, 'TORCH', (2, 2))
    monkeypatch.setattr(torch, 'compile', Mock(
        side_effect=RuntimeError('no C++ compiler\nand a long story')))
    precision.compile_networks(False, CPU)
    with pytest.raises(UserError, match=r'--compile .*\(no C\+\+ compiler\); leave it out') as e:
        precision.compile_networks(True, CPU)
    assert e.value.code == 1
    monkeypatch.setattr(precision, 'TORCH', (2, 1))
    with pytest.raises(UserError, match='it needs torch 2.2'):
        precision.compile_networks(True, CPU)


@pytest.mark.parametrize('device, graphs, mode', [
    ('cuda', True, dict(mode='reduce-overhead')), ('cuda', False, {}), ('cpu', True, {})])
def test_graphs_on_a_gpu_alone(device, graphs, mode, monkeypatch):
    layer = Mock()
    monkeypatch.setattr(precision, 'TORCH', (2, 13))
    monkeypatch.setattr(torch, 'compile', Mock())
    monkeypatch.setattr(torch, 'zeros', Mock())
    precision.compile_networks(True, torch.device(device), layer, graphs=graphs)
    layer.compile.assert_called_once_with(dynamic=False, **mode)


# GPUs

def test_set_up_gpu():
    """Whether convolutions and matrix products may round to TF32; by default what torch allows."""
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


@pytest.mark.parametrize('device, backend', [('cuda:1', 'nccl'), ('cpu', 'gloo')])
def test_group_of_processes(device, backend, monkeypatch):
    """NCCL has its device, a shorter timeout than gloo, and a group of the hosts beside it."""
    joined, gpu, device = {}, backend == 'nccl', torch.device(device)

    def init_process_group(backend, device_id=None, **more):
        joined.update(more, backend=backend, device_id=device_id)

    monkeypatch.setattr(distributed, '_hosts', None)
    monkeypatch.setattr(distributed, 'check_agreement', lambda: None)
    monkeypatch.setattr(distributed.dist, 'rendezvous', lambda url: iter([(Mock(), 1, 2)]))
    monkeypatch.setattr(distributed.dist, 'new_group', Mock())
    monkeypatch.setattr(distributed.dist, 'init_process_group', init_process_group)
    distributed.join(device, 2)
    del joined['store']
    assert distributed.dist.new_group.call_count == gpu
    assert joined == dict(backend=backend, rank=1, world_size=2, device_id=device if gpu else None,
                          timeout=timedelta(minutes=30) if gpu else timedelta(hours=6))
