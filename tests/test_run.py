"""`Run`: the order of calls, what a step does, how runs end, what resuming takes and refuses."""

import math
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY, Mock, call

import pytest
import torch
from absl import flags
from torch import nn
from torch.nn.functional import dropout

from diffusion import Diffusion, distillation_loss
from helpers import assert_same_runs, is_locked, log_of, parsing
from model import UNet
from runtime import checkpoint, data, distributed, precision
from runtime.cli import UserError
from runtime.guard import SIGNALS, stop
from training import define_training_flags, noisy_parts, sample_grid, start_run

FLAGS = flags.FLAGS
TINY = ['--dataset=digits', '--batch_size=4', '--img_size=8', '--num_workers=0', '--sample_size=1',
        '--log_step=1', '--sample_step=0', '--lr=1e-3', '--total_steps=3']
DIFFUSION = Diffusion(8)


def network(seed=0):
    torch.manual_seed(seed)
    return UNet(8, 32, [1], [], 1, FLAGS.dropout)


def teacher(seed):
    return SimpleNamespace(network=network(seed), file='teacher/ckpt.pt',
                           diffusion=DIFFUSION.with_steps(2 * DIFFUSION.T))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that makes a run of a tiny network, with further flags."""
    with parsing(define_training_flags) as parse:
        parse(*TINY)

        def make(*words, method='base', T=8, images='first', folder='run', **more):
            monkeypatch.setattr(stop, 'received', 0)
            parse(*TINY, *words)
            dataset = data.make_dataset('digits', '.', 8, train=True)
            dataset.fingerprint = images
            return start_run(method, network(), Diffusion(T), dataset, str(tmp_path / folder),
                             FLAGS.total_steps, **more)

        yield make


def do_step(run, factor=1., lr=1e-3):
    """What a script does in a step; the loss is multiplied by `factor`."""
    for part in noisy_parts(run, DIFFUSION):
        with run.training(part):
            pred = DIFFUSION.predict(run.net, part.x_0 + part.eps, part.t)
        loss = distillation_loss(*pred, part.x_0, part.eps).mean()
        run.backward(loss=(1., factor * loss))
    run.update(lr)
    sample_grid(run, DIFFUSION)


def train(run, last=None, lr=1e-3, bad=()):
    """All steps of a run, or those before `last`; the loss of the steps `bad` is NaN."""
    for step in run:
        do_step(run, math.nan if step in bad else 1., lr)
        if step == last:
            break       # within the step: it is neither logged nor saved
    return run


def steps_in_log(run):
    return [line['step'] for line in log_of(run.logdir)]


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def assert_released(run, before):
    """Log and lock are closed; the handlers of signals are those from before."""
    assert handlers() == before and not is_locked(run.logdir) and run.log.file is None


@pytest.mark.parametrize('calls, found', [
    ('BU', '0 calls of run.training.. and 1 of run.backward.., expected 1'),
    ('TU', '1 calls of run.training.. and 0'), ('TBTBU', '2 .* and 2'), ('TBUU', 'once per step'),
    ('TB', 'step 1 ended without run.update')])
def test_wrong_order_of_calls(make, calls, found):
    """T: run.training, B: run.backward, U: run.update."""
    def forward():
        with run.training(next(run.parts())):
            pass

    run, zero = make(), torch.zeros((), requires_grad=True)
    do = dict(T=forward, B=lambda: run.backward(loss=(1., zero)), U=lambda: run.update(1e-3))
    with pytest.raises(RuntimeError, match=found):
        for _ in run:
            for name in calls:
                do[name]()


# Ends of a loop

def test_loop_that_is_left(make, capsys):
    """All is released, and the folder can be used again."""
    before, run = handlers(), make('--save_step=1')
    with pytest.raises(ZeroDivisionError):
        for step in run:
            assert is_locked(run.logdir) and not run.log.file.closed
            assert handlers() != before
            do_step(run, 1 / (2 - step))
    assert_released(run, before)
    assert 'finished' not in capsys.readouterr().out
    again = train(make())
    assert again.start == 1 and steps_in_log(again) == [1, 2, 3]    # the step had not ended
    assert_released(again, before)


def test_a_run_that_learnt_nothing_is_not_finished(make):
    run = make('--save_step=1')
    with pytest.raises(UserError, match='last 3 steps in a row .* not finite .*lower the'):
        train(run, bad=(1, 2, 3))
    assert not list(Path(run.logdir).glob('*.pt'))


def test_nothing_is_saved_before_a_step_is_applied(make, capsys):
    before, run = handlers(), make('--save_step=1')
    with pytest.raises(SystemExit, match='143'):
        for step in run:
            if step == 2:
                signal.raise_signal(signal.SIGTERM)
            do_step(run, math.nan)
    assert_released(run, before)
    assert 'SIGTERM: stopped after step 2, nothing saved' in capsys.readouterr().out
    assert not list(Path(run.logdir).glob('*.pt'))
    run = train(make('--save_step=1'), last=3, bad=[1])
    assert run.start == 0 and checkpoint.read(run.logdir)['step'] == 2
    train(make(), bad=[3])      # a resumed run saves: it has learnt before
    assert checkpoint.read(run.logdir)['step'] == 3


def test_a_step_that_is_not_finite_is_left_out(make):
    """It is counted; weights and moments are those of a run without it."""
    run = train(make('--ema_decay=0.5'), bad=[2])
    assert [line['bad_steps'] for line in log_of(run.logdir)] == [0, 1, 0]
    assert log_of(run.logdir)[1]['loss'] is None
    state = checkpoint.read(run.logdir)
    assert all(value.isfinite().all() for value in state['net_model'].values())
    assert state['step'] == 3 and state['optim']['state'][0]['step'] == 2


@pytest.mark.parametrize('bad', ['loss', 'gradient of the head'])
def test_nothing_moves_if_one_of_them_is_not_finite(make, bad):
    """A loss that overflows with a finite gradient; a gradient of one of two optimisers."""
    memory = nn.Module()
    memory.project_head = nn.Linear(1, 1)
    run = make(memory=memory)
    for _ in run:
        weights = [run.net.params[0], run.head.params[0]]
        before = [value.clone() for value in weights]
        with run.training(next(run.parts())):
            loss = sum(value.sum() for value in weights)
        loss = loss + 3e38 + 3e38 if bad == 'loss' else loss + (0 * weights[1]).sqrt().sum()
        run.backward(loss=(1., loss))
        run.update(1.)
        assert all(torch.equal(*pair) for pair in zip(weights, before))
        break


def test_weights_that_are_lost_are_not_saved(make):
    """Finite gradients and a rate that no number holds: the checkpoint before stays."""
    train(make('--save_step=1'), last=2)
    with pytest.raises(UserError, match='NaN or inf in net_model.* at step 2: nothing was saved'):
        train(make('--save_step=1'), lr=1e39)
    assert checkpoint.read(make().logdir)['step'] == 1


def test_what_a_script_reports_is_logged_in_its_step(make):
    run = make('--log_step=9')
    for step in run:
        do_step(run)
        if step == 2:
            run.reported['accuracy'] = .5
    log = [(line['step'], line.get('accuracy')) for line in log_of(run.logdir)]
    assert log == [(2, .5), (3, None)]


def test_full_disk_ends_the_log_alone(make, capsys):
    run = make()
    for step in run:
        do_step(run)
        if step == 1:
            run.log.file.close()
            run.log.file = open('/dev/full', 'w')
    out = capsys.readouterr().out
    assert 'note: the log in /dev/full ends at step 1 (No space left' in out and 'finished: ' in out
    assert checkpoint.read(run.logdir)['step'] == 3


# What a step does; values and parts of a step are checked by test_wiring.py

def test_every_student_has_noise_of_its_own(make):
    run = make()
    for _ in run:
        first, second, again = (next(noisy_parts(run, Diffusion(T))).eps for T in (8, 4, 8))
        assert torch.equal(first, again) and not torch.equal(first, second)
        break


def test_processes_drop_other_activations(make, monkeypatch):
    run, masks = make('--dropout=0.5'), []
    for _ in run:
        part = next(run.parts())
        for rank in (0, 1, 0):
            monkeypatch.setattr(distributed, 'rank', lambda: rank)
            with run.training(part):
                masks.append(dropout(torch.ones(64), .5))
        break
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize('use, step, shown', [
    ('net_model', 7, 'net_model'), ('ema_model', 7, 'ema_model'), ('ema_model', 6, 'net_model')])
def test_grids_show_the_weights_that_users_take(make, use, step, shown):
    """The average holds 0.8 % of its start after 7 steps, and 1.6 %, which is too much, after 6."""
    run, called = make('--sample_step=1', '--ema_decay=0.5', use=use), []
    for name, network in (('ema_model', run.ema), ('net_model', run.net.module)):
        network.register_forward_hook(lambda *_, name=name: called.append(name))
    run.step, run.log = step, Mock()
    sample_grid(run, DIFFUSION)
    assert called == 8 * [shown] and run.net.module.training


@pytest.mark.parametrize('main, received', [(True, 0), (False, 0), (True, signal.SIGTERM)])
def test_one_process_draws_the_grid_and_all_wait_for_it(make, monkeypatch, main, received):
    """It is drawn eight images at a time, four micro-batches; not after a signal."""
    run, sizes, barrier = make('--sample_size=9', '--sample_step=1', '--grad_accum=2'), [], Mock()
    run.net.module.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    run.step, run.log = 1, Mock()
    monkeypatch.setattr(distributed, 'barrier', barrier)
    monkeypatch.setattr(distributed, 'is_main', lambda: main)
    monkeypatch.setattr(stop, 'received', received)
    sample_grid(run, DIFFUSION)
    barrier.assert_called_once_with()
    if received or not main:
        assert not sizes and not run.log.grid.called
    else:
        assert sizes == 8 * [8] + 8 * [1]
        (_, _, images), _ = run.log.grid.call_args
        whole = DIFFUSION.sample(run.net.module.eval(), run.entries['x_T'])
        torch.testing.assert_close(images, whole, atol=1e-4, rtol=1e-4)


def test_bf16_on_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    gpu = torch.device('cuda')
    assert [precision.choose(amp, gpu) for amp in ('auto', 'none')] == ['none', 'none']
    with pytest.raises(UserError, match='--amp is bf16, which GPUs before Ampere cannot compute'):
        precision.choose('bf16', gpu)


@pytest.mark.parametrize('T, found', [(64, 'bf16'), (65, 'none')])
def test_fine_grids_are_distilled_in_float32(make, monkeypatch, capsys, T, found):
    """Under --amp auto, where bfloat16 is fast; a line names it. Base models are not concerned."""
    monkeypatch.setattr(precision, 'has_fast_bf16', lambda device: True)
    assert make('--amp=auto', T=T).amp == 'bf16'
    assert make('--amp=auto', T=T, method='pd', teacher=teacher(0)).amp == found
    assert ('--amp auto means float32' in capsys.readouterr().out) == (found == 'none')


# Resuming

def altered(run, **changes):
    """The checkpoint of a run gets other entries; those that are None are left out."""
    state = dict(checkpoint.read(run.logdir), **changes)
    checkpoint.save(f'{run.logdir}/ckpt.pt', {k: v for k, v in state.items() if v is not None})


def test_resuming_is_exact(make):
    """Weights, average, moments and log, which has every step once; grids change nothing.

    The file is one of an earlier version: it has sums of a log line, and no digests.
    """
    words, how = ['--dropout=0.5', '--ema_decay=0.5', '--grad_accum=2'], dict(teacher=teacher(0))
    whole = train(make(*words, '--sample_step=1', folder='whole', **how))
    altered(train(make(*words, '--save_step=1', **how), last=2), inputs=None,
            meter=dict(sums=dict(loss=[1., 1., 0.]), bad=0, streak=0))
    run = train(make(*words, **how))
    assert run.start == 1 and steps_in_log(run) == [1, 2, 3]
    assert_same_runs(whole.logdir, run.logdir)


def test_flags_that_may_change(make, capsys):
    """With a note of those that change the result."""
    train(make('--save_step=1'), last=2)
    run = make('--lr=2e-3', '--total_steps=4', '--dropout=0.1', '--nodistributed', '--save_step=2',
               '--data_root=there')
    assert run.start == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == ('note: resuming with other flags than before: --dropout=0.1 (was 0.0), '
                    '--lr=0.002 (was 0.001), --total_steps=4 (was 3)')


@pytest.mark.parametrize('word, more, sentence', [
    ('--seed=9', {}, 'seed is 9 and the .* with 0; give the same, or choose another --logdir'),
    ('--batch_size=8', {}, 'batch_size is 8 and the .* with 4; give'),
    ('--dataset=cifar10', {}, 'dataset is cifar10 and the .* with digits; give'),
    ('--img_size=16', {}, 'img_size is 16 and the .* with 8; give'),
    ('--mean_type=v', {}, 'mean_type is v and the .* with xstart; give'),
    ('--ema_decay=0', {}, 'has ema_model, so its run was started with other flags'),
    ('--seed=0', dict(T=4), 'holds a run with T 8, and this one has 4'),
    ('--seed=0', dict(method='pd'), 'holds a run with method base, and this one has pd'),
    ('--seed=0', dict(memory=SimpleNamespace(project_head=nn.Linear(2, 2), state_dict=dict)),
     'lacks memory, optim_head, so')])
def test_another_run_is_refused(make, word, more, sentence):
    train(make('--save_step=1', '--ema_decay=0.5'), last=2)
    with pytest.raises(UserError, match=sentence):
        make('--ema_decay=0.5', word, **more)


def test_another_teacher_or_classifier_is_refused(make, capsys):
    """Their weights are compared; of images, there is a note."""
    def student(of=0, features=2, **how):
        return make('--save_step=1', teacher=teacher(of), classifier=nn.BatchNorm2d(features),
                    **how)

    train(student(), 2)
    assert student().start == 1 and 'other images' not in capsys.readouterr().out
    with pytest.raises(UserError, match='holds a run with another teacher than the one'):
        student(of=1)
    with pytest.raises(UserError, match='holds a run with another classifier than the one'):
        student(features=3)
    student(images='second')
    assert 'note: resuming with other images than before' in capsys.readouterr().out


@pytest.mark.parametrize('changes, sentence', [
    (dict(step='x'), "whose step is 'x', expected a whole number"),
    (dict(step=-7), 'whose step is -7'),
    (dict(net_model=dict(w=torch.tensor(math.nan))), 'weights are missing or not finite; replace'),
    (dict(net_model=3), 'weights are missing or not finite'),
    (dict(net_model=None, model={}, config={}, flags=None), 'without net_model, flags, so it')])
def test_checkpoints_that_cannot_be_continued(make, changes, sentence):
    altered(train(make('--keep=0', '--total_steps=1')), **changes)
    with pytest.raises(UserError, match=sentence) as caught:
        make()
    assert '\n' not in str(caught.value) and '--logdir' in str(caught.value)


def test_tensorboard_of_a_run_that_goes_on(make, monkeypatch):
    """It shows lines and grids of both starts; readers drop what a new start repeats."""
    writer = Mock()
    monkeypatch.setattr('tensorboardX.SummaryWriter', writer)
    train(make('--save_step=2', '--sample_step=2'), last=3)
    run = train(make('--total_steps=4', '--sample_step=2'))
    assert writer.call_args_list == [call(run.logdir, purge_step=step) for step in (1, 3)]
    board = writer()
    scalars = [call(f'train/{name}', value, line['step']) for line in log_of(run.logdir)
               for name, value in line.items() if name != 'step']
    assert [it for it in board.add_scalar.call_args_list if it in scalars] == scalars
    assert call('train/lr', .001, 1) in scalars and steps_in_log(run) == [1, 2, 3, 4]
    assert board.add_image.call_args_list == [
        call('samples', ANY, step, dataformats='HWC') for step in (2, 4)]
    (_, text, step), _ = board.add_text.call_args
    assert step == 2 and '    --total_steps=4\n' in text and '    --batch_size=4\n' in text
    assert {path.name for path in Path(run.logdir).glob('sample/*')} == {'2.png', '4.png'}
