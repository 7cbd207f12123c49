"""The scripts as users launch them: the whole chain, resuming, several processes, and mistakes."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import (BASE, EVAL, FINISHED, PD, RDD, ROOT, assert_ran, assert_same_runs, command,
                     environment, fork_all, launch, log_of, port)
from runtime import checkpoint

DROPOUT = ['--dropout=0.1']
LONG = ['--total_steps=16', '--save_step=3', *DROPOUT]
FORTY = ['--total_steps=40', '--save_step=7', *DROPOUT]
CLASSIFIER = ['classifier/train.py', '--model=densenet_small', '--dataset=digits', '--img_size=8',
              '--seed=1', '--num_workers=0', '--log_step=1']


# Name of a mistake: (found and expected, as a regular expression; command and further words, of
# which the last value of a flag counts). RUNS: the folder of all runs; NEW: one that must not come
# into being.
MISTAKES = dict(
    word=('unexpected word "digits" on the command line; flags are written --name', 'base digits'),
    no_logdir=('--logdir is missing: the folder this run writes to', 'no_logdir'),
    range=('--temperature=0: 0.0 is not number >= 1e-06', 'rdd --temperature=0'),
    channels=('--ch is 33, expected a multiple of 32', 'base --ch=33'),
    size=('--img_size is 9, expected a multiple of 2: the network halves it 1 times',
          'base --img_size=9'),
    level=(r'--attn is \[1, 2\], expected resolutions from 0 to 1', 'base --attn=2'),
    no_terms=('--nofeature --loss_type none leaves no loss; add --logits',
              'rdd --nofeature --loss_type=none'),
    contrast=(r'--queue_size 64 is smaller than --contrast_size or --queue_update \(65\)',
              'rdd --contrast_size=65'),
    group=('--relation_group 3 does not divide the 8 images that a process works on',
           'rdd --relation_group=3'),
    share=('--batch_size 6 cannot be shared out .* 2 processes with --grad_accum 2; choose a '
           'multiple of 4', 'base --batch_size=6 --grad_accum=2'),
    small_set=('--batch_size 1500 is more than the 1498 training images of --dataset digits',
               'base --batch_size=1500'),
    port=('processes could not meet at 127.0.0.1:.* address already in use', 'base'),
    logdir_is_file=(r'--logdir .*/bad/file cannot be written to \(File exists\)',
                    'base --logdir=RUNS/bad/file'),
    other_run=(r'net_model of the checkpoint in .*/base does not fit .* \(9, 32\), .* \(9, 64\)',
               'base --logdir=RUNS/base --ch=64'))


class Runs:
    """Folders of all runs, and what the processes printed."""

    def __init__(self, folder):
        self.folder = folder
        self.classifier = f'--classifier_path={folder}/classifier/digits/densenet_small'
        self.scorer = self.classifier.replace('classifier_path', 'feature_network')
        self.pd = [*PD, f'--base_ckpt={folder}/base']
        self.rdd = [*RDD, f'--base_ckpt={folder}/pd', self.classifier]

    def command(self, words, name, *more, **how):
        return command([*words, f'--logdir={self.folder / name}'], *more, **how)

    def evaluation(self, name, *more, **how):
        words = [*EVAL, f'--fid_cache={self.folder}/digits.npz', self.scorer]
        return self.command(words, name, *more, **how)

    def ckpt(self, name):
        return checkpoint.read(self.folder / name)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The chain base -> PD -> RDD -> evaluation, and in forks the variants of its parts."""
    runs = Runs(tmp_path_factory.mktemp('runs'))
    launcher = dict(GROUP_WORLD_SIZE='1', LOCAL_WORLD_SIZE='2', TORCHELASTIC_RESTART_COUNT='0')
    rdd = runs.command([*runs.rdd, '--gpu_id=', '--num_gpus=2'], 'rdd', ranks=2, env=launcher)
    script, *words = rdd['argv']        # as torch.distributed.launch starts it
    rdd.update(argv=[script, '--local-rank=0', *words], last=[script, '--local-rank=1', *words])
    runs.forked = fork_all(dict(chain=[
        command(CLASSIFIER, '--epoch=1', '--max_steps=2', '--batchsize=32',
                f'--result_path={runs.folder}/classifier'),
        command(['score/get_npz.py', '--dataset=digits', '--img_size=8', runs.scorer,
                 '--max_images=50', f'--output={runs.folder}/digits.npz']),
        runs.command([*BASE, *DROPOUT], 'base', '--sample_step=1'),
        runs.command([*runs.pd, *DROPOUT], 'pd'),
        rdd, runs.evaluation('rdd')]))
    assert_ran(runs.forked['chain'])
    (runs.folder / 'bad').mkdir()
    (runs.folder / 'bad/file').write_text('')
    with socket.create_server(('127.0.0.1', 0)) as busy:
        runs.forked.update(fork_all(dict(good_jobs(runs), **bad_jobs(runs, busy))))
    return runs


def good_jobs(runs):
    def stopped(words, name, number, **how):
        """Stopped by a signal after some steps, then started again; and the whole run."""
        after = [number, str(runs.folder / name / 'metrics.jsonl'), 4]
        return {name: [runs.command(words, name, *LONG, signal=after, **how),
                       runs.command(words, name, *LONG, **how)],
                f'{name}_whole': [runs.command(words, f'{name}_whole', *LONG, **how)]}

    until = runs.command(runs.pd, 'stages', '--until=1', '--total_steps=1')
    base = [*BASE, *DROPOUT]
    return dict(
        stopped(runs.pd, 'pd_int', signal.SIGINT, ranks=2),
        **stopped(runs.rdd, 'rdd_kill', signal.SIGKILL),
        base_resumed=[runs.command(base, 'base_resumed', kill_after_save=True),
                      runs.command(base, 'base_resumed')],
        until=[until, until, runs.command(runs.pd, 'stages', '--until=1', '--total_steps=2')],
        until_two=[runs.command(runs.pd, 'stages_two', '--until=2', '--total_steps=1',
                                '--sample_step=1', ranks=2)],
        pd_eval=[runs.evaluation('pd', '--fid_float', '--batch_size=3'),
                 runs.evaluation('pd', '--fid_float', ranks=2)])


def bad_jobs(runs, busy):
    """Those of MISTAKES, and processes with different flags; busy: a socket whose port is used."""
    launched = dict(
        share=dict(ranks=2),
        port=dict(env=dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1',
                           MASTER_PORT=str(busy.getsockname()[1]))))
    commands = dict(no_logdir=BASE, base=[*BASE, '--logdir=NEW'], rdd=[*runs.rdd, '--logdir=NEW'])
    base = [*BASE, f'--logdir={runs.folder}/bad/new']
    jobs = dict(disagree=[command(base, ranks=2, last=[*base, '--total_steps=9'])])
    for name, (_, text) in MISTAKES.items():
        start, *more = text.split()
        words = [word.replace('RUNS', str(runs.folder)).replace('NEW', f'{runs.folder}/bad/new')
                 for word in (*commands[start], *more)]
        jobs[name] = [command(words, **launched.get(name, {}))]
    return jobs


# What good runs leave behind

def test_checkpoints_of_the_chain(runs):
    base, pd, rdd = (runs.ckpt(name) for name in ('base', 'pd', 'rdd'))
    assert {'net_model', 'ema_model', 'x_T'} <= set(base) and 'ema_model' not in pd
    assert list(base['net_model']) == list(pd['net_model']) == list(rdd['net_model'])
    assert base['x_T'].shape == (4, 3, 8, 8)
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
    assert f'{result["fid"]:.3f}' in runs.forked['chain'][-1][1]


def test_evaluation_depends_neither_on_batches_nor_on_processes(runs):
    """Same noise, sums in float64: what is left is the rounding of the networks."""
    assert_ran(runs.forked['pd_eval'])
    one, two = map(json.loads, (runs.folder / 'pd/results.jsonl').read_text().splitlines())
    assert one['fid'] > .1
    for key in ('fid', 'inception_score', 'inception_std'):     # written with 4 decimals
        assert two[key] == pytest.approx(one[key], rel=1e-6, abs=1.01e-4)


@pytest.mark.parametrize('whole, resumed, code, steps', [
    ('base', 'base_resumed', 137, 4), ('pd_int_whole', 'pd_int', 130, 16),
    ('rdd_kill_whole', 'rdd_kill', -9, 16)])
def test_resuming_is_exact(runs, whole, resumed, code, steps):
    """Killed after a checkpoint; or by a signal to the last process, and all end after one step."""
    assert_ran(runs.forked[resumed], [code, 0])
    (_, first, _), (_, second, _) = runs.forked[resumed]
    assert ('SIGINT: stopped after step ' in first) == (code == 130)
    assert 'resuming at step ' in second
    assert_same_runs(runs.folder / whole, runs.folder / resumed)
    assert [line['step'] for line in log_of(runs.folder / whole)] == list(range(1, steps + 1))


def test_processes_that_disagree_do_not_train(runs):
    (code, out, err), = runs.forked['disagree']
    assert code == 2 and 'starting' not in out and 'Traceback' not in err, err
    assert re.search(r'were started with different scripts or flags \(.*--total_steps=4, '
                     r'--total_steps=9\)', err), err


def test_the_start_that_an_average_keeps_is_said(runs):
    """.5 ** 4 of it after four steps, 1 % with --ema_decay .01 ** (1 / 4)."""
    base, pd = (out for _, out, _ in runs.forked['chain'][2:4])
    assert 'will hold 6 % of the weights it starts from' in base and '--ema_decay 0.316.' in base
    assert 'will hold' not in pd        # a student has no average


def test_stages(runs):
    """Students of 2 steps and 1 train twice as long; finished stages are left alone."""
    assert_ran(runs.forked['until'][:2])
    first, second = (result[1] for result in runs.forked['until'][:2])
    for T, time_scale, steps in ((4, 2, 1), (2, 4, 2), (1, 8, 2)):
        student = runs.ckpt(f'stages/{T}')
        assert (student['T'], student['time_scale'], student['step']) == (T, time_scale, steps)
        line = FINISHED.format(steps, re.escape(f'{runs.folder}/stages/{T}'))
        assert re.search(line, first, re.MULTILINE), first
    assert second.count('is finished') == 3 and 'starting' not in second


def test_a_student_that_another_was_made_from_is_not_trained_further(runs):
    code, _, stderr = runs.forked['until'][2]
    assert code == 2 and 'Traceback' not in stderr
    assert re.search('--total_steps 2 would go on .*stages/4, but .*stages/2 holds', stderr)
    assert runs.ckpt('stages/4')['step'] == 1


def test_stages_on_two_processes_start_from_the_finished_teacher(runs):
    """Process 1 must not read the folder of a stage before process 0 has written it."""
    assert_ran(runs.forked['until_two'])
    assert 'waiting for all of 2 processes at ' in runs.forked['until_two'][0][1]
    one, two = runs.ckpt('stages/2'), runs.ckpt('stages_two/2')
    for key, value in one['net_model'].items():
        assert torch.allclose(value, two['net_model'][key], atol=1e-4), key


def test_two_machines(tmp_path):
    """torchrun on each, here on one: two processes, of which the first one's prints and writes."""
    address, nodes = f'127.0.0.1:{port()}', []
    for node in (0, 1):
        words = ['-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--rdzv_id=7',
                 '--rdzv_backend=c10d', f'--rdzv_endpoint={address}',
                 f'--rdzv_conf=is_host={int(node == 0)}', '--local_addr=127.0.0.1', *BASE,
                 f'--logdir={tmp_path}/run']
        nodes.append(subprocess.Popen([sys.executable, *words], cwd=str(ROOT), env=environment(),
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      universal_newlines=True))
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sorted('2 processes over gloo' in out for out, _ in outputs) == [False, True]
    assert checkpoint.read(tmp_path / 'run')['step'] == 4


# Mistakes: one sentence with the reason, exit code 2, nothing created

@pytest.mark.parametrize('name', sorted(MISTAKES))
def test_mistake(runs, name):
    code, _, err = runs.forked[name][0]
    assert code == (1 if name == 'port' else 2) and 'Traceback' not in err, err
    sentences = [line for line in err.splitlines() if ': error: ' in line]
    assert len(sentences) == 1 and 'Warning' not in err, err
    assert re.search(MISTAKES[name][0], sentences[0]), sentences[0]


def test_mistakes_change_nothing(runs):
    assert sorted(path.name for path in (runs.folder / 'bad').iterdir()) == ['file']
    for name, T, step in (('base', 8, 4), ('pd', 4, 4), ('rdd', 2, 4)):
        assert (runs.ckpt(name)['T'], runs.ckpt(name)['step']) == (T, step)


# Killed again and again: slow, python -m pytest -m slow tests/test_scripts.py

@pytest.mark.slow
@pytest.mark.parametrize('name', ['base', 'pd', 'rdd', 'classifier'])
def test_signals_at_random_steps(runs, name):
    """Also before the first checkpoint, while one is written, and right after a start."""
    if name == 'classifier':
        words = [*CLASSIFIER, '--recipe=released', '--epoch=3', '--batchsize=64']
        flag, below = '--result_path', '/digits/densenet_small'
    else:
        words = [*dict(base=BASE, pd=runs.pd, rdd=runs.rdd)[name], *FORTY]
        flag, below = '--logdir', ''
    whole, killed = f'{runs.folder}/{name}_whole', f'{runs.folder}/{name}_killed'
    rng = random.Random(name)
    kinds = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    again = [command(words, f'{flag}={killed}',
                     signal=[rng.choice(kinds), f'{killed}{below}/metrics.jsonl', step])
             for step in sorted(rng.sample(range(1, 40), 5))]
    made = fork_all(dict(whole=[command(words, f'{flag}={whole}')],
                         killed=[*again, command(words, f'{flag}={killed}')]))
    assert_ran(made['whole'])
    assert made['killed'][-1][0] == 0 and any(code for code, *_ in made['killed'])
    assert_same_runs(whole + below, killed + below)


@pytest.mark.slow
def test_restarts_by_torchrun(runs):
    """A worker is killed twice, and torchrun starts both of them again."""
    start = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    words = [*runs.rdd, *FORTY, f'--logdir={runs.folder}/two']
    launch([*start, *words, f'--logdir={runs.folder}/two_whole'])
    launcher = subprocess.Popen([sys.executable, *start, '--max-restarts=3', *words], cwd=str(ROOT),
                                env=environment(), stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)
    log = runs.folder / 'two/metrics.jsonl'
    for step in (12, 30):
        while not log.exists() or log.read_text().count('\n') < step:
            assert launcher.poll() is None
            time.sleep(.02)
        workers = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
        os.kill(int(random.Random(step).choice(workers)), signal.SIGKILL)
        time.sleep(5)           # until torchrun has noticed
    assert launcher.wait() == 0
    assert_same_runs(f'{runs.folder}/two_whole', f'{runs.folder}/two')
