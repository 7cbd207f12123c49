"""Whole steps of the training scripts against the formulas in float64, for every flag that acts.

Every case is a run of a script (in a fork, under record.py). Each of its steps is computed again
from the checkpoint before it: losses, gradient norm, rate, new weights, averages, moments, queue.
A case that changes a flag must also end in another result than the case without the change.
"""

import functools
import json
import shutil

import pytest
import torch

import oracle
from helpers import command, fork_all
from runtime import checkpoint, log, run, seeding
from wiring import NET, alike, load, make_inputs, make_photos, near, photos, teacher_of, words

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
    memory_weight=0.4,
    contrast_temperature=0.2, queue_size=16, queue_update=10, contrast_size=12,
    queue_layout='pixels', alpha=0.3, beta=0.6, logits=True, logits_weight=0.8, gt=True,
    gt_weight=0.9)

# name of a case: what it changes
SHARED = dict(
    lr=dict(lr=3e-3), wd=dict(wd=0.), grad_clip=dict(grad_clip=0.), dropout=dict(dropout=0.4),
    grad_accum=dict(grad_accum=2), seed=dict(seed=1), batch_size=dict(batch_size=4),
    total_steps=dict(total_steps=3), conditional=dict(conditional=True),
    mean_type=dict(mean_type='epsilon'))
CHANGES = dict(
    base=dict(SHARED, loss_type_x=dict(loss_type='x'), loss_type_eps=dict(loss_type='eps'),
              warmup=dict(warmup=0), ema_decay=dict(ema_decay=0.9), T=dict(T=4),
              time_scale=dict(T=4, time_scale=2),
              times=dict(batch_size=56, total_steps=1),
              folder=dict(dataset='folder', data_root='photos')),
    pd=dict(SHARED, loss_type_x=dict(loss_type='x'), loss_type_eps=dict(loss_type='eps'),
            warmup=dict(warmup=2), ema_decay=dict(ema_decay=0.9), grid=dict(base_ckpt='coarse'),
            times=dict(batch_size=32, total_steps=1)),
    rdd=dict(
        SHARED, warmup=dict(warmup=2), ema_decay=dict(ema_decay=0.9),
        grid=dict(base_ckpt='coarse'), feature=dict(feature=False),
        feature_weight=dict(feature_weight=1.5), temperature=dict(temperature=1.),
        is_p2p=dict(loss_type='is_p2p'), m_p2p=dict(loss_type='m_p2p'), none=dict(loss_type='none'),
        intra_weight=dict(intra_weight=0.5), intra_temperature=dict(intra_temperature=0.5),
        relation_group=dict(relation_group=4), relation_group_whole=dict(relation_group=8),
        relation_group_quarter=dict(relation_group=0, batch_size=16),
        relation_group_parts=dict(relation_group=0, batch_size=4, grad_accum=4),
        memory_weight=dict(memory_weight=0.1), queue_size=dict(queue_size=24),
        contrast_temperature=dict(contrast_temperature=0.1), queue_update=dict(queue_update=5),
        contrast_size=dict(contrast_size=8), queue_layout=dict(queue_layout='released'),
        alpha=dict(alpha=0.1), no_alpha=dict(alpha=0.), beta=dict(beta=0.2),
        logits=dict(logits=False), logits_weight=dict(logits_weight=0.3), gt=dict(gt=False),
        gt_weight=dict(gt_weight=0.3), normalisation=dict(classifier_normalisation='05')))
TOO_MUCH = ('rdd-wd', 'rdd-grad_clip', 'rdd-ema_decay', 'rdd-batch_size', 'rdd-dropout')
# `Run` reads the flags of TOO_MUCH for all three scripts; the cases of base and PD see them
CASES = {f'{method}-{name}': dict(first, **change)
         for method, first in (('base', BASE), ('pd', PD), ('rdd', RDD))
         for name, change in dict(plain={}, **CHANGES[method]).items()
         if f'{method}-{name}' not in TOO_MUCH}
# the same cases once more as the second half of a run that began with other flags
RESUMED = {'base': dict(BASE, total_steps=3), 'rdd': dict(RDD, total_steps=3)}
BEFORE = dict(lr=5e-3, wd=0.1, total_steps=1)
TWO = ('rdd-plain', 'rdd-grad_accum', 'base-dropout', 'pd-plain')   # also on two processes


def recorded(flags, folder, name):
    """A command that runs the script of `flags` into folder/name."""
    record = ['tests/record.py', str(folder / f'{name}.record'), flags['script']]
    return command([*record, *words(flags, folder), f'--logdir={folder / name}'],
                   env=dict(XDG_CACHE_HOME=str(folder)))


@pytest.fixture(scope='module')
def folder(request, tmp_path_factory):
    """All runs that the selected tests need."""
    folder = tmp_path_factory.mktemp('wiring')
    make_inputs(folder)
    make_photos(folder / 'photos')
    here = [item for item in request.session.items if item.fspath == request.node.fspath]
    wanted = {item.callspec.params.get('case') for item in here if hasattr(item, 'callspec')}
    wanted |= {f'{case.split("-")[0]}-plain' for case in wanted if case}
    names = {item.originalname for item in here}
    wanted |= set(TWO) if 'test_two_processes' in names else set()
    if 'test_resumed_with_other_flags' in names:
        wanted |= {'base-total_steps', 'rdd-total_steps'}
    wanted |= {'rdd-plain'} if 'test_bf16' in names else set()
    wanted |= {'base-plain'} if 'test_resolved_flags' in names else set()
    jobs = {case: [recorded(flags, folder, case)] for case, flags in CASES.items()
            if case in wanted}
    if 'test_two_processes' in names:
        for case in TWO:
            jobs[f'{case}_two'] = [dict(recorded(CASES[case], folder, f'{case}_two'), ranks=2)]
    if 'test_resumed_with_other_flags' in names:
        for name, flags in RESUMED.items():
            jobs[f'{name}_resumed'] = [recorded(dict(flags, **BEFORE), folder, f'{name}_resumed'),
                                       recorded(flags, folder, f'{name}_resumed')]
    if 'test_until' in names:
        flags = dict(PD, until=1, save_step=0)
        jobs['until'] = [command(['PD.py', *words(flags, folder), f'--logdir={folder / "until"}'])]
        flags = dict(CASES['rdd-plain'], until=2, total_steps=1, save_step=0)
        script = flags.pop('script')
        jobs['until_rdd'] = [command([script, *words(flags, folder),
                                      f'--logdir={folder / "until_rdd"}'])]
    if 'test_weights_that_are_lost' in names:
        flags = dict(BASE, warmup=0)
        jobs['lost'] = [recorded(dict(flags, total_steps=1), folder, 'lost'),
                        recorded(dict(flags, lr=1e39), folder, 'lost')]
    if 'test_bf16' in names:
        flags = dict(CASES['rdd-plain'], amp='bf16')
        jobs['bf16'] = [command([flags['script'], *words(flags, folder),
                                 f'--logdir={folder / "bf16"}'])]
    results = fork_all(jobs)
    for name, of_job in results.items():
        for i, (code, _, err) in enumerate(of_job):
            assert code == (1 if (name, i) == ('lost', 1) else 0), (name, err)
    if 'lost' in results:
        (folder / 'lost/said').write_text(results['lost'][1][2])
    yield folder
    shutil.rmtree(str(folder))


def log_of(folder, case):
    return {line['step']: line for line in
            map(json.loads, (folder / case / 'metrics.jsonl').read_text().splitlines())}


def check_named(found, expected, rtol, floor):
    wrong = [name for name, value in expected.items() if not near(found[name], value, rtol, floor)]
    assert not wrong, wrong


def check_moments(saved, expected, step):
    """Those of an optimiser, in the order of the parameters; together they know the gradient.

    The classifier has ReLUs: a pixel that is 0 but for rounding changes a gradient a little.
    """
    largest = max(m.norm() for m, _ in expected.values())
    for i, (name, (m, v)) in enumerate(expected.items()):
        assert near(saved['state'][i]['exp_avg'], m, 1e-2, 1e-3 * largest), name
        assert near(saved['state'][i]['exp_avg_sq'], v, 2e-2, 1e-6 * largest ** 2), name
        assert saved['state'][i]['step'] == step
    assert len(saved['state']) == len(expected)


def check_update(before, after, saved, weights, lr, step, keys=None):
    """Weights that were changed as their own moments say, and as those of the oracle say.

    Adam divides a gradient by its size, so a gradient that is 0 but for rounding moves weights by
    as much as any other; only the sum over all weights is compared with the oracle.
    """
    far = near_all = 0.
    for i, (name, expected) in enumerate(weights.items()):
        key = (keys or {}).get(name, name)
        moments = saved['state'][i]
        m = oracle.double(moments['exp_avg']) / (1 - 0.9 ** step)
        v = oracle.double(moments['exp_avg_sq']) / (1 - 0.999 ** step)
        old, new = oracle.double(before[key]), oracle.double(after[key])
        move = lr * m / (v.sqrt() + 1e-8)
        assert near(new - old, -move, 1e-3, 1e-6 * (1 + old.norm())), name
        far += ((new - expected) ** 2).sum().item()
        near_all += ((expected - old) ** 2).sum().item()
    assert far < 0.05 ** 2 * near_all


def check_steps(folder, name, flags, start=0, every=True):
    """Every step of a run, or the last one, against the oracle, and the draws it was made of."""
    record = load(folder / f'{name}.record')
    log, teacher, features = log_of(folder, name), None, None
    assert sorted(record['steps']) == list(range(start + 1, flags['total_steps'] + 1))
    N, time_scale = 8, 1
    if flags['script'] == 'train_base.py':
        time_scale, N = flags['time_scale'], flags['T'] * flags['time_scale']
    else:
        of_teacher = load(folder / teacher_of(flags) / 'ckpt.pt')
        weights = of_teacher.get('ema_model', of_teacher['net_model'])
        teacher = oracle.unet(weights, N, flags['conditional']).requires_grad_(False)
        time_scale = 2 * of_teacher['time_scale']
        if not start:
            assert all(torch.equal(value, record['initial']['net_model'][key])
                       for key, value in weights.items())
    if flags['script'] == 'train_rdd.py':
        state = load(folder / 'classifier/ckpt.pt')
        half = 3 * [0.5] if 'classifier_normalisation' in flags else None
        features = oracle.classifier(state, half or state['mean'], half or state['std'])
    before = record['initial'] if not start else load(
        folder / f'{name}/ckpt_{start}.pt')
    for step in range(start + 1, flags['total_steps'] + 1):
        given = record['steps'][step]
        images, labels = photos(folder / 'photos') if flags['dataset'] == 'folder' else digits()
        check_draws(given['parts'], flags, N, time_scale, images, labels)
        after = load(folder / f'{name}/ckpt_{step}.pt')
        if not every and step < flags['total_steps']:
            before = after
            continue
        logged, expected = oracle.expected_step(
            flags, step, before, given['parts'], given.get('chosen'), given.get('contrast'),
            teacher, features, time_scale // 2, N)
        found = {key: value for key, value in log[step].items() if key not in (
            'step', 'bad_steps', 'images_per_s', 'memory_mb')}
        assert set(found) == set(logged)
        for key, value in logged.items():
            assert found[key] == pytest.approx(value, rel=3e-4, abs=1e-6), (step, key)
        assert log[step]['bad_steps'] == 0
        check_moments(after['optim'], expected['moments'], step)
        check_update(before['net_model'], after['net_model'], after['optim'],
                     expected['net_model'], logged['lr'], step)
        assert ('ema_model' in after) == ('ema_model' in expected)
        if 'ema_model' in expected:
            decay = flags['ema_decay']
            for key in expected['ema_model']:
                mixed = decay * oracle.double(before['ema_model'][key]) + (
                    1 - decay) * oracle.double(after['net_model'][key])
                assert (after['ema_model'][key] - mixed).abs().max() < 1e-6, key
        assert ('memory' in after) == ('head' in expected)
        if 'head' in expected:
            check_memory(before['memory'], after, expected, flags, step, given)
        assert (after['T'], after['time_scale']) == (N // time_scale, time_scale)
        before = after
    check_fresh(record['steps'], flags)


def check_fresh(steps, flags):
    """No step is made of what another was made of."""
    draws = [[given['parts'][0][key] for key in ('x_0', 'eps')] + (given['parts'][0]['noise'] or [])
             + [given[key] for key in ('chosen', 'contrast') if key in given
                and (key, flags['queue_layout']) != ('contrast', 'released')]
             for given in steps.values()]
    for one, other in zip(draws, draws[1:]):
        assert not any(torch.equal(a, b) for a, b in zip(one, other))


def check_memory(before, after, expected, flags, step, given):
    memory = after['memory']
    assert near(memory['queue'], expected['queue'], 1e-4)
    assert (memory['queue'] - expected['queue']).abs().max() < 1e-4
    assert memory['_extra_state'] == dict(pointer=expected['pointer'],
                                          layout=flags['queue_layout'])
    assert len(memory['queue']) == flags['queue_size']
    assert len(given['contrast']) == flags['contrast_size']
    assert len(given['chosen']) == flags['queue_update']
    assert torch.equal(memory['contrast'], given['contrast'])
    for what, value in zip(('mean', 'var'), expected['running']):
        assert near(memory[f'project_head.1.running_{what}'], value, 1e-4)
    check_moments(after['optim_head'], expected['head_moments'], step)
    check_update(before, memory, after['optim_head'], expected['head'], flags['lr'], step,
                 oracle.HEAD)


def check_draws(parts, flags, N, time_scale, images, labels):
    """Shapes, rows and ranges of what a step is made of; images and labels of the data set."""
    size = flags['batch_size'] // flags['grad_accum']
    assert [part['rows'] for part in parts] == [
        [i * size, (i + 1) * size] for i in range(flags['grad_accum'])]
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
        assert (part['noise'] is None) == (flags['dropout'] == 0)


@functools.lru_cache(None)
def digits():
    """scikit-learn's digits as (N, 3, 8, 8) in [-1, 1], and labels."""
    from sklearn.datasets import load_digits
    found = load_digits()
    grey = torch.from_numpy(found.images * 255 / 16).round().float()
    return (grey / 127.5 - 1)[:, None].expand(-1, 3, -1, -1), torch.from_numpy(found.target)


def results(folder, case):
    """Numbers in which runs with other flags differ: what was logged, weights at the end."""
    state = load(folder / case / 'ckpt.pt')
    kept = [log_of(folder, case), state['net_model']] + [
        state.get(key) for key in ('ema_model', 'memory')]
    for line in kept[0].values():
        for key in ('images_per_s', 'memory_mb'):
            line.pop(key)
    return kept


@pytest.mark.parametrize('case', list(CASES))
def test_steps(folder, case):
    whole = case.split('-')[1] in ('plain', 'total_steps', 'warmup', 'queue_layout')
    check_steps(folder, case, CASES[case], every=whole)
    plain = case.split('-')[0] + '-plain'
    # a flag that acts shows; parts change a result only where the loss looks across images
    if case not in (plain, 'base-grad_accum', 'pd-grad_accum'):
        one, other = results(folder, case), results(folder, plain)
        assert not all(alike(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize('case', ['base-seed', 'pd-seed', 'rdd-seed'])
def test_seed_is_in_everything(folder, case):
    """Another seed: other images, noise and pixels; another network, or head and queue."""
    one, two = (load(folder / f'{name}.record') for name in (case, case.split('-')[0] + '-plain'))
    check_fresh({1: one['steps'][1], 2: two['steps'][1]}, CASES[case])
    one, two = one['initial'], two['initial']
    for of, key in (('net_model', 'head.weight'), ('memory', 'project_head.0.weight'),
                    ('memory', 'queue')):
        if of in one and (of == 'memory' or case == 'base-seed'):
            assert not torch.equal(one[of][key], two[of][key])


def test_resumed_with_other_flags(folder):
    """Rates and weight decay of the command, moments of the file, for both optimisers."""
    for name, flags in RESUMED.items():
        check_steps(folder, f'{name}_resumed', flags, start=1)
        ours, whole = (load(folder / f'{run}.record')['steps'][3]
                       for run in (f'{name}_resumed', f'{name}-total_steps'))
        for key in ('x_0', 'y', 't', 'eps'):        # the draws of a run that never stopped
            assert torch.equal(ours['parts'][0][key], whole['parts'][0][key])


def test_until(folder):
    """Twice the steps for students of 2 and 1."""
    found = {name: load(folder / name / 'ckpt.pt') for name in (
        'until/4', 'until/2', 'until/1', 'until_rdd/4', 'until_rdd/2')}
    assert {name: (state['T'], state['step']) for name, state in found.items()} == {
        'until/4': (4, 2), 'until/2': (2, 4), 'until/1': (1, 4),
        'until_rdd/4': (4, 1), 'until_rdd/2': (2, 2)}


@pytest.mark.parametrize('one', TWO)
def test_two_processes(folder, one):
    """Losses, gradients, queue and running averages are those of the whole batch."""
    a, b = log_of(folder, one), log_of(folder, f'{one}_two')
    for step in a:
        for key in set(a[step]) - {'images_per_s', 'memory_mb'}:
            assert b[step][key] == pytest.approx(a[step][key], rel=1e-3), (step, key)
    a, b = (load(folder / name / 'ckpt.pt') for name in (one, f'{one}_two'))
    for key in ('optim', 'optim_head'):
        for i, entry in a.get(key, dict(state={}))['state'].items():
            largest = max(e['exp_avg'].norm() for e in a[key]['state'].values())
            assert near(b[key]['state'][i]['exp_avg'], entry['exp_avg'], 2e-2, 2e-3 * largest)
    if 'memory' in a:
        for key in ('queue', 'contrast', 'project_head.1.running_mean',
                    'project_head.1.running_var'):
            assert near(b['memory'][key].float(), a['memory'][key].float(), 2e-2), key


def test_weights_that_are_lost(folder):
    """Finite gradients, a rate that no number holds: nothing is saved over the good step."""
    assert 'hold values that are not finite' in (folder / 'lost/said').read_text()
    state = load(folder / 'lost/ckpt.pt')
    assert state['step'] == 1 and all(v.isfinite().all() for v in state['net_model'].values())
    assert not list((folder / 'lost').glob('ckpt_2*'))


def test_bf16(folder):
    """Networks in bfloat16 give other losses, though not by much."""
    exact, ours = (log_of(folder, name)[1] for name in ('rdd-plain', 'bf16'))
    for key in ('loss', 'loss_intra', 'loss_pd', 'grad_norm'):
        assert 1e-5 < abs(ours[key] / exact[key] - 1) < 0.1, key


def test_names_of_what_is_lost():
    lost = torch.tensor([1., float('nan')])
    state = dict(net_model=dict(w=lost), ema_model=dict(w=torch.ones(2), n=torch.ones(2).long()),
                 optim=dict(state={0: dict(step=1, exp_avg=[lost])}), step=3)
    assert checkpoint.not_finite(state) == ['net_model', 'optim']


# What a run gives to its steps

def test_draws():
    """Times are uniform in low..high, both included; noise is standard normal."""
    t, eps = run.draw(9000, (2,), 3, 11, torch.Generator().manual_seed(0))
    counts = t.bincount(minlength=13)
    assert counts[:3].sum() == counts[12:].sum() == 0 and (counts[3:12] - 1000).abs().max() < 150
    assert eps.shape == (9000, 2) and abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.03


def test_streams():
    """Another key is another stream, also with the same numbers in another order."""
    keys = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2), (2, 0, 0), (1, 1, 0), (1, 0, 1), (3, 0, 0)]
    assert len({seeding.mix(*key) for key in keys}) == len(keys)
    names = ('WEIGHTS', 'ORDER', 'FLIP', 'NOISE', 'DROPOUT', 'CONTRAST', 'PIXELS', 'SAMPLES',
             'LABELS', 'CROP', 'AUGMENT')
    assert len({getattr(seeding, name) for name in names}) == len(names)
    a = seeding.noise_of_images(3, range(4), (3, 2, 2), 'cpu')
    assert torch.equal(a[2:], seeding.noise_of_images(3, [2, 3], (3, 2, 2), 'cpu'))


def test_log_lines(tmp_path):
    """After resuming at step 2, no line of a later step is kept, nor a broken one."""
    path = tmp_path / 'metrics.jsonl'
    path.write_text(''.join(f'{{"step": {i}, "loss": 1}}\n' for i in (1, 2, 3)) + '{"step": 1, "l')
    assert [json.loads(line)['step'] for line in log._lines_until(path, 2)] == [1, 2]


# Flags without a run

DEFAULTS = {    # those of the original
    'train_base.py': dict(T=1024, time_scale=1, lr=2e-4, wd=0.001, total_steps=800000, warmup=5000,
                          ema_decay=0.9999, dropout=0.1, grad_clip=1., loss_type='both',
                          batch_size=128, ch=128, ch_mult=[1, 2, 2, 2], attn=[1], num_res_blocks=2,
                          img_size=32, class_num=10, mean_type='xstart', seed=0, sample_size=64,
                          sample_step=1000, save_step=1000, grad_accum=1, num_workers=4),
    'PD.py': dict(lr=5e-5, wd=0., total_steps=10000, warmup=0, ema_decay=0., dropout=0.,
                  grad_clip=1., loss_type='both', until=0, batch_size=128),
    'train_rdd.py': dict(lr=5e-5, wd=0., total_steps=10000, warmup=0, ema_decay=0., dropout=0.,
                         grad_clip=1., loss_type='mp2p', classifier='densenet201', temperature=1.,
                         feature='true', feature_weight=1., intra_weight=1., intra_temperature=1.,
                         relation_group=0, memory_weight=0.1, contrast_temperature=0.1,
                         queue_size=20000, queue_update=128, contrast_size=4096,
                         queue_layout='pixels', alpha=0., beta=0., logits='false',
                         logits_weight=1., gt='false', gt_weight=1.),
    'ddim_eval.py': dict(stride=1, num_images=50000, fid_use_torch='false', weights='auto', seed=0,
                         fid_cache='./stats/cifar10.train.npz', fid_float='false', batch_size=128),
    'classifier/train.py': dict(model='resnet18', dataset='cifar10', epoch=300, seed=-1,
                                batchsize=128, init_lr=0.1, wd=5e-4, normalize05='false'),
    'score/get_npz.py': dict(dataset='cifar10', batchsize=128, split='train', half=0)}
MISTAKES = dict(nan=['--lr=nan'], word=['digits'], no_folder=['--logdir='],
                parts=['--grad_accum=3'])


@pytest.fixture(scope='module')
def said(tmp_path_factory):
    """{script or name of a mistake: (code, output, errors)}."""
    folder = str(tmp_path_factory.mktemp('said') / 'new')
    jobs = {script: [command([script, '--help'])] for script in DEFAULTS}
    for name, mistake in MISTAKES.items():
        argv = ['train_base.py', *words(BASE, None), f'--logdir={folder}', *mistake]
        jobs[name] = [command(argv)]
    return {name: results[0] for name, results in fork_all(jobs).items()}


@pytest.mark.parametrize('script', list(DEFAULTS))
def test_defaults(said, script):
    text = said[script][1]
    blocks = {block.split()[0]: ' '.join(block.split()) for block in text.split('\n  --')[1:]}
    for name, value in DEFAULTS[script].items():
        found = blocks[name].split('(default: ')[1].rstrip(')').strip("'")
        assert found == str(value) or isinstance(value, float) and float(found) == value, name


def test_mistakes_in_flags(said):
    for name in MISTAKES:
        code, _, err = said[name]
        assert code == 2 and len(err.splitlines()) == 1 and 'error: ' in err, (name, err)


def test_resolved_flags(folder):
    """flagfile.txt in the folder of a run holds every flag of it."""
    text = (folder / 'base-plain/flagfile.txt').read_text().split('\n')
    assert {'--lr=0.001', '--wd=0.02', '--T=8', '--grad_clip=0.3', '--seed=0'} <= set(text)
