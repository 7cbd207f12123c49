"""The scripts as users launch them: the whole chain, resuming, several processes, and mistakes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from classifier import build_classifier
from runtime import checkpoint

ROOT = Path(__file__).resolve().parent.parent
NETWORK = ('--dataset=digits --img_size=8 --ch=32 --ch_mult=1 --ch_mult=1 --attn=1 '
           '--num_res_blocks=1 --batch_size=8 --num_workers=0 --sample_size=4 --log_step=1').split()
STEPS = ['--total_steps=4', '--save_step=2', '--sample_step=0']
DROPOUT = ['--dropout=0.1']
LONG = ['--total_steps=40', '--save_step=3']
BASE = ['train_base.py', *NETWORK, *STEPS, '--T=8', '--warmup=3', '--ema_decay=0.5']
PD = ['PD.py', *NETWORK, *STEPS, '--lr=1e-4']
RDD = ['train_rdd.py', *NETWORK, *STEPS, '--lr=1e-3', '--queue_size=64', '--queue_update=10',
       '--contrast_size=16', '--relation_group=2', '--temperature=0.1',
       '--intra_temperature=0.05', '--classifier=densenet_small']
EVAL = ['ddim_eval.py', '--num_images=20', '--batch_size=8', '--sample_size=4']


def launch(command, cwd=ROOT):
    """A command as typed in a shell, `python` in front; must succeed. Returns standard output."""
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        env.pop(name, None)
    done = subprocess.run([sys.executable, *map(str, command)], cwd=str(cwd), env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    return done.stdout


def fork_all(jobs):
    """{name: [(exit code, stdout, stderr), ..]} of many runs, cheaper than `launch`: forks.py."""
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    done = subprocess.run([sys.executable, str(ROOT / 'tests/forks.py')], input=json.dumps(jobs),
                          env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def command(argv, *more, **extra):
    return dict(argv=[*argv, *map(str, more)], **extra)


class Runs:
    """Folders of all runs, and what the processes said."""

    def __init__(self, folder):
        self.folder = folder
        self.classifier = f'--classifier_path={folder}/classifier/digits/densenet_small'
        self.stats = folder / 'stats/digits.npz'

    def to(self, name):
        return f'--logdir={self.folder / name}'

    def teacher(self, name):
        return f'--base_ckpt={self.folder / name}'

    def ckpt(self, name):
        return checkpoint.read(self.folder / name)

    def losses(self, name, steps=4):
        """{step: {loss term: value}}"""
        lines = map(json.loads, (self.folder / name / 'metrics.jsonl').read_text().splitlines())
        lines = list(lines)
        assert [line['step'] for line in lines] == list(range(1, steps + 1))    # each step once
        return {line['step']: {key: value for key, value in line.items() if 'loss' in key}
                for line in lines}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The chain base -> PD -> RDD -> evaluation, and in forks the variants of its parts."""
    runs = Runs(tmp_path_factory.mktemp('runs'))
    rdd = [*RDD, runs.teacher('pd'), runs.classifier]
    run = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    with ThreadPoolExecutor() as pool:
        base = pool.submit(launch, [*BASE, *DROPOUT, runs.to('base'), '--sample_step=1'])
        launch(['train.py', '--model=densenet_small', '--dataset=digits', '--img_size=8',
                '--seed=1', '--epoch=1', '--max_steps=2', '--batchsize=32', '--num_workers=0',
                f'--result_path={runs.folder}/classifier'], ROOT / 'classifier')
        base.result()
        stats = pool.submit(launch, ['get_npz.py', '--dataset=digits', '--img_size=8',
                                     '--max_images=50', f'--output={runs.stats}', '--num_workers=0',
                                     '--feature_network', runs.classifier.split('=')[1]],
                            ROOT / 'score')
        launch([*PD, *DROPOUT, runs.teacher('base'), runs.to('pd')])
        runs.good = good_jobs(runs)
        forked = pool.submit(fork_all, dict(runs.good, **bad_jobs(runs)))
        launch(['-m', 'torch.distributed.launch', '--nproc_per_node=2', f'--master_port={port()}',
                *rdd, '--gpu_id=', '--num_gpus=2', runs.to('rdd')])
        torchrun = pool.submit(launch, [*run, *rdd, runs.to('rdd_torchrun')])
        stats.result()
        runs.evaluation = launch(evaluation(runs, 'rdd'))
        torchrun.result()
        runs.forked = forked.result()
    return runs


def evaluation(runs, name, *more):
    return [*EVAL, runs.to(name), f'--fid_cache={runs.stats}',
            '--feature_network=' + runs.classifier.split('=')[1], *more]


def pictures(runs):
    """A folder of images that a worker can read."""
    for i in range(12):
        path = runs.folder / f'pictures/{"ab"[i % 2]}/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (20 * i, 0, 0)).save(str(path))
    return runs.folder / 'pictures'


def good_jobs(runs):
    shutil.copytree(str(runs.folder / 'pd'), str(runs.folder / 'bad/damaged'))
    for name in ('ckpt.pt', 'ckpt_4.pt'):
        os.truncate(str(runs.folder / 'bad/damaged' / name), 5000)
    rdd = [*RDD, runs.teacher('pd'), runs.classifier]
    until = command(PD, runs.teacher('base'), runs.to('stages'), '--until=2', '--total_steps=2')

    def resumed(argv, name):
        argv = [*argv, *DROPOUT, runs.to(name)]
        return [command(argv, kill_after_save=True), command(argv)]

    def stopped(argv, name, number, **extra):
        """Stopped by a signal after some steps, then started again; and the whole run."""
        argv = [*argv, *DROPOUT, *LONG]
        after = [number, str(runs.folder / name / 'metrics.jsonl'), 5]
        return {name: [command(argv, runs.to(name), signal=after, **extra),
                       command(argv, runs.to(name), **extra)],
                f'{name}_whole': [command(argv, runs.to(f'{name}_whole'), **extra)]}

    return dict(
        stopped(BASE, 'base_term', signal.SIGTERM),
        **stopped([*PD, runs.teacher('base')], 'pd_int', signal.SIGINT, ranks=2),
        **stopped(rdd, 'rdd_kill', signal.SIGKILL),
        **stopped([*BASE, '--dataset=folder', f'--data_root={pictures(runs)}', '--num_workers=2'],
                  'folder_term', signal.SIGTERM, slow_files=True),
        dropout_one=[command(BASE, '--dropout=0.5', runs.to('dropout_one'))],
        dropout_two=[command(BASE, '--dropout=0.5', runs.to('dropout_two'), ranks=2)],
        dropout_parts=[command(BASE, '--dropout=0.5', runs.to('dropout_parts'), '--grad_accum=4')],
        diverged=[command(BASE, runs.to('diverged'), '--lr=1e20', '--warmup=0', '--total_steps=9',
                          '--save_step=1', '--max_bad_steps=3', '--grad_clip=0')],
        bad_classifier=[command(['classifier/train.py', '--model=convnet_small', '--dataset=digits',
                                 '--init_lr=1e30', '--max_steps=5', '--num_workers=0', '--seed=0',
                                 f'--result_path={runs.folder}/bad_classifier'])],
        damaged=[command(PD, runs.to('bad/damaged'), runs.teacher('base'), '--total_steps=5')],
        base_resumed=resumed(BASE, 'base_resumed'),
        pd_resumed=resumed([*PD, runs.teacher('base')], 'pd_resumed'),
        rdd_whole=[command(rdd, *DROPOUT, runs.to('rdd_whole'))],
        rdd_resumed=resumed(rdd, 'rdd_resumed'),
        rdd_one=[command(rdd, runs.to('rdd_one'))],
        base_one=[command(BASE, '--dropout=0', runs.to('base_one'))],
        base_two=[command(BASE, '--dropout=0', runs.to('base_two'), ranks=2)],
        base_accum=[command(BASE, '--dropout=0', runs.to('base_accum'), '--grad_accum=2')],
        pd_two=[command(PD, runs.teacher('base'), runs.to('pd_two'), ranks=2),
                command(PD, runs.teacher('base'), runs.to('pd_one'))],
        rdd_bf16=[command(rdd, runs.to('rdd_bf16'), '--amp=bf16')],
        until=[until, until],
        until_two=[command(PD, runs.teacher('base'), runs.to('stages_two'), '--until=2',
                           '--total_steps=2', ranks=2)],
        finished=[command(BASE, '--dropout=0', runs.to('finished'), '--total_steps=1')] * 2,
        base_eval=[command(evaluation(runs, 'base', '--stride=2'))] * 2,
        pd_eval=[command(evaluation(runs, 'pd', '--fid_float'), *how[0], ranks=how[1])
                 for how in (([], 1), (['--batch_size=3'], 1), (['--batch_size=20'], 2))])


# What good runs leave behind

def test_rdd_in_bfloat16_follows_float32(runs):
    """The networks run in bfloat16, the losses in float32: near, not equal."""
    ours, exact = runs.losses('rdd_bf16'), runs.losses('rdd_one')
    for step in exact:
        assert ours[step]['loss_memory'] == pytest.approx(exact[step]['loss_memory'], rel=0.1)
        assert ours[step] != exact[step]


def test_stages_on_two_processes_start_from_the_finished_teacher(runs):
    """Process 1 must not read the folder of a stage before process 0 has written it."""
    one, two = runs.ckpt('stages/2'), runs.ckpt('stages_two/2')
    for key, value in one['net_model'].items():
        assert torch.allclose(value, two['net_model'][key], atol=1e-4), key


def assert_same(a, b, path='', skip=()):
    """Equal bit by bit, through dicts and lists."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            if key not in skip:
                assert_same(a[key], b[key], f'{path}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (one, other) in enumerate(zip(a, b)):
            assert_same(one, other, f'{path}/{i}')
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, path


def assert_ran(results, codes=None):
    codes = codes or [0] * len(results)
    assert [result[0] for result in results] == codes, results[-1][2]
    assert not any('Traceback' in result[2] for result in results)


def test_checkpoints_of_the_chain(runs):
    base, pd, rdd = (runs.ckpt(name) for name in ('base', 'pd', 'rdd'))
    assert [(s['T'], s['time_scale'], s['step']) for s in (base, pd, rdd)] == [
        (8, 1, 4), (4, 2, 4), (2, 4, 4)]
    assert {'net_model', 'ema_model', 'x_T'} <= set(base) and 'ema_model' not in pd
    assert list(base['net_model']) == list(pd['net_model']) == list(rdd['net_model'])
    for teacher, student in ((base['ema_model'], pd), (pd['net_model'], rdd)):
        moved = {key for key, value in student['net_model'].items()
                 if not torch.equal(value, teacher[key])}
        assert set(student['net_model']) - moved == {'time_embedding.timembedding.0.weight'}
        largest = max((student['net_model'][key] - teacher[key]).abs().max().item()
                      for key in teacher)
        assert largest < 5e-3       # four steps of 1e-3: it did start from the teacher
    assert base['x_T'].shape == (4, 3, 8, 8)
    for name in ('base', 'pd', 'rdd'):
        assert (runs.folder / name / 'flagfile.txt').is_file()
        assert not list((runs.folder / name).glob('*.tmp'))
    # the resumed run draws no grids and must end the same: see test_resuming_is_exact
    assert sorted(path.name for path in (runs.folder / 'base/sample').glob('?.png')) == [
        '1.png', '2.png', '3.png', '4.png']


def test_evaluation_of_the_chain(runs):
    result = json.loads((runs.folder / 'rdd/results.jsonl').read_text())
    assert (result['nfe'], result['T'], result['weights']) == (2, 2, 'net_model')
    assert 0 < result['fid'] < 1e6 and result['num_images'] == 20
    assert f'{result["fid"]:.3f}' in runs.evaluation
    assert (runs.folder / 'rdd/sample/eval_nfe2_seed0.png').is_file()


def test_evaluation_repeats_itself(runs):
    assert_ran(runs.forked['base_eval'])
    one, two = map(json.loads, (runs.folder / 'base/results.jsonl').read_text().splitlines())
    assert (one['nfe'], one['weights']) == (4, 'ema_model')
    assert one['fid'] == two['fid'] and one['inception_score'] == two['inception_score']


def test_evaluation_depends_neither_on_batches_nor_on_processes(runs):
    """Same noise, sums in float64: what is left is the rounding of the networks."""
    assert_ran(runs.forked['pd_eval'])
    whole, parts, two = map(json.loads, (runs.folder / 'pd/results.jsonl').read_text().splitlines())
    assert whole['fid'] > .1
    for other in (parts, two):
        for key in ('fid', 'inception_score', 'inception_std'):     # written with 4 decimals
            assert other[key] == pytest.approx(whole[key], rel=1e-6, abs=1.01e-4)


@pytest.mark.parametrize('whole, resumed', [('base', 'base_resumed'), ('pd', 'pd_resumed'),
                                            ('rdd_whole', 'rdd_resumed')])
def test_resuming_is_exact(runs, whole, resumed):
    assert_ran(runs.forked[resumed], [137, 0])
    if whole in runs.forked:
        assert_ran(runs.forked[whole])
    assert 'step 2' in runs.forked[resumed][1][1]       # it says where it goes on
    assert_same(runs.ckpt(whole), runs.ckpt(resumed), skip=['flags'])
    assert runs.losses(whole) == runs.losses(resumed)


@pytest.mark.parametrize('name, code, word', [('base_term', 143, 'SIGTERM: stopped after step '),
                                              ('pd_int', 130, 'SIGINT: stopped after step '),
                                              ('rdd_kill', -9, ''),
                                              ('folder_term', 143, 'SIGTERM: stopped after ')])
def test_stopped_and_resumed_is_exact(runs, name, code, word):
    """The signal goes to the last process alone; all of them end after the same step."""
    assert_ran(runs.forked[name], [code, 0])
    assert_ran(runs.forked[f'{name}_whole'])
    (_, first, _), (_, second, _) = runs.forked[name]
    assert word in first and 'resuming at step' in second
    assert_same(runs.ckpt(f'{name}_whole'), runs.ckpt(name), skip=['flags'])
    assert runs.losses(f'{name}_whole', 40) == runs.losses(name, 40)


def test_diverging_run_stops(runs):
    """It names step and term; what it saved is finite."""
    (code, _, err), = runs.forked['diverged']
    assert code == 1 and 'Traceback' not in err
    assert '3 steps in a row' in err and 'loss' in err and '--lr' in err and 'NaN' not in err
    state = runs.ckpt('diverged')
    assert all(value.isfinite().all() for value in state['net_model'].values())
    assert all(value.isfinite().all() for moments in state['optim']['state'].values()
               for value in moments.values())


def test_diverging_classifier_is_not_saved(runs):
    (code, _, err), = runs.forked['bad_classifier']
    assert code == 1 and 'Traceback' not in err and '--init_lr' in err
    assert not list((runs.folder / 'bad_classifier').rglob('*.pt'))


def test_damaged_newest_checkpoint(runs):
    """It is named, and the one before is used."""
    assert_ran(runs.forked['damaged'])
    out = runs.forked['damaged'][0][1]
    assert 'ckpt.pt is truncated' in out and 'ckpt_2.pt instead' in out
    assert 'resuming at step 2' in out and runs.ckpt('bad/damaged')['step'] == 5


def test_dropout_does_not_depend_on_the_number_of_processes(runs):
    for name in ('dropout_one', 'dropout_two', 'dropout_parts'):
        assert_ran(runs.forked[name])
    assert_same_losses(runs, 'dropout_one', 'dropout_two')
    assert_same_losses(runs, 'dropout_one', 'dropout_parts')


def assert_same_losses(runs, one, two):
    one, two = runs.losses(one), runs.losses(two)
    for step in one:
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-4)
        assert two[step] == pytest.approx(one[step], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize('two', ['rdd', 'rdd_torchrun'])
def test_two_processes_of_rdd(runs, two):
    assert_ran(runs.forked['rdd_one'])
    assert set(runs.losses('rdd_one')[1]) == {'loss', 'loss_feature', 'loss_intra', 'loss_memory'}
    assert_same_losses(runs, 'rdd_one', two)
    one, two = runs.ckpt('rdd_one')['memory'], runs.ckpt(two)['memory']
    extra = dict(pointer=40, layout='pixels')
    assert one['_extra_state'] == two['_extra_state'] == extra and list(one) == list(two)
    assert torch.equal(one['contrast'], two['contrast'])
    torch.testing.assert_close(one['queue'], two['queue'], rtol=0, atol=1e-5)
    norm = 'project_head.1.running_var'     # over the batches of both processes
    torch.testing.assert_close(one[norm], two[norm], rtol=1e-3, atol=0)


def test_two_processes_and_parts(runs):
    for name in ('base_one', 'base_two', 'base_accum', 'pd_two'):
        assert_ran(runs.forked[name])
    assert_same_losses(runs, 'base_one', 'base_two')
    assert_same_losses(runs, 'base_one', 'base_accum')
    assert_same_losses(runs, 'pd_one', 'pd_two')


def test_stages(runs):
    assert_ran(runs.forked['until'])
    steps = {name: (runs.ckpt(f'stages/{name}')['T'], runs.ckpt(f'stages/{name}')['time_scale'])
             for name in ('4', '2')}
    assert steps == {'4': (4, 2), '2': (2, 4)}
    first, second = (result[1] for result in runs.forked['until'])
    assert 'finished' not in first and second.count('is finished') == 2
    assert 'starting' not in second


def test_finished_run_is_left_alone(runs):
    assert_ran(runs.forked['finished'])
    assert 'is finished: step 1' in runs.forked['finished'][1][1]


# Mistakes: one sentence, exit code 2, nothing created

def other_base(runs, name, **changes):
    state = dict(runs.ckpt('base'), **changes)
    (runs.folder / 'bad' / name).mkdir(parents=True)
    checkpoint.save(runs.folder / 'bad' / name / 'ckpt.pt', state)
    return runs.teacher(f'bad/{name}')


def bad_jobs(runs):
    """{name: [command]}; makes the broken inputs."""
    bad = runs.folder / 'bad'
    odd, one_step = other_base(runs, 'odd', T=7), other_base(runs, 'one', T=1, time_scale=8)
    copy = other_base(runs, 'copy', step=2)
    (bad / 'of_rdd').mkdir()
    checkpoint.save(bad / 'of_rdd/ckpt.pt', dict(runs.ckpt('pd'), method='rdd', memory={}))
    (bad / 'empty/dog').mkdir(parents=True)
    (bad / 'broken/dog').mkdir(parents=True)
    for i in range(8):
        Image.new('RGB', (8, 8)).save(str(bad / f'broken/dog/{i}.png'))
    (bad / 'broken/dog/5.png').write_bytes(b'no picture')
    np.savez(str(bad / 'nan.npz'), mu=np.full(144, np.nan), sigma=np.eye(144))
    np.savez(str(bad / 'mu.npz'), mu=np.zeros(144))
    runs.busy = socket.socket()     # a port in use
    runs.busy.bind(('127.0.0.1', 0))
    runs.busy.listen(1)
    busy = dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1',
                MASTER_PORT=str(runs.busy.getsockname()[1]))
    for name, size in (('cut', 5000), ('void', 0)):
        (bad / name).mkdir()
        data = (runs.folder / 'base/ckpt.pt').read_bytes()[:size]
        (bad / name / 'ckpt.pt').write_bytes(data)
    (bad / 'file').write_text('')
    checkpoint.save(bad / 'five.pt', dict(model=build_classifier('convnet_small', 5).state_dict(),
                                          name='convnet_small'))
    classifier = runs.classifier.split('=')[1]
    base, pd, rdd = [*BASE, 'NEW'], [*PD, 'NEW'], [*RDD, 'NEW', runs.teacher('pd')]
    teacher = runs.teacher('base')
    cases = dict(
        no_folder=(pd, runs.teacher('bad/none')), empty_folder=(pd, runs.teacher('bad/empty')),
        cut=(pd, runs.teacher('bad/cut')), void=(pd, runs.teacher('bad/void')),
        odd=(pd, odd), one_step=(pd, one_step), until_3=(pd, teacher, '--until=3'),
        stride=(evaluation(runs, 'base', '--stride=3'),),
        classes=(rdd, f'--classifier_path={bad}/five.pt', '--classifier=convnet_small'),
        dataset=(base, '--dataset=dogs'), no_images=(base, '--dataset=folder',
                                                     f'--data_root={bad}/empty'),
        no_data_root=(base, '--dataset=folder', f'--data_root={bad}/none'),
        classifier_as_model=(pd, f'--base_ckpt={classifier}'),
        model_as_classifier=(rdd, f'--classifier_path={runs.folder}/base'),
        evaluate_classifier=(evaluation(runs, 'base'), f'--logdir={classifier}'),
        no_classifier=(rdd, f'--classifier_path={bad}/none'),
        flag=(base, '--learning_rate=1'), kind=(base, '--batch_size=many'),
        negative=(base, '--batch_size=0'), word=(base, 'digits'), no_logdir=(BASE,),
        logdir_is_file=(BASE, runs.to('bad/file')), other_ch=(pd, teacher, '--ch=64'),
        other_attn=(pd, teacher, '--attn=0'), other_output=(pd, teacher, '--mean_type=epsilon'),
        group=(rdd, runs.classifier, '--relation_group=3'),
        no_statistics=(evaluation(runs, 'base', f'--fid_cache={bad}/none.npz'),),
        other_run=(BASE, runs.to('base'), '--ch=64'),
        own_teacher=(PD, copy, runs.to('bad/copy')), other_stage=(BASE, runs.to('pd')),
        pd_into_rdd=(PD, teacher, runs.to('bad/of_rdd'), '--total_steps=9'),
        rdd_into_pd=(RDD, teacher, runs.classifier, runs.to('pd'), '--total_steps=9'),
        late_average=(PD, teacher, runs.to('pd'), '--total_steps=9', '--ema_decay=0.5'),
        other_queue=(RDD, runs.teacher('pd'), runs.classifier, runs.to('rdd_whole'),
                     '--total_steps=9', '--queue_size=70'),
        contrast=(rdd, runs.classifier, '--contrast_size=65'),
        classifier_there=(BASE, f'--logdir={classifier}'),
        all_bad=(['classifier/train.py', '--dataset=folder', f'--data_root={bad}/cut',
                  '--skip_bad_images', f'--result_path={bad}/new'],),
        temperature=(rdd, runs.classifier, '--temperature=0'), negative_lr=(base, '--lr=-1'),
        broken_image=(base, '--dataset=folder', f'--data_root={bad}/broken'),
        small_set=(base, '--dataset=folder', f'--data_root={bad}/broken', '--skip_bad_images'),
        nan=(evaluation(runs, 'base', f'--fid_cache={bad}/nan.npz'),),
        mu_alone=(evaluation(runs, 'base', f'--fid_cache={bad}/mu.npz'),),
        statistics_cut=(evaluation(runs, 'base', f'--fid_cache={bad}/file'),),
        one_image=(evaluation(runs, 'base', '--num_images=1'),),
        model=(['classifier/train.py', '--model=vgg', '--dataset=digits'],),
        epoch=(['classifier/train.py', '--dataset=digits', '--epoch=0'],),
        split=(['score/get_npz.py', '--dataset=digits', '--half=3'],),
        network=(['score/get_npz.py', '--dataset=digits', f'--feature_network={bad}/none',
                  f'--output={bad}/new.npz'],),
        no_terms=(rdd, runs.classifier, '--nofeature', '--loss_type=none'),
        steps=(base, '--total_steps=0'), clip=(base, '--grad_clip=-1'),
        dropout=(base, '--dropout=2'), amp=(base, '--amp=fp8'), parts=(base, '--grad_accum=3'),
        channels=(base, '--ch=33'), size=(base, '--img_size=9'), level=(base, '--attn=2'))
    jobs = {name: [command(*case)] for name, case in cases.items()}
    for name, size in (('share_3', 3), ('share_1', 1)):
        jobs[name] = [command(base, f'--batch_size={size}', ranks=2)]
    jobs['port'] = [command(base, env=busy)]
    for name, (job,) in jobs.items():       # a folder of its own for each, not to be created
        job['argv'] = [runs.to(f'bad/new_{name}') if word == 'NEW' else word
                       for word in job['argv']]
    return jobs


MISTAKES = dict(
    no_folder='there is no checkpoint', empty_folder='there is no checkpoint', cut='truncated',
    void='truncated', odd='7 sampling steps', one_step='1 sampling steps', until_3='--until 3',
    stride='--stride 3 does not divide the 8 steps', classes='5 classes, expected 10',
    dataset='dogs', no_images='holds no images', no_data_root='no such folder',
    classifier_as_model='is a classifier', model_as_classifier='diffusion checkpoint',
    evaluate_classifier='is a classifier', no_classifier='classifier/train.py',
    flag='learning_rate', kind='batch_size', negative='batch_size', word='digits',
    no_logdir='--logdir is missing', logdir_is_file='--logdir', other_ch='--ch is 64',
    other_attn='--attn', other_output='--mean_type', group='--relation_group 3',
    no_statistics='get_npz.py', other_run='another network', own_teacher='--logdir',
    other_stage='--logdir', pd_into_rdd='--logdir', rdd_into_pd='--logdir',
    late_average='--ema_decay', other_queue='--queue_size', contrast='--contrast_size',
    classifier_there='cannot be continued', all_bad='images',
    temperature='--temperature=0', negative_lr='--lr=-1', broken_image='broken/dog/5.png',
    small_set='7 training images', nan='nan.npz', mu_alone='expected mu and sigma',
    statistics_cut='npz', one_image='--num_images', model='--model', epoch='--epoch',
    split='--half', network='bad/none', no_terms='leaves no loss', steps='--total_steps',
    clip='--grad_clip', dropout='--dropout', amp='--amp', parts='--grad_accum 3',
    port='MASTER_PORT', channels='--ch', size='--img_size', level='--attn',
    share_3='--batch_size 3', share_1='--batch_size 1')


@pytest.mark.parametrize('name', sorted(MISTAKES))
def test_mistake(runs, name):
    code, _, err = runs.forked[name][0]
    assert code == (1 if name == 'port' else 2) and 'Traceback' not in err, err
    said = [line for line in err.splitlines() if ': error: ' in line]
    assert len(said) == 1 and 'Warning' not in err, err
    assert MISTAKES[name] in said[0]
    assert not (runs.folder / f'bad/new_{name}').exists()


def test_mistakes_change_nothing(runs):
    assert set(runs.forked) == set(MISTAKES) | set(runs.good)
    assert sorted(path.name for path in (runs.folder / 'bad').iterdir()) == [
        'broken', 'copy', 'cut', 'damaged', 'empty', 'file', 'five.pt', 'mu.npz', 'nan.npz', 'odd',
        'of_rdd', 'one', 'void']
    assert runs.ckpt('base')['T'] == runs.ckpt('bad/copy')['T'] == 8 and runs.ckpt('pd')['T'] == 4
    assert (runs.ckpt('base')['step'], runs.ckpt('bad/copy')['step']) == (4, 2)
    assert runs.ckpt('pd')['step'] == runs.ckpt('bad/of_rdd')['step'] == 4
    assert np.load(str(runs.stats))['mu'].shape == (144,)
