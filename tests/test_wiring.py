"""Whole steps of the training scripts against the formulas in float64, for every flag that acts.

Every case is a run of a script (in a fork, under record.py). Each of its steps is computed again
from the checkpoint before it: losses, gradient norm, rate, new weights, averages, moments, queue.
"""

import functools
import shutil

import pytest
import torch

import oracle
from helpers import assert_ran, assert_same, command, fork_all, log_of
from runtime import seeding
from wiring import NET, load, make_inputs, make_photos, near, photos, words

TRAINING = dict(
    NET, dataset='digits', img_size=8, batch_size=8, num_workers=0, sample_size=4, log_step=1,
    save_step=1, keep=9, sample_step=0, total_steps=2, seed=0, grad_accum=1, dropout=0., warmup=0,
    lr=1e-3, wd=0.02, ema_decay=0., mean_type='xstart', conditional=False)
BASE = dict(TRAINING, script='train_base.py', T=8, time_scale=1, loss_type='both', warmup=3,
            ema_decay=0.5, grad_clip=0.3)
PD = dict(TRAINING, script='PD.py', loss_type='both', grad_clip=0.02, base_ckpt='teacher')
RDD = dict(
    TRAINING, script='train_rdd.py', grad_clip=0.02, base_ckpt='teacher',
    classifier='convnet_small', classifier_path='classifier', feature=True, feature_weight=0.7,
    temperature=0.5, loss_type='mp2p', intra_weight=1.3, intra_temperature=0.2, relation_group=2,
    memory_weight=0.4, contrast_temperature=0.2, queue_size=16, queue_update=10, contrast_size=12,
    queue_layout='pixels', alpha=0.3, beta=0.6, logits=True, logits_weight=0.8, gt=True,
    gt_weight=0.9)

# name of a case: what it changes. The values of a script's numbers are unlike its defaults in
# `plain`, and all others in `other`. One step where a second one adds nothing.
ONE = dict(total_steps=1)
OTHER = dict(lr=3e-3, wd=0.05, grad_clip=0., ema_decay=0.9, total_steps=3, seed=1)
DROPOUT = dict(grad_accum=2, dropout=0.4, seed=1)      # masks of their own in every part
CHANGES = dict(
    base=dict(
        plain={}, other=dict(OTHER, warmup=0), parts=DROPOUT,
        v=dict(ONE, mean_type='v', dataset='folder', data_root='photos'),
        epsilon=dict(ONE, mean_type='epsilon', batch_size=4),
        labels=dict(ONE, conditional=True, loss_type='x', T=4, time_scale=2),
        times=dict(ONE, loss_type='eps', batch_size=56)),
    pd=dict(
        plain={}, other=dict(OTHER, warmup=2), parts=dict(DROPOUT, base_ckpt='coarse'),
        v=dict(ONE, mean_type='v', base_ckpt='epsilon', loss_type='eps'),
        labels=dict(ONE, conditional=True, base_ckpt='labels', loss_type='x')),
    rdd=dict(
        plain={}, parts=dict(grad_accum=2), other=dict(
            OTHER, warmup=2, feature_weight=1.5, temperature=2., intra_weight=0.5,
            intra_temperature=0.6, relation_group=4, memory_weight=0.25, contrast_temperature=0.15,
            queue_size=24, queue_update=5, contrast_size=8, alpha=0.15, beta=0.2,
            logits_weight=0.35, gt_weight=0.55, classifier_normalisation='05'),
        released=dict(queue_layout='released', total_steps=3, relation_group=0, batch_size=16,
                      grad_accum=2),
        epsilon=dict(ONE, mean_type='epsilon', base_ckpt='epsilon', loss_type='none', alpha=0.),
        is_p2p=dict(ONE, loss_type='is_p2p', base_ckpt='coarse', relation_group=8, logits=False),
        m_p2p=dict(ONE, loss_type='m_p2p', feature=False, gt=False, conditional=True,
                   base_ckpt='labels'),
        group_parts=dict(ONE, relation_group=0, batch_size=4, grad_accum=4)))
CASES = {f'{method}-{name}': dict(first, **change)
         for method, first in (('base', BASE), ('pd', PD), ('rdd', RDD))
         for name, change in CHANGES[method].items()}
# the same once more as the second half of a run that began with other flags
RESUMED = {'base': dict(BASE, total_steps=3), 'rdd': dict(RDD, total_steps=3)}
BEFORE = dict(lr=5e-3, wd=0.1, total_steps=1)
TWO = 'base-plain', 'pd-plain', 'rdd-parts'    # also on two processes


def recorded(flags, folder, name, **how):
    """A command that runs the script of `flags` into folder/name."""
    argv = ['tests/record.py', str(folder / f'{name}.record'), flags['script'],
            *words(flags, folder), f'--logdir={folder / name}']
    return command(argv, env=dict(XDG_CACHE_HOME=str(folder)), **how)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The runs of all cases, each in a folder with its name."""
    folder = tmp_path_factory.mktemp('wiring')
    make_inputs(folder)
    make_photos(folder / 'photos')
    jobs = {case: [recorded(flags, folder, case)] for case, flags in CASES.items()}
    for case in TWO:
        jobs[f'{case}_two'] = [recorded(CASES[case], folder, f'{case}_two', ranks=2)]
    for name, flags in RESUMED.items():
        jobs[f'{name}_resumed'] = [recorded(dict(flags, **change), folder, f'{name}_resumed')
                                   for change in (BEFORE, {})]
    jobs['bf16'] = [recorded(dict(CASES['rdd-plain'], amp='bf16'), folder, 'bf16')]
    for results in fork_all(jobs).values():
        assert_ran(results)
    yield folder
    shutil.rmtree(str(folder))


def frozen_networks(folder, flags, N):
    """(teacher, its checkpoint, classifier) of a case; None where its script has none."""
    if flags['script'] == 'train_base.py':
        return None, None, None
    state = load(folder / flags['base_ckpt'] / 'ckpt.pt')
    teacher = oracle.unet(state.get('ema_model', state['net_model']), N, flags['conditional'])
    if flags['script'] == 'PD.py':
        return teacher.requires_grad_(False), state, None
    stored = load(folder / 'classifier/ckpt.pt')
    half = 3 * [0.5] if 'classifier_normalisation' in flags else None
    features = oracle.classifier(stored, half or stored['mean'], half or stored['std'])
    return teacher.requires_grad_(False), state, features


def check_steps(folder, name, flags, start=0):
    """Every step of a run against the oracle, and the draws it was made of."""
    record, log = load(folder / f'{name}.record'), log_of(folder / name)
    assert sorted(record['steps']) == list(range(start + 1, flags['total_steps'] + 1))
    time_scale = flags.get('time_scale', 1)
    N = flags.get('T', 8) * time_scale
    teacher, of_teacher, features = frozen_networks(folder, flags, N)
    if teacher:
        time_scale = 2 * of_teacher['time_scale']
        weights = of_teacher.get('ema_model', of_teacher['net_model'])
        assert start or all(torch.equal(value, record['initial']['net_model'][key])
                            for key, value in weights.items())
    images, labels = photos(folder / 'photos') if flags['dataset'] == 'folder' else digits()
    before = load(folder / f'{name}/ckpt_{start}.pt') if start else record['initial']
    for step, given in sorted(record['steps'].items()):
        check_draws(given['parts'], flags, N, time_scale, images, labels)
        after = load(folder / f'{name}/ckpt_{step}.pt')
        logged, expected = oracle.expected_step(
            flags, step, before, given['parts'], given.get('chosen'),
            after.get('memory', {}).get('contrast'), teacher,
            of_teacher and of_teacher['mean_type'], features, time_scale // 2, N)
        logged.update(step=step, bad_steps=0)
        assert set(log[step - 1]) == set(logged)
        for key, value in logged.items():
            assert log[step - 1][key] == pytest.approx(value, rel=3e-4, abs=1e-6), (step, key)
        check_optimised(before['net_model'], after['net_model'], after['optim'],
                        expected['moments'], logged['lr'], step)
        assert ('ema_model' in after) == (flags['ema_decay'] > 0)
        decay = flags['ema_decay']
        for key in after.get('ema_model', ()):
            mixed = decay * oracle.double(before['ema_model'][key]) + (
                1 - decay) * oracle.double(after['net_model'][key])
            assert (after['ema_model'][key] - mixed).abs().max() < 1e-6, key
        assert ('memory' in after) == ('queue' in expected)
        if 'queue' in expected:
            check_memory(before['memory'], after, expected, flags, step, given)
        assert (after['T'], after['time_scale']) == (N // time_scale, time_scale)
        before = after
    check_fresh(list(record['steps'].values()))


def check_optimised(before, after, optim, expected, lr, step):
    """Moments as expected, and weights that moved as their own moments say.

    The classifier has ReLUs: a pixel that is 0 but for rounding changes a gradient a little. Adam
    divides a gradient by its size: one that is 0 but for rounding moves weights as much as any
    other, so that the weights themselves cannot be compared with the oracle's.
    """
    largest = max(m.norm() for m, _ in expected.values())
    assert len(optim['state']) == len(expected)
    for i, (name, (m, v)) in enumerate(expected.items()):
        found = optim['state'][i]
        assert found['step'] == step
        assert near(found['exp_avg'], m, 1e-2, 1e-3 * largest), name
        assert near(found['exp_avg_sq'], v, 2e-2, 1e-6 * largest ** 2), name
        m = oracle.double(found['exp_avg']) / (1 - 0.9 ** step)
        v = oracle.double(found['exp_avg_sq']) / (1 - 0.999 ** step)
        old, new = oracle.double(before[name]), oracle.double(after[name])
        assert near(new - old, -lr * m / (v.sqrt() + 1e-8), 1e-3, 1e-6 * (1 + old.norm())), name


def check_memory(before, after, expected, flags, step, given):
    memory = after['memory']
    assert (memory['queue'] - expected['queue']).abs().max() < 1e-4
    assert memory['_extra_state'] == dict(pointer=expected['pointer'],
                                          layout=flags['queue_layout'])
    assert len(memory['queue']) == flags['queue_size']
    assert len(memory['contrast']) == flags['contrast_size']
    assert torch.equal(memory['contrast'], before['contrast']) == (
        flags['queue_layout'] == 'released')
    assert len(given['chosen']) == flags['queue_update']
    for what, value in zip(('mean', 'var'), expected['running']):
        assert near(memory[f'project_head.1.running_{what}'], value, 1e-4)
    check_optimised(before, memory, after['optim_head'], expected['head_moments'], flags['lr'],
                    step)


def check_draws(parts, flags, N, time_scale, images, labels):
    """Shapes, rows and ranges of what a step is made of; images and labels of the data set."""
    size = flags['batch_size'] // flags['grad_accum']
    assert [part['rows'] for part in parts] == [
        slice(i * size, (i + 1) * size) for i in range(flags['grad_accum'])]
    first = 0 if flags['script'] == 'train_base.py' else time_scale
    if flags['dataset'] == 'folder':        # of which half are mirrored
        images, labels = torch.cat([images, images.flip(3)]), labels.repeat(2)
    for part in parts:
        assert len(part['x_0']) == len(part['t']) == len(part['y']) == size
        assert all(first <= t <= N and t % time_scale == 0 for t in part['t'].tolist())
        assert size < 32 or len(part['t'].unique()) == (N - first) // time_scale + 1    # all
        assert 0.5 < part['eps'].std() < 1.5
        for x, y in zip(part['x_0'], part['y']):
            same = (images == x).flatten(1).all(1).nonzero().flatten().tolist()
            assert same and y in labels[same]


def check_fresh(steps):
    """No step is made of what the one before was made of."""
    draws = [[given['parts'][0]['x_0'], given['parts'][0]['eps']]
             + [given[key] for key in ('chosen',) if key in given] for given in steps]
    for one, other in zip(draws, draws[1:]):
        assert not any(torch.equal(a, b) for a, b in zip(one, other))


def draws(folder, name, step):
    """Images, labels, times and noise of a step, its parts put together."""
    parts = load(folder / f'{name}.record')['steps'][step]['parts']
    return {key: torch.cat([part[key] for part in parts]) for key in ('x_0', 'y', 't', 'eps')}


@functools.lru_cache(None)
def digits():
    """scikit-learn's digits as (N, 3, 8, 8) in [-1, 1], and labels."""
    from sklearn.datasets import load_digits
    found = load_digits()
    grey = torch.from_numpy(found.images * 255 / 16).round().float()
    return (grey / 127.5 - 1)[:, None].expand(-1, 3, -1, -1), torch.from_numpy(found.target)


@pytest.mark.parametrize('case', list(CASES))
def test_steps(folder, case):
    check_steps(folder, case, CASES[case])


@pytest.mark.parametrize('case', ['base-other', 'pd-other', 'rdd-other'])
def test_seed_is_in_everything(folder, case):
    """Another seed: other images, noise and pixels; another network, or head and queue."""
    one, two = (load(folder / f'{name}.record') for name in (case, case.split('-')[0] + '-plain'))
    check_fresh([one['steps'][1], two['steps'][1]])
    one, two = one['initial'], two['initial']
    if case == 'base-other':
        assert not torch.equal(one['net_model']['head.weight'], two['net_model']['head.weight'])
    if 'memory' in one:
        one, two = one['memory'], two['memory']
        assert not torch.equal(one['project_head.0.weight'], two['project_head.0.weight'])
        assert not torch.equal(one['queue'][:8], two['queue'][:8])


@pytest.mark.parametrize('name', list(RESUMED))
def test_resumed_with_other_flags(folder, name):
    """Rates and weight decay of the command, moments of the file, for both optimisers."""
    check_steps(folder, f'{name}_resumed', RESUMED[name], start=1)


def test_parts_are_rows_of_one_batch(folder):
    for step in (1, 2):
        assert_same(draws(folder, 'rdd-parts', step), draws(folder, 'rdd-plain', step))


@pytest.mark.parametrize('one', TWO)
def test_two_processes(folder, one):
    """Losses, gradients, queue and running averages are those of the whole batch."""
    a, b = log_of(folder / one), log_of(folder / f'{one}_two')
    assert len(a) == len(b)
    for ours, theirs in zip(a, b):
        assert theirs == pytest.approx(ours, rel=1e-3)
    a, b = (load(folder / name / 'ckpt.pt') for name in (one, f'{one}_two'))
    for key in ('optim', 'optim_head'):
        for i, entry in a.get(key, dict(state={}))['state'].items():
            largest = max(e['exp_avg'].norm() for e in a[key]['state'].values())
            assert near(b[key]['state'][i]['exp_avg'], entry['exp_avg'], 2e-2, 2e-3 * largest)
    if 'memory' in a:
        for key in ('queue', 'contrast', 'project_head.1.running_mean',
                    'project_head.1.running_var'):
            assert near(b['memory'][key].float(), a['memory'][key].float(), 2e-2), key


def test_bf16(folder):
    """Networks in bfloat16 give other losses, though not by much."""
    exact, ours = (log_of(folder / name)[0] for name in ('rdd-plain', 'bf16'))
    for key in ('loss', 'loss_intra', 'loss_pd', 'grad_norm'):
        assert 1e-5 < abs(ours[key] / exact[key] - 1) < 0.1, key


def test_streams():
    """Another key is another stream, also with the same numbers in another order."""
    keys = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2), (2, 0, 0), (1, 1, 0), (1, 0, 1), (3, 0, 0)]
    assert len({seeding.mix(*key) for key in keys}) == len(keys)
    names = ('WEIGHTS', 'ORDER', 'FLIP', 'NOISE', 'DROPOUT', 'CONTRAST', 'PIXELS', 'SAMPLES',
             'LABELS', 'CROP', 'AUGMENT')
    assert len({getattr(seeding, name) for name in names}) == len(names)
    a = seeding.noise_of_images(3, range(4), (3, 2, 2), 'cpu')
    assert torch.equal(a[2:], seeding.noise_of_images(3, [2, 3], (3, 2, 2), 'cpu'))
