"""Whole steps of the training scripts against the formulas in float64, for every flag that acts.

Every case is a run of a script. Each of its steps is computed again from the checkpoint before it:
losses, gradient norm, rate, new weights, averages, moments, queue.
"""

import shutil

import pytest
import torch

import oracle
from helpers import assert_ran, fork_all, log_of
from runtime import checkpoint, seeding
from wiring import make_inputs, near, started

TRAINING = dict(
    oracle.NET, dataset='digits', data_root='photos', img_size=8, batch_size=8, num_workers=0,
    sample_size=4, log_step=1, save_step=1, keep=9, sample_step=0, total_steps=2, seed=0,
    grad_accum=1, dropout=0., warmup=0, lr=1e-3, wd=0.02, ema_decay=0., mean_type='xstart',
    conditional=False)
# a new network predicts almost 0: a large rate makes it matter from the second step on
BASE = dict(TRAINING, script='train_base.py', T=8, time_scale=1, loss_type='both', warmup=3,
            lr=0.03, ema_decay=0.5, grad_clip=0.3)
PD = dict(TRAINING, script='PD.py', loss_type='both', grad_clip=0.02, base_ckpt='teacher')
RDD = dict(
    TRAINING, script='train_rdd.py', grad_clip=0.02, base_ckpt='teacher',
    classifier='convnet_small', classifier_path='classifier', classifier_normalisation='stored',
    feature=True, feature_weight=0.7, temperature=0.5, loss_type='mp2p', intra_weight=1.3,
    intra_temperature=0.25, relation_group=2, memory_weight=0.4, contrast_temperature=0.2,
    queue_size=16, queue_update=10, contrast_size=12, queue_layout='pixels', alpha=0.3, beta=0.6,
    logits=True, logits_weight=0.8, gt=True, gt_weight=0.9)

# name of a case: what it changes. The values of a script's numbers are unlike its defaults in
# `plain`. One step where a second one adds nothing.
ONE = dict(total_steps=1)
OTHER = dict(grad_clip=0., ema_decay=0.9, total_steps=3, seed=1)
DROPOUT = dict(grad_accum=2, dropout=0.4, seed=1)      # masks of their own in every part
CHANGES = dict(
    base=dict(
        plain={}, other=dict(OTHER, warmup=0), parts=DROPOUT,
        v=dict(mean_type='v', dataset='folder'),
        epsilon=dict(mean_type='epsilon', batch_size=4),
        labels=dict(conditional=True, loss_type='x', T=4, time_scale=2), eps=dict(loss_type='eps')),
    pd=dict(
        plain={}, other=dict(OTHER, warmup=2), parts=dict(DROPOUT, base_ckpt='coarse'),
        v=dict(ONE, mean_type=None, base_ckpt='epsilon', loss_type='eps'),     # the default
        labels=dict(ONE, conditional=True, base_ckpt='labels', loss_type='x')),
    rdd=dict(
        plain={}, parts=dict(grad_accum=2),
        other=dict(OTHER, warmup=2, relation_group=4, queue_size=24, contrast_size=8,
                   classifier_normalisation='05'),
        released=dict(queue_layout='released', total_steps=3, relation_group=0, batch_size=16,
                      grad_accum=2),
        epsilon=dict(ONE, mean_type='epsilon', base_ckpt='epsilon', loss_type='none', alpha=0.),
        is_p2p=dict(ONE, loss_type='is_p2p', base_ckpt='coarse', relation_group=8, logits=False),
        m_p2p=dict(ONE, loss_type='m_p2p', feature=False, gt=False, conditional=True,
                   base_ckpt='labels'),
        group_parts=dict(ONE, relation_group=0, batch_size=4, grad_accum=2)))
CASES = {f'{method}-{name}': dict(first, **change)
         for method, first in (('base', BASE), ('pd', PD), ('rdd', RDD))
         for name, change in CHANGES[method].items()}
# a run that began with other flags
CASES.update({'base-resumed': dict(BASE, total_steps=3), 'rdd-resumed': dict(RDD, total_steps=3)})
BEFORE = dict(lr=5e-3, wd=0.1, total_steps=1)
TWO = 'base-plain', 'pd-plain', 'rdd-parts'    # also on two processes


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The runs of all cases, each in a folder with its name."""
    folder = tmp_path_factory.mktemp('wiring')
    make_inputs(folder)

    def run(name, flags, **how):
        return started(folder, dict(flags, logdir=name), **how)

    jobs = {}
    for case, flags in CASES.items():
        first = [run(case, dict(flags, **BEFORE))] if case.endswith('resumed') else []
        jobs[case] = [*first, run(case, flags)]
    for case in TWO:
        jobs[f'{case}_two'] = [run(f'{case}_two', CASES[case], ranks=2)]
    jobs['bf16'] = [run('bf16', dict(CASES['rdd-plain'], amp='bf16'))]
    for results in fork_all(jobs).values():
        assert_ran(results)
    yield folder
    shutil.rmtree(str(folder))


@pytest.mark.parametrize('name', [*CASES, *(f'{case}_two' for case in TWO)])
def test_steps(folder, name):
    flags = CASES[name.replace('_two', '')]
    run, log = oracle.Training(folder, flags), log_of(folder / name)
    start, decay = int(name.endswith('resumed')), flags['ema_decay']
    before = checkpoint.read(folder / f'{name}/ckpt_1.pt') if start else run.first_state()
    assert [line['step'] for line in log] == list(range(1, flags['total_steps'] + 1))
    for step in range(start + 1, flags['total_steps'] + 1):
        after = checkpoint.read(folder / f'{name}/ckpt_{step}.pt')
        logged, network, memory = run.step(step, before)
        logged.update(step=step, bad_steps=0)
        assert set(log[step - 1]) == set(logged)
        for key, value in logged.items():
            assert log[step - 1][key] == pytest.approx(value, rel=3e-4, abs=1e-6), (step, key)
        states = [state[key] for key in ('net_model', 'optim') for state in (before, after)]
        check_optimised(network, *states, logged['lr'], flags['wd'], step)
        assert ('ema_model' in after) == (decay > 0)
        for key in after.get('ema_model', ()):
            new, old = after['net_model'][key].double(), before['ema_model'][key].double()
            assert (after['ema_model'][key] - new.lerp(old, decay)).abs().max() < 1e-6, key
        assert ('memory' in after) == (memory is not None)
        if memory:
            check_memory(memory, after['memory'])
            states = [state[key] for key in ('memory', 'optim_head') for state in (before, after)]
            check_optimised(memory, *states, flags['lr'], flags['wd'], step)
        assert (after['T'], after['time_scale']) == (run.grid.T, run.grid.time_scale)
        before = after


def check_optimised(network, before, after, optim_before, optim, lr, wd, step):
    """Moments as expected, and weights that moved as their own moments say.

    The classifier has ReLUs: a pixel that is 0 but for rounding changes a gradient a little. Adam
    divides a gradient by its size: one that is 0 but for rounding moves weights as much as any
    other, so that the weights themselves cannot be compared with the oracle's.
    """
    expected = oracle.moments(network, optim_before, wd)
    largest = max(m.norm() for m, _ in expected.values())
    assert len(optim['state']) == len(expected)
    for i, (name, (m, v)) in enumerate(expected.items()):
        found = optim['state'][i]
        assert found['step'] == step
        assert near(found['exp_avg'], m, 1e-2, 1e-3 * largest), name
        assert near(found['exp_avg_sq'], v, 2e-2, 1e-6 * largest ** 2), name
        m = found['exp_avg'].double() / (1 - 0.9 ** step)
        v = found['exp_avg_sq'].double() / (1 - 0.999 ** step)
        old, new = before[name].double(), after[name].double()
        assert near(new - old, -lr * m / (v.sqrt() + 1e-8), 1e-3, 1e-6 * (1 + old.norm())), name


def check_memory(expected, found):
    assert (found['queue'] - expected.queue).abs().max() < 1e-4
    assert found['_extra_state'] == expected.get_extra_state()
    assert torch.equal(found['contrast'], expected.contrast)
    for key in ('running_mean', 'running_var'):
        assert near(found[f'project_head.1.{key}'], getattr(expected.project_head[1], key), 1e-4)


def test_bf16(folder):
    """Networks in bfloat16 give other losses, though not by much."""
    exact, ours = (log_of(folder / name)[0] for name in ('rdd-plain', 'bf16'))
    for key in ('loss', 'loss_intra', 'loss_pd', 'grad_norm'):
        assert 1e-5 < abs(ours[key] / exact[key] - 1) < 0.1, key


def test_no_noise_comes_twice():
    """For another image or another seed."""
    x_T = [seeding.noise_of_images(seed, range(4), (3, 2, 2), 'cpu') for seed in (0, 1)]
    assert len(torch.cat(x_T).flatten(1).unique(dim=0)) == 8
