"""Verbs of a training loop: what is not finite is not applied, counted and told; masks; locks."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from losses import MemoryP2P
from model import Dropout
from runtime import distributed, training
from runtime.options import UserError
from runtime.training import Meter, Stop, adam, clip_gradient, seed_dropout, step_optimizer, strict


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


def test_strict():
    x = torch.tensor(3e30, requires_grad=True)
    x.square().backward()                   # the loss is infinite, its gradient is not
    assert x.square().isinf() and x.grad.isfinite()
    x.grad = None
    strict(x.square()).backward()
    assert x.grad.isnan()
    y = torch.tensor(3., requires_grad=True)
    strict(y.square()).backward()
    assert y.grad == 6 and strict(y) == 3


def test_meter():
    meter = Meter()
    for value in (1., math.nan, 3., -math.inf):
        meter.add(loss=torch.tensor(value), norm=2.)
        meter.end_step(torch.tensor(math.isfinite(value)))
    assert meter.mean() == dict(loss=2., norm=2., bad_steps=2)
    meter.add(loss=torch.tensor(math.nan))
    meter.end_step(torch.tensor(False))
    means = meter.mean()
    assert math.isnan(means['loss']) and means['bad_steps'] == 1


def test_meter_stops_after_steps_in_a_row():
    meter = Meter()
    for step, value in enumerate((math.nan, 1., math.nan, math.nan, math.nan), 1):
        meter.add(loss=torch.tensor(value), loss_intra=torch.tensor(value), loss_feature=1.)
        meter.end_step(torch.tensor(math.isfinite(value)))
        if step < 5:
            meter.check(step, 3)
    meter.check(5, 0)       # 0: never
    with pytest.raises(UserError, match=r'step 5 the last 3 steps in a row .*\(loss_intra\)') as e:
        meter.check(5, 3)
    assert e.value.code == 1


def test_meter_goes_on_from_its_state():
    whole, half = Meter(), Meter()
    for meter in (whole, half):
        meter.add(loss=torch.tensor(.1), grad_norm=torch.tensor(.7))
        meter.end_step(torch.tensor(False))
    state = half.state_dict()
    state['sums']['old'] = [1., 1., 0.]         # a term that is not wanted any more
    half = Meter(json.loads(json.dumps(state)))
    for meter in (whole, half):
        meter.add(loss=torch.tensor(.3), grad_norm=torch.tensor(math.inf))
        meter.end_step(torch.tensor(False))
    with pytest.raises(UserError, match='last 2 steps'):
        half.check(2, 2)
    assert whole.mean() == half.mean() and Meter(None).state_dict()['sums'] == {}


def test_dropout_masks_belong_to_the_image():
    """Shares of a batch get the masks that the whole batch would have."""
    layer, x = Dropout(0.25), torch.ones(8, 16, 5, 5)
    seed_dropout(layer, slice(0, 8), 8, 1, 2, 3)
    whole = layer(x)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 8)):
        seed_dropout(layer, rows, 8, 1, 2, 3)
        assert torch.equal(layer(x[rows]), whole[rows])
    assert whole.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (whole == 0).float().mean().item() == pytest.approx(.25, abs=.03)
    assert not torch.equal(whole[0], whole[1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        seed_dropout(layer, slice(0, 2), 8, 1, 2, 3)
        layer(x[:2].clone().requires_grad_(True))
    assert max(v.untyped_storage().nbytes() for v in kept) <= x[:2].numel() * 4   # no whole masks
    seed_dropout(layer, slice(0, 8), 8, 1, 2, 4)
    assert not torch.equal(layer(x), whole)             # another step
    assert layer.eval()(x) is x and Dropout(0.)(x) is x
    assert not Dropout(1.)(x).any()


def test_global_batch_norm_is_batch_norm():
    one = nn.BatchNorm2d(3)
    nn.init.normal_(one.weight)
    other = distributed.sync_batch_norm(nn.Sequential(nn.BatchNorm2d(3)))
    other[0].load_state_dict(one.state_dict())
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1
    a, b = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    up = torch.randn(4, 3, 5, 5)
    for layer, y in ((one, a), (other, b)):
        (layer(y) * up).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other[0].state_dict()[key], value, rtol=1e-5, atol=1e-6)
    far = torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * .1 + 1000
    torch.testing.assert_close(other(far), one(far), rtol=1e-2, atol=1e-2)
    before = {key: value.clone() for key, value in other[0].state_dict().items()}
    other(x * math.inf)
    for key in ('running_mean', 'running_var'):
        assert torch.equal(other[0].state_dict()[key], before[key])


def test_queue_stays_finite():
    memory = MemoryP2P(4, queue_size=6, contrast_size=2, update_size=2)
    before = memory.queue.clone()
    memory.enqueue(torch.tensor([[math.nan, 0, 0, 0], [0, 2., 0, 0]]))
    assert torch.equal(memory.queue[0], before[0]) and memory.queue[1].tolist() == [0, 1, 0, 0]
    assert memory.pointer == 2


def test_second_run_in_a_folder_is_refused(tmp_path):
    """The lock belongs to the process and is gone with it, however it ended."""
    code = ('import sys; sys.path.insert(0, sys.argv[1]); from runtime import training; '
            'print(training.lock(sys.argv[2]))')
    other = [sys.executable, '-c', code, str(training.__file__).split('/runtime')[0],
             str(tmp_path / '.lock')]
    assert training.lock(tmp_path / '.lock') is None
    said = subprocess.run(other, stdout=subprocess.PIPE, universal_newlines=True).stdout
    assert f'is in use by process {os.getpid()} on ' in said
    training._locks.pop().close()
    said = subprocess.run(other, stdout=subprocess.PIPE, universal_newlines=True).stdout
    assert said.strip() == 'None'


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='--logdir .*file/run cannot be written to'):
        training.make_logdir(str(tmp_path / 'file/run'))


def test_stop():
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = Stop()
        assert not stop.asked()
        stop.leave_if_asked('folder', 3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert Stop().asked() and signal.getsignal(signal.SIGINT) != handlers[signal.SIGINT]
        assert stop.asked()
        with pytest.raises(SystemExit) as leaving:
            stop.leave_if_asked('folder', 3)
        assert leaving.value.code == 143
    finally:
        Stop.received, Stop.since = 0, 0.
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_step_is_decided_on_the_gpu():
    """No copy to the host, in the step or in the meter."""
    p = nn.Parameter(torch.ones(2, device='cuda'))
    optim, meter = adam([p], 0.1, 0.), Meter()
    for grad in ([1., 1.], [math.nan, 1.]):
        p.grad = torch.tensor(grad, device='cuda')
        torch.cuda.set_sync_debug_mode('error' if math.isnan(grad[0]) else 'default')
        try:
            finite = clip_gradient([p], 1.).isfinite()
            step_optimizer(optim, finite)
            meter.add(loss=p.detach().sum())
            meter.end_step(finite)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    torch.testing.assert_close(p.detach().cpu(), torch.tensor([.9, .9]))
    assert meter.mean()['bad_steps'] == 1
