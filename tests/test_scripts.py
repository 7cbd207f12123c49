"""The scripts as users launch them: the whole chain, resuming, several processes, and mistakes."""

import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import mistakes
from helpers import (BASE, EVAL, FINISHED, PD, RDD, ROOT, assert_ran, assert_same, command,
                     fork_all, launch, port)
from mistakes import MISTAKES
from runtime import checkpoint

DROPOUT = ['--dropout=0.1']
LONG = ['--total_steps=40', '--save_step=3']


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
        runs.classifier_said = launch([
            'train.py', '--model=densenet_small', '--dataset=digits', '--img_size=8', '--seed=1',
            '--epoch=1', '--max_steps=2', '--batchsize=32', '--num_workers=0',
            f'--result_path={runs.folder}/classifier'], ROOT / 'classifier')
        base.result()
        stats = pool.submit(launch, ['get_npz.py', '--dataset=digits', '--img_size=8',
                                     '--max_images=50', f'--output={runs.stats}', '--num_workers=0',
                                     '--feature_network', runs.classifier.split('=')[1]],
                            ROOT / 'score')
        launch([*PD, *DROPOUT, runs.teacher('base'), runs.to('pd')])
        mistakes.make_inputs(runs.folder)
        runs.good, runs.busy = good_jobs(runs), mistakes.busy_socket()
        refused = mistakes.jobs(runs.folder, runs.busy.getsockname()[1])
        forked = pool.submit(fork_all, dict(runs.good, **refused))
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
    assert 'is finished' not in first and first.count('finished: ') == 2
    assert second.count('is finished') == 2 and 'starting' not in second


@pytest.mark.parametrize('name, folder, steps', [
    ('base_two', 'base_two', 4), ('pd_two', 'pd_one', 4), ('rdd_whole', 'rdd_whole', 4),
    ('base_resumed', 'base_resumed', 2), ('pd_int', 'pd_int', None)])
def test_last_line_says_what_was_done(runs, name, folder, steps):
    """Steps of this start, which of a run that was stopped are not known here."""
    assert_finished(runs.forked[name][-1][1], runs.folder / folder, steps or '[0-9]+')


def test_every_stage_says_what_was_done(runs):
    lines = [line for line in runs.forked['until'][0][1].splitlines() if 'finished' in line]
    for line, T, steps in zip(lines, (4, 2), (2, 4)):
        assert_finished(line, runs.folder / f'stages/{T}', steps)
    assert len(lines) == 2


def test_classifier_says_what_was_done(runs):
    assert_finished(runs.classifier_said, runs.classifier.split('=')[1], 2)


def assert_finished(out, folder, steps):
    line = FINISHED.format(steps, re.escape(str(folder)))
    assert re.match(line, out.strip().splitlines()[-1]), out


def test_finished_run_is_left_alone(runs):
    assert_ran(runs.forked['finished'])
    assert 'is finished: step 1' in runs.forked['finished'][1][1]


# Mistakes: one sentence with the reason, exit code 2, nothing created

@pytest.mark.parametrize('name', sorted(MISTAKES))
def test_mistake(runs, name):
    code, _, err = runs.forked[name][0]
    assert code == (1 if name == 'port' else 2) and 'Traceback' not in err, err
    said = [line for line in err.splitlines() if ': error: ' in line]
    assert len(said) == 1 and 'Warning' not in err, err
    assert re.search(MISTAKES[name][0], said[0]), said[0]
    assert not os.path.exists(mistakes.new_folder(runs.folder, name))


def test_patterns_tell_mistakes_apart(runs):
    """A pattern that fits the sentence of a mistake of another kind says no reason."""
    alike = [{'cut', 'void'}, {'odd', 'one_step'}, {'no_classifier', 'network'},
             {'classifier_as_model', 'evaluate_classifier'}, {'no_folder', 'empty_folder'}]
    for name, (pattern, *_) in MISTAKES.items():
        fits = {other for other in MISTAKES if re.search(pattern, runs.forked[other][0][2])}
        assert fits == {name} or fits in alike, (name, fits)


def test_mistakes_change_nothing(runs):
    assert set(runs.forked) == set(MISTAKES) | set(runs.good)
    assert sorted(path.name for path in (runs.folder / 'bad').iterdir()) == sorted(
        [*mistakes.INPUTS, 'damaged'])
    assert runs.ckpt('base')['T'] == runs.ckpt('bad/copy')['T'] == 8 and runs.ckpt('pd')['T'] == 4
    assert (runs.ckpt('base')['step'], runs.ckpt('bad/copy')['step']) == (4, 2)
    assert runs.ckpt('pd')['step'] == runs.ckpt('bad/of_rdd')['step'] == 4
    assert np.load(str(runs.stats))['mu'].shape == (144,)
