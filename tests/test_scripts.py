"""The scripts as users launch them: the whole chain, resuming, several processes, and mistakes."""

import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import mistakes
from helpers import (BASE, EVAL, FINISHED, PD, RDD, assert_ran, assert_same, command,
                     fork_all, launch, port)
from mistakes import MISTAKES
from runtime import checkpoint

DROPOUT = ['--dropout=0.1']
LONG = ['--total_steps=40', '--save_step=3', *DROPOUT]


class Runs:
    """Folders of all runs, and what the processes printed."""

    def __init__(self, folder):
        self.folder = folder
        self.classifier = f'--classifier_path={folder}/classifier/digits/densenet_small'
        self.scorer = self.classifier.replace('classifier_path', 'feature_network')
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
    classifier = command([
        'classifier/train.py', '--model=densenet_small', '--dataset=digits', '--img_size=8',
        '--seed=1', '--epoch=1', '--max_steps=2', '--batchsize=32', '--num_workers=0',
        f'--result_path={runs.folder}/classifier'])
    statistics = command([
        'score/get_npz.py', '--dataset=digits', '--img_size=8', '--max_images=50',
        f'--output={runs.stats}', '--num_workers=0', runs.scorer])
    with ThreadPoolExecutor() as pool:
        made = pool.submit(fork_all, dict(it=[classifier, statistics]))
        launch([*BASE, *DROPOUT, runs.to('base'), '--sample_step=1'])
        launch([*PD, *DROPOUT, runs.teacher('base'), runs.to('pd')])
        runs.made = made.result()['it']
        launch(['-m', 'torch.distributed.launch', '--nproc_per_node=2', f'--master_port={port()}',
                *RDD, runs.teacher('pd'), runs.classifier, runs.to('rdd'), '--gpu_id=',
                '--num_gpus=2'])
        mistakes.make_inputs(runs.folder)
        runs.good, runs.busy = good_jobs(runs), mistakes.busy_socket()
        refused = mistakes.jobs(runs.folder, runs.busy.getsockname()[1])
        forked = pool.submit(fork_all, dict(runs.good, **refused))
        runs.evaluation = launch(evaluation(runs, 'rdd'))
        runs.forked = forked.result()
    return runs


def evaluation(runs, name, *more):
    return [*EVAL, runs.to(name), f'--fid_cache={runs.stats}', runs.scorer, *more]


def good_jobs(runs):
    pd, rdd = [*PD, runs.teacher('base')], [*RDD, runs.teacher('pd'), runs.classifier]

    def stopped(argv, name, number, **extra):
        """Stopped by a signal after some steps, then started again; and the whole run."""
        after = [number, str(runs.folder / name / 'metrics.jsonl'), 5]
        return {name: [command(argv, runs.to(name), *LONG, signal=after, **extra),
                       command(argv, runs.to(name), *LONG, **extra)],
                f'{name}_whole': [command(argv, runs.to(f'{name}_whole'), *LONG, **extra)]}

    def killed(argv, name):
        return [command(argv, runs.to(name), kill_after_save=True), command(argv, runs.to(name))]

    def disagree(name, *last):
        return [command(BASE, runs.to(f'bad/{name}'), ranks=2, last=[*last, runs.to(name)])]

    until = command(pd, runs.to('stages'), '--until=1', '--total_steps=1')
    return dict(
        stopped(pd, 'pd_int', signal.SIGINT, ranks=2), **stopped(rdd, 'rdd_kill', signal.SIGKILL),
        base_resumed=killed([*BASE, *DROPOUT], 'base_resumed'),
        rdd_resumed=killed(rdd, 'rdd_resumed'), rdd_one=[command(rdd, runs.to('rdd_one'))],
        until=[until, until],
        until_two=[command(pd, runs.to('stages_two'), '--until=2', '--total_steps=1', ranks=2)],
        until_rdd=[command(rdd, runs.to('stages_rdd'), '--until=1', '--total_steps=1')],
        other_steps_there=disagree('steps', *BASE, '--total_steps=9'),
        other_script_there=disagree('script', *pd),
        base_eval=[command(evaluation(runs, 'base', '--stride=2'))] * 2,
        pd_eval=[command(evaluation(runs, 'pd', '--fid_float'), *how[0], ranks=how[1])
                 for how in (([], 1), (['--batch_size=3'], 1), (['--batch_size=20'], 2))])


# What good runs leave behind

def test_checkpoints_of_the_chain(runs):
    base, pd, rdd = (runs.ckpt(name) for name in ('base', 'pd', 'rdd'))
    assert [(s['T'], s['time_scale'], s['step']) for s in (base, pd, rdd)] == [
        (8, 1, 4), (4, 2, 4), (2, 4, 4)]
    assert {'net_model', 'ema_model', 'x_T'} <= set(base) and 'ema_model' not in pd
    assert list(base['net_model']) == list(pd['net_model']) == list(rdd['net_model'])
    assert base['x_T'].shape == (4, 3, 8, 8)
    for name in ('base', 'pd', 'rdd'):
        assert (runs.folder / name / 'flagfile.txt').is_file()
        assert not list((runs.folder / name).glob('*.tmp'))
    # the resumed run draws no grids and must end the same: see test_resuming_is_exact
    assert sorted(path.name for path in (runs.folder / 'base/sample').glob('?.png')) == [
        '1.png', '2.png', '3.png', '4.png']


@pytest.mark.parametrize('name', ['pd', 'rdd'])
def test_network_and_size_come_from_the_teacher(runs, name):
    """No flag gave them; the resolved flags have them."""
    found = (runs.folder / name / 'flagfile.txt').read_text().split()
    assert {'--img_size=8', '--ch=32', '--num_res_blocks=1', '--attn=1'} <= set(found)
    assert [line for line in found if 'ch_mult' in line] == ['--ch_mult=1'] * 2


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


@pytest.mark.parametrize('whole, resumed, code', [
    ('base', 'base_resumed', 137), ('rdd_one', 'rdd_resumed', 137),
    ('pd_int_whole', 'pd_int', 130), ('rdd_kill_whole', 'rdd_kill', -9)])
def test_resuming_is_exact(runs, whole, resumed, code):
    """Killed after a checkpoint; or by a signal to the last process, and all end after one step."""
    assert_ran(runs.forked[resumed], [code, 0])
    if whole in runs.forked:
        assert_ran(runs.forked[whole])
    (_, first, _), (_, second, _) = runs.forked[resumed]
    assert ('SIGINT: stopped after step ' in first) == (code == 130)
    assert 'resuming at step ' in second
    assert_same(runs.ckpt(whole), runs.ckpt(resumed), skip=['flags'])
    steps = 4 if code == 137 else 40
    assert runs.losses(whole, steps) == runs.losses(resumed, steps)
    assert_finished(second, runs.folder / resumed, '[0-9]+')


def test_two_processes_of_rdd(runs):
    assert_ran(runs.forked['rdd_one'])
    one, two = runs.losses('rdd_one'), runs.losses('rdd')
    assert set(one[1]) == {'loss', 'loss_feature', 'loss_intra', 'loss_memory'}
    for step in one:
        assert two[step]['loss'] == pytest.approx(one[step]['loss'], rel=1e-4)
        assert two[step] == pytest.approx(one[step], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize('name, difference', [('steps', r'--total_steps=4, --total_steps=9\)'),
                                              ('script', '--T=8, ')])
def test_processes_that_disagree_do_not_train(runs, name, difference):
    (code, out, err), = runs.forked[f'other_{name}_there']
    assert code == 2 and 'starting' not in out and 'Traceback' not in err, err
    assert re.search(rf'were started with different scripts or flags \(.*{difference}', err), err
    assert not (runs.folder / f'bad/{name}').exists() and not (runs.folder / name).exists()


def test_stages(runs):
    """Students of 2 steps and 1 train twice as long; finished stages are left alone."""
    assert_ran(runs.forked['until'])
    assert_ran(runs.forked['until_rdd'])
    found = {name: (runs.ckpt(name)['T'], runs.ckpt(name)['time_scale'], runs.ckpt(name)['step'])
             for name in ('stages/4', 'stages/2', 'stages/1', 'stages_rdd/2', 'stages_rdd/1')}
    assert found == {'stages/4': (4, 2, 1), 'stages/2': (2, 4, 2), 'stages/1': (1, 8, 2),
                     'stages_rdd/2': (2, 4, 2), 'stages_rdd/1': (1, 8, 2)}
    first, second = (result[1] for result in runs.forked['until'])
    lines = [line for line in first.splitlines() if 'finished' in line]
    for line, T, steps in zip(lines, (4, 2, 1), (1, 2, 2)):
        assert_finished(line, runs.folder / f'stages/{T}', steps)
    assert len(lines) == 3 and second.count('is finished') == 3 and 'starting' not in second


def test_stages_on_two_processes_start_from_the_finished_teacher(runs):
    """Process 1 must not read the folder of a stage before process 0 has written it."""
    assert_ran(runs.forked['until_two'])
    one, two = runs.ckpt('stages/2'), runs.ckpt('stages_two/2')
    for key, value in one['net_model'].items():
        assert torch.allclose(value, two['net_model'][key], atol=1e-4), key


def test_classifier_ends_with_a_summary(runs):
    assert_ran(runs.made)
    assert_finished(runs.made[0][1], runs.classifier.split('=')[1], 2)


def assert_finished(out, folder, steps):
    """The last line has the steps of this start, the time, the rate and the folder."""
    line = FINISHED.format(steps, re.escape(str(folder)))
    assert re.match(line, out.strip().splitlines()[-1]), out


# Mistakes: one sentence with the reason, exit code 2, nothing created

@pytest.mark.parametrize('name', sorted(MISTAKES))
def test_mistake(runs, name):
    code, _, err = runs.forked[name][0]
    assert code == (1 if name == 'port' else 2) and 'Traceback' not in err, err
    sentences = [line for line in err.splitlines() if ': error: ' in line]
    assert len(sentences) == 1 and 'Warning' not in err, err
    assert re.search(MISTAKES[name][0], sentences[0]), sentences[0]
    assert not os.path.exists(mistakes.new_folder(runs.folder, name))


def test_mistakes_change_nothing(runs):
    assert set(runs.forked) == set(MISTAKES) | set(runs.good)
    assert sorted(path.name for path in (runs.folder / 'bad').iterdir()) == sorted(
        mistakes.INPUTS)
    assert runs.ckpt('base')['T'] == runs.ckpt('bad/copy')['T'] == 8 and runs.ckpt('pd')['T'] == 4
    assert (runs.ckpt('base')['step'], runs.ckpt('bad/copy')['step']) == (4, 2)
    assert runs.ckpt('pd')['step'] == runs.ckpt('bad/of_rdd')['step'] == 4
    assert np.load(str(runs.stats))['mu'].shape == (144,)
