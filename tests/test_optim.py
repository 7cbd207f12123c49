"""Optimisation: a step that is not finite leaves no trace, and the device decides that."""

import json
import math

import pytest
import torch
from torch import nn

from losses import MemoryP2P
from runtime import distributed
from runtime.distributed import GlobalBatchNorm2d
from runtime.optim import adam, clip_gradient, step_optimizer


def trained(fused):
    """A parameter after one good step of Adam, and its optimiser."""
    p = nn.Parameter(torch.tensor([1., 2.]))
    optim = adam([p], 0.1, 0.) if fused else torch.optim.Adam([p], lr=0.1)
    p.grad = torch.tensor([3., -4.])
    step_optimizer(optim, clip_gradient([p], 1.).isfinite())
    return p, optim


@pytest.mark.parametrize('fused', [True, False])
def test_adam_step(fused):
    p, optim = trained(fused)
    torch.testing.assert_close(p.detach(), torch.tensor([0.9, 2.1]))     # lr * sign at first
    assert p.grad is None


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_not_applied(fused, bad):
    p, optim = trained(fused)
    before = json.dumps([p.tolist(), [v.tolist() for v in optim.state[p].values()]])
    p.grad = torch.tensor([bad, 1.])
    finite = clip_gradient([p], 1.).isfinite()
    step_optimizer(optim, finite, lr=0.5)
    assert not finite and p.grad is None
    assert before == json.dumps([p.tolist(), [v.tolist() for v in optim.state[p].values()]])
    other, reference = trained(fused)       # and the next good one is as if it had not been
    for q, o in ((p, optim), (other, reference)):
        q.grad = torch.tensor([1., 1.])
        step_optimizer(o, clip_gradient([q], 0.).isfinite(), lr=0.5)
    assert torch.equal(p, other)


def test_clip_gradient():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3., 4.])
    assert clip_gradient([p], 0.) == 5 and p.grad.tolist() == [3, 4]
    assert clip_gradient([p], 1.) == 5
    torch.testing.assert_close(p.grad, torch.tensor([.6, .8]), rtol=1e-5, atol=0)


def test_global_batch_norm_is_batch_norm():
    one, other = nn.BatchNorm2d(3), GlobalBatchNorm2d(3)
    nn.init.normal_(one.weight)
    other.load_state_dict(one.state_dict())
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1
    a, b = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    up = torch.randn(4, 3, 5, 5)
    for layer, y in ((one, a), (other, b)):
        (layer(y) * up).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    far = torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * .1 + 1000
    torch.testing.assert_close(other(far), one(far), rtol=1e-2, atol=1e-2)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    other(x * math.inf)
    for key in ('running_mean', 'running_var'):
        assert torch.equal(other.state_dict()[key], before[key])


def test_batch_norms_of_several_processes(monkeypatch):
    """Those of a network become global in place, where they are; nothing else changes."""
    assert type(distributed.sync_batch_norm(nn.BatchNorm2d(2))) is nn.BatchNorm2d   # one process
    monkeypatch.setattr(distributed.dist, 'is_initialized', lambda: True)
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Sequential(nn.BatchNorm2d(2, eps=.5))).to('meta')
    before = dict(network.state_dict(keep_vars=True))
    found = distributed.sync_batch_norm(network)
    assert type(found[1][0]) is GlobalBatchNorm2d and found[1][0].eps == .5
    assert all(value is before[key] for key, value in found.state_dict(keep_vars=True).items())


def test_queue_stays_finite():
    memory = MemoryP2P(4, queue_size=6, contrast_size=2, update_size=2)
    before = memory.queue.clone()
    memory.enqueue(torch.tensor([[math.nan, 0, 0, 0], [0, 2., 0, 0]]))
    assert torch.equal(memory.queue[0], before[0]) and memory.queue[1].tolist() == [0, 1, 0, 0]
    assert memory.pointer == 2
