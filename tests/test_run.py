"""The loop of `Run`: what it refuses, and what it leaves behind however it ends."""

import json
import re
import signal

import pytest
import torch
from absl import flags

from diffusion import Diffusion, distillation_loss
from helpers import FINISHED, is_locked
from model import UNet
from runtime import checkpoint, data, precision
from runtime.flags import define_training_flags
from runtime.run import Run

FLAGS = flags.FLAGS
TINY = ['', '--dataset=digits', '--batch_size=4', '--img_size=8', '--num_workers=0',
        '--sample_size=1', '--log_step=1', '--sample_step=0', '--lr=1e-3', '--total_steps=3']


@pytest.fixture(scope='module', autouse=True)
def training_flags():
    """The flags of a training script, as long as this module runs."""
    before = set(FLAGS)
    define_training_flags()
    yield
    for name in set(FLAGS) - before:
        delattr(FLAGS, name)


@pytest.fixture
def make(tmp_path):
    """A function that makes a run of a tiny network on random images, with further flags."""
    def make(*words):
        FLAGS.unparse_flags()
        FLAGS([*TINY, *words])
        torch.manual_seed(0)
        images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8)
        dataset = data.Images('digits', 'train', 8, [0] * 16, 10, images)
        net = UNet(8, 32, [1], [], 1, FLAGS.dropout)
        return Run(FLAGS, 'base', net, Diffusion(8), dataset, str(tmp_path / 'run'))
    return make


def compute(run, part):
    """Forward and backward of a part."""
    forward(run, part)
    backward(run, part)


def forward(run, part):
    x_0, y, t, eps = part
    with run.forward(part):
        part.pred = run.diffusion.predict(run.net, run.diffusion.add_noise(x_0, eps, t), t, y)


def backward(run, part):
    run.backward(loss=(1., distillation_loss(*part.pred, part.x_0, part.eps).mean()))


def train(run, last=None):
    """All steps of a run, or those up to `last`."""
    for step in run:
        for part in run.parts():
            compute(run, part)
        run.update(1e-3)
        if step == last:
            break


def steps_in_log(run):
    lines = open(f'{run.logdir}/metrics.jsonl').read().splitlines()
    return [json.loads(line)['step'] for line in lines]


def handlers():
    return [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]


# Order of the calls in a step

def refused(run, sentence, *calls):
    """A step that makes these calls ends with a RuntimeError that says `sentence`."""
    with pytest.raises(RuntimeError, match=sentence):
        for _ in run:
            parts = list(run.parts())
            for call in calls:
                call(run, parts)


def test_backward_without_forward(make):
    def wrong(run, parts):
        run.backward(loss=(1., torch.zeros((), requires_grad=True)))
    refused(make(), r'^run\.backward\(\) was called without run\.forward\(\); call the net', wrong)


def test_two_backwards(make):
    refused(make(), r'^run\.backward\(\) was called without run\.forward\(\)',
            lambda run, parts: compute(run, parts[0]), lambda run, parts: backward(run, parts[0]))


def test_two_forwards(make):
    refused(make('--grad_accum=2'), r'^run\.forward\(\) was called twice in a row; call run\.back',
            lambda run, parts: forward(run, parts[0]), lambda run, parts: forward(run, parts[1]))


def test_update_before_all_parts(make):
    refused(make('--grad_accum=2'), r'^run\.update\(\) was called after 1 of 2 parts; call run\.',
            lambda run, parts: compute(run, parts[0]), lambda run, parts: run.update(1e-3))


def test_more_parts_than_there_are(make):
    refused(make(), r'^run\.update\(\) was called after 2 of 1 parts',
            lambda run, parts: compute(run, parts[0]), lambda run, parts: compute(run, parts[0]),
            lambda run, parts: run.update(1e-3))


def test_two_updates(make):
    refused(make(), r'^run\.update\(\) was called .* and run\.update\(\) once$',
            lambda run, parts: compute(run, parts[0]), lambda run, parts: run.update(1e-3),
            lambda run, parts: run.update(1e-3))


def test_step_without_update(make):
    refused(make(), r'^step 1 ended without run\.update\(\)$',
            lambda run, parts: compute(run, parts[0]))


def test_right_order_is_not_refused(make):
    """The calls above are wrong for their order, not for what this file passes to them."""
    run = make('--grad_accum=2')
    train(run)
    assert steps_in_log(run) == [1, 2, 3] and checkpoint.read(run.logdir)['step'] == 3


# Ends of a loop

def test_whole_run(make, capsys):
    before, run = handlers(), make()
    train(run)
    assert handlers() == before and not is_locked(run.logdir) and run.log.file.closed
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.match(FINISHED.format(3, re.escape(run.logdir)), line)
    again = make()
    train(again)
    assert f'{run.logdir} is finished: step 3.' in capsys.readouterr().out
    assert again.start == 3 and steps_in_log(run) == [1, 2, 3]


def test_break_ends_the_run(make, capsys):
    """Log and lock are closed, the handlers of signals are back; the folder can be used again."""
    before, run = handlers(), make('--save_step=1')
    for step in run:
        assert is_locked(run.logdir) and not run.log.file.closed
        assert handlers()[:2] != before[:2]
        compute(run, next(run.parts()))
        run.update(1e-3)
        if step == 2:
            break
    assert handlers() == before and not is_locked(run.logdir) and run.log.file.closed
    assert 'finished' not in capsys.readouterr().out
    second = make()
    assert second.start == 1            # the step of the break had not ended
    train(second)
    assert steps_in_log(second) == [1, 2, 3]


def test_exception_ends_the_run(make, capsys):
    before, run = handlers(), make('--save_step=1')
    with pytest.raises(ZeroDivisionError):
        for step in run:
            for part in run.parts():
                with run.forward(part):
                    1 / (2 - step)
                    part.pred = run.diffusion.predict(run.net, part.x_0, part.t)
                backward(run, part)
            run.update(1e-3)
    assert handlers() == before and not is_locked(run.logdir) and run.log.file.closed
    assert 'finished' not in capsys.readouterr().out
    second = make()
    assert second.start == 1
    train(second)
    assert steps_in_log(second) == [1, 2, 3] and checkpoint.read(second.logdir)['step'] == 3


def test_signal_ends_the_run(make, capsys, monkeypatch):
    """After the step in which it came, with a checkpoint, and with the code of the signal."""
    from runtime.guard import stop
    monkeypatch.setattr(stop, 'received', 0)
    before, run = handlers(), make()
    with pytest.raises(SystemExit) as leaving:
        for step in run:
            if step == 2:
                signal.raise_signal(signal.SIGTERM)
            compute(run, next(run.parts()))
            run.update(1e-3)
    assert leaving.value.code == 143 and handlers() == before and not is_locked(run.logdir)
    assert 'SIGTERM: stopped after step 2, saved in' in capsys.readouterr().out
    assert checkpoint.read(run.logdir)['step'] == 2 and steps_in_log(run) == [1, 2]


@pytest.mark.parametrize('T, found', [(64, 'bf16'), (65, 'none')])
def test_fine_grids_are_distilled_in_float32(make, monkeypatch, capsys, tmp_path, T, found):
    """Under --amp auto, where bfloat16 is fast; a line says so. Base models are not concerned."""
    monkeypatch.setattr(precision, 'has_fast_bf16', lambda device: True)
    base = make('--amp=auto')
    run = Run(FLAGS, 'pd', base.net.module, Diffusion(T), base.dataset, str(tmp_path / 'student'),
              str(tmp_path / 'teacher'))
    assert (base.amp, run.amp) == ('bf16', found)
    assert ('--amp auto means float32' in capsys.readouterr().out) == (found == 'none')


# What a step does

def test_parts_are_rows_of_one_batch(make):
    """Rows, times and noise do not depend on the number of parts; gradients add up to the same."""
    whole, halves = make(), make('--grad_accum=2')
    for run in (whole, halves):
        for _ in run:
            run.kept = list(run.parts())
            break
    (one,), two = whole.kept, halves.kept
    for name in ('x_0', 'y', 't', 'eps'):
        assert torch.equal(torch.cat([getattr(part, name) for part in two]), getattr(one, name))
    assert [part.rows for part in two] == [slice(0, 2), slice(2, 4)]
    assert [part.last for part in two] == [False, True] and one.last
    assert one.t.min() >= 1 and one.t.max() <= 8


def test_weights_of_terms(make):
    """The gradient is that of sum(weight * value); the log has the values themselves."""
    run, parameter = make('--grad_clip=0'), None
    for _ in run:
        parameter = run.net.params[0]
        with run.forward(next(run.parts())):
            value = parameter.sum()
        run.backward(one=(2., value), other=(-.5, value))
        assert torch.equal(parameter.grad, torch.full_like(parameter, 1.5))
        found, means = value.item(), run.meter.mean()
        assert means['one'] == means['other'] == pytest.approx(found)
        assert means['loss'] == pytest.approx(1.5 * found)
        break


def test_dropout_noise_is_given_to_the_network(make):
    """Other masks in every step, and those of the step again after resuming."""
    found = []
    for _ in range(2):
        run = make('--dropout=0.5')
        for step in run:
            for part in run.parts():
                forward(run, part)
                found.append(run.net.context['noise'].keys)
                backward(run, part)
            run.update(0.)
            if step == 2:
                break
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
    assert found[0].shape == (5, 4)         # residual blocks, images
