"""bfloat16 and torch.compile, folded batch norms, settings for GPUs."""

import copy
from datetime import timedelta
from pathlib import Path
from unittest.mock import ANY, Mock

import pytest
import torch

from classifier.frozen import load_frozen
from classifier.networks import build_classifier, imagenet_classifier
from model import GroupNorm, UNet
from runtime import checkpoint, distributed, precision
from runtime.cli import UserError
from runtime.optim import frozen
from runtime.torchvision_cpu import torchvision
from wiring import random_unet

CPU = torch.device('cpu')


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# Precision

def test_frozen_weights_in_bfloat16_change_no_bit():
    """Autocast converts them to the same values; output and gradient of the input are equal."""
    unet = random_unet(conditional=True)
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
        precision.prepare('bf16', False, CPU, random_unet())


def test_layers_in_float32():
    """Under autocast, group norms and the tail keep all digits of their own."""
    norm, x = GroupNorm(64), randn(2, 64, 4, 4).bfloat16()
    net, seen = random_unet().to(memory_format=torch.channels_last), []
    net.tail.register_forward_hook(lambda tail, inputs, out: seen.extend(inputs))
    with torch.no_grad():
        exact = net(randn(4, 3, 8, 8), torch.arange(4))
        with precision.autocast('bf16', CPU):
            assert torch.equal(norm(x), torch.nn.GroupNorm(32, 64)(x.float()))
            out = net(randn(4, 3, 8, 8), torch.arange(4))
    h = seen[1]
    assert h.dtype == out.dtype == torch.float32
    assert torch.equal(out, net.tail(h)) and not torch.equal(out, out.bfloat16().float())
    # three significant digits in every other product
    assert 0 < (out - exact).abs().max() < .03 * exact.abs().max()


@pytest.mark.parametrize('cpu, chosen', [
    ('avx512f avx512_bf16', 'bf16'), ('fpu amx_bf16', 'bf16'), ('avx512f avx_vnni', 'none')])
def test_amp_auto(cpu, chosen, monkeypatch):
    """bfloat16 where the hardware has it; that fine grids are an exception is in test_run.py."""
    monkeypatch.setattr(Path, 'read_text', lambda file: f'flags : {cpu}')
    assert [precision.choose(amp, CPU) for amp in ('auto', 'bf16', 'none')] == [
        chosen, 'bf16', 'none']


# Batch norms

def batch_norms(network):
    return [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]


@pytest.mark.parametrize('name, left', [
    ('densenet_small', 1 + 14 + 1), ('resnet18', 0), ('convnet_small', 0),
    ('imagenet_densenet121', 1 + 58 + 3)])
def test_the_classifier_of_a_distillation_is_folded(name, left, tmp_path):
    """The same outputs; only batch norms that come before a convolution are left."""
    torch.manual_seed(0)
    imagenet = name.startswith('imagenet')
    network = (getattr(torchvision().models, name[9:])(weights=None) if imagenet
               else build_classifier(name, 10))
    for norm in batch_norms(network):
        for values in (norm.running_mean, norm.bias):
            values.data.normal_(0, .1)
        for values in (norm.running_var, norm.weight):
            values.data.uniform_(.5, 1.5)
        if name == 'convnet_small':
            norm.running_var[0] = 1e-4      # where the epsilon counts
    checkpoint.save(tmp_path / 'ckpt.pt', dict(model=network.state_dict()))
    dataset = Mock(num_classes=10, img_size=8)
    folded = load_frozen(name, tmp_path / 'ckpt.pt', dataset, 'stored', CPU)
    network = frozen(imagenet_classifier(name, network) if imagenet else network)
    x = randn(1, 3, 8, 8)
    for found, expected in zip(folded(x), network(x)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert len(batch_norms(folded)) == left
    assert not any(p.requires_grad for p in folded.parameters())


# torch.compile

def test_compiled_is_eager(monkeypatch):
    """In place, with the same names, in one graph; without generating code, which takes long."""
    if precision.TORCH < (2, 2):
        pytest.skip(f'--compile needs torch 2.2, this is {torch.__version__}')
    with_code = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda function, **how: with_code(
        function, backend='eager', **how))
    torch._dynamo.reset()
    eager = random_unet()
    compiled = copy.deepcopy(eager)
    precision.compile_networks(True, CPU, compiled)
    graphs = torch._dynamo.utils.counters['stats']
    before, inputs = graphs['unique_graphs'], (randn(4, 3, 8, 8), torch.arange(4))
    assert torch.equal(compiled(*inputs), eager(*inputs))
    assert graphs['unique_graphs'] == before + 1
    assert list(compiled.state_dict()) == list(eager.state_dict())
    copy.deepcopy(compiled)


@pytest.mark.parametrize('version, reason', [((2, 2), r'no C\+\+ compiler'), ((2, 1), 'torch 2.2')])
def test_compiling_that_fails_is_one_sentence(version, reason, monkeypatch):
    monkeypatch.setattr(precision, 'TORCH', version)
    monkeypatch.setattr(torch, 'compile', Mock(
        side_effect=RuntimeError('no C++ compiler\nand a long story')))
    precision.compile_networks(False, CPU)
    with pytest.raises(UserError, match=rf'--compile .*{reason}\); leave it out') as e:
        precision.compile_networks(True, CPU)
    assert e.value.code == 1


@pytest.mark.parametrize('device, graphs, mode', [
    ('cuda', True, dict(mode='reduce-overhead')), ('cuda', False, {}), ('cpu', True, {})])
def test_graphs_on_a_gpu_alone(device, graphs, mode, monkeypatch):
    layer, device = Mock(), torch.device(device)
    monkeypatch.setattr(precision, 'TORCH', (2, 13))
    monkeypatch.setattr(precision, 'torch', Mock())
    precision.compile_networks(True, device, layer, graphs=graphs)
    layer.compile.assert_called_once_with(dynamic=False, **mode)


# GPUs

@pytest.mark.parametrize('tf32, conv, matmul', [
    ('none', False, False), ('conv', True, False), ('all', True, True)])
def test_set_up_gpu(tf32, conv, matmul, monkeypatch):
    """Whether convolutions and matrix products may round to TF32."""
    backends = Mock()
    monkeypatch.setattr(torch, 'backends', backends)
    distributed.set_up_gpu(tf32)
    assert backends.cudnn.allow_tf32 == conv and backends.cuda.matmul.allow_tf32 == matmul
    assert backends.cudnn.benchmark


@pytest.mark.parametrize('device, backend, hours, groups', [
    ('cuda:1', 'nccl', .5, 1), ('cpu', 'gloo', 6, 0)])
def test_group_of_processes(device, backend, hours, groups, monkeypatch):
    """NCCL has a shorter timeout than gloo, and a group of the hosts beside it."""
    dist = Mock(rendezvous=lambda url: iter([(Mock(), 1, 2)]))
    for name, form in dict(dist=dist, _hosts=None, check_agreement=lambda: None).items():
        monkeypatch.setattr(distributed, name, form)
    distributed.join(torch.device(device), 2)
    dist.init_process_group.assert_called_once_with(
        backend, store=ANY, rank=1, world_size=2, timeout=timedelta(hours=hours))
    assert dist.new_group.call_count == groups
