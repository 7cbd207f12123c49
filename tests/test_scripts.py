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

from helpers import (BASE, EVAL, PD, RDD, ROOT, assert_ran, assert_refused, assert_same_runs,
                     command, environment, fork_all, free_port, log_of, start)
from runtime import checkpoint

DENSENET = 'classifier/digits/densenet_small'
DIGITS = ['--dataset=digits', '--img_size=8', '--num_workers=0', '--batch_size=32']
# RUNS stands for the folder of all runs
SCRIPTS = dict(
    base=[*BASE, '--dropout=0.1'], pd=[*PD, '--base_ckpt=RUNS/base'],
    rdd=[*RDD, '--base_ckpt=RUNS/pd', f'--classifier_path=RUNS/{DENSENET}'],
    eval=[*EVAL, '--fid_cache=RUNS/digits.npz', f'--feature_network=RUNS/{DENSENET}'])
LONG = ['--total_steps=16', '--save_step=3', '--dropout=0.1']
FORTY = ['--total_steps=40', '--save_step=7', '--dropout=0.1']

# name of a mistake: (what the sentence must have; script and further words)
MISTAKES = dict(
    no_logdir=('--logdir is missing: the folder this run writes to', 'base --logdir='),
    range=('--temperature=0: 0.0 is not number >= 1e-06', 'rdd --temperature=0'),
    channels=('--ch is 33, expected a multiple of 32', 'base --ch=33'),
    size=('--img_size is 9, expected a multiple of 2: .* halves it 1 times', 'base --img_size=9'),
    level=(r'--attn is \[1, 2\], expected resolutions from 0 to 1', 'base --attn=2'),
    no_terms=('none leaves no loss; add --logits', 'rdd --nofeature --loss_type=none'),
    contrast=(r'--queue_size 64 is smaller than .* \(65\)', 'rdd --contrast_size=65'),
    group=('--relation_group 3 does not divide the 8 images', 'rdd --relation_group=3'),
    share=('6 cannot .* 2 processes .* multiple of 4', 'base --batch_size=6 --grad_accum=2'),
    small_set=('1500 is more than the 1498 training images', 'base --batch_size=1500'),
    logdir_is_file=(r'cannot be written to \(File exists\)', 'base --logdir=RUNS/bad/file'),
    disagree=('different scripts or flags .*--total_steps=4, --total_steps=9', 'base'),
    port=('processes could not meet at 127.0.0.1:.* address already in use', 'base'))


def started(folder, script, name, *more, **how):
    """The command that runs a script into folder/name."""
    words = *SCRIPTS[script], f'--logdir=RUNS/{name}', *more
    return command([word.replace('RUNS', str(folder)) for word in words], **how)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """(folder, results): the chain base -> PD -> RDD -> evaluation, and in forks the variants."""
    folder = tmp_path_factory.mktemp('runs')
    launcher = dict(GROUP_WORLD_SIZE='1', LOCAL_WORLD_SIZE='2', TORCHELASTIC_RESTART_COUNT='0')
    rdd = started(folder, 'rdd', 'rdd', '--gpu_id=', '--num_gpus=2', '--local-rank=0', ranks=2,
                  env=launcher)
    rdd['last'] = [*rdd['argv'][:-1], '--local-rank=1']     # as torch.distributed.launch starts it
    results = fork_all(dict(chain=[
        command(['classifier/train.py', *DIGITS, '--model=densenet_small', '--seed=1',
                 '--max_steps=2', f'--result_path={folder}/classifier']),
        command(['score/get_npz.py', *DIGITS, '--max_images=50', f'--output={folder}/digits.npz',
                 f'--feature_network={folder}/{DENSENET}']),
        started(folder, 'base', 'base', '--sample_step=1'), started(folder, 'pd', 'pd'), rdd,
        started(folder, 'eval', 'rdd')]))
    assert_ran(results['chain'])
    (folder / 'bad').mkdir()
    (folder / 'bad/file').write_text('')
    with socket.create_server(('127.0.0.1', 0)) as busy:
        jobs = dict(good_jobs(folder), **bad_jobs(folder, str(busy.getsockname()[1])))
        results.update(fork_all(jobs))
    return folder, results


def good_jobs(folder):
    def stopped(script, number, **how):
        """Stopped by a signal after some steps, then started again; and the whole run."""
        after = [number, f'{folder}/{script}_stopped/metrics.jsonl', 4]
        again = started(folder, script, f'{script}_stopped', *LONG, **how)
        return {f'{script}_stopped': [dict(again, signal=after), again],
                f'{script}_long': [started(folder, script, f'{script}_long', *LONG, **how)]}

    until = started(folder, 'pd', 'stages', '--until=1', '--total_steps=1')
    return dict(
        stopped('pd', signal.SIGINT, ranks=2), **stopped('rdd', signal.SIGKILL),
        until=[until, until, started(folder, 'pd', 'stages', '--until=1', '--total_steps=2')],
        until_two=[started(folder, 'pd', 'stages_two', '--until=2', '--total_steps=1',
                           '--sample_step=1', ranks=2)],
        pd_eval=[started(folder, 'eval', 'pd', '--fid_float', '--batch_size=3'),
                 started(folder, 'eval', 'pd', '--fid_float', ranks=2)])


def bad_jobs(folder, busy_port):
    jobs = {}
    for name, (_, text) in MISTAKES.items():
        script, *more = text.split()
        jobs[name] = [started(folder, script, 'bad/new', *more)]
    jobs['share'][0]['ranks'] = jobs['disagree'][0]['ranks'] = 2
    jobs['disagree'][0]['last'] = [*jobs['disagree'][0]['argv'], '--total_steps=9']
    jobs['port'][0]['env'] = dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0',
                                  MASTER_ADDR='127.0.0.1', MASTER_PORT=busy_port)
    return jobs


# What good runs leave behind

def test_network_and_size_come_from_the_teacher(runs):
    """No flag gave them; the resolved flags have them."""
    for name in ('pd', 'rdd'):
        found = (runs[0] / name / 'flagfile.txt').read_text().split()
        assert {'--img_size=8', '--ch=32', '--num_res_blocks=1', '--attn=1'} <= set(found)
        assert found.count('--ch_mult=1') == 2


def test_what_the_chain_prints(runs):
    """The distance; and the start that an average keeps: .5 ** 4 of it after four steps."""
    folder, results = runs
    base, pd, _, score = (out for _, out, _ in results['chain'][2:])
    assert 'will hold 6 % of the weights it starts from' in base and '--ema_decay 0.316.' in base
    assert 'will hold' not in pd        # a student has no average
    assert '--warmup 3 is more than half of the 4 steps' in base and 'half of' not in pd
    result = json.loads((folder / 'rdd/results.jsonl').read_text())
    assert result['nfe'] == 2 and f'distance {result["fid"]:.3f}' in score


def test_evaluation_depends_neither_on_batches_nor_on_processes(runs):
    """Same noise, sums in float64: what is left is the rounding of the networks."""
    folder, results = runs
    assert_ran(results['pd_eval'])
    one, two = map(json.loads, (folder / 'pd/results.jsonl').read_text().splitlines())
    assert one['fid'] > .1
    for key in ('fid', 'inception_score', 'inception_std'):     # written with 4 decimals
        assert two[key] == pytest.approx(one[key], rel=1e-6, abs=1.01e-4)


@pytest.mark.parametrize('script, code', [('pd', 130), ('rdd', -9)])
def test_resuming_is_exact(runs, script, code):
    """Killed; or by a signal to the last of two processes, and both save and end after one step."""
    folder, results = runs
    assert_ran(results[f'{script}_stopped'], [code, 0])
    (_, first, _), (_, second, _) = results[f'{script}_stopped']
    stopped = re.search(r'SIGINT: stopped after step (\d+), saved in', first)
    assert f'resuming at step {stopped.group(1) if code == 130 else ""}' in second
    assert_same_runs(folder / f'{script}_long', folder / f'{script}_stopped')
    assert [line['step'] for line in log_of(folder / f'{script}_long')] == list(range(1, 17))


def test_stages(runs):
    """Students of 2 steps and 1 train twice as long; finished stages are left alone, and no
    student that another one was made from is trained further."""
    folder, results = runs
    assert_ran(results['until'], [0, 0, 2])
    first, second, third = results['until']
    for T, time_scale, steps in ((4, 2, 1), (2, 4, 2), (1, 8, 2)):
        student = checkpoint.read(folder / f'stages/{T}')
        assert (student['T'], student['time_scale'], student['step']) == (T, time_scale, steps)
        line = rf'^finished: {steps} steps? in .* are in {folder}/stages/{T}$'
        assert re.search(line, first[1], re.MULTILINE), first
    assert second[1].count('is finished') == 3 and 'starting' not in second[1]
    assert re.search('--total_steps 2 would go on .*stages/4, but .*stages/2 holds', third[2])


def test_stages_on_two_processes_start_from_the_finished_teacher(runs):
    """Process 1 must not read the folder of a stage before process 0 has written it."""
    folder, results = runs
    assert_ran(results['until_two'])
    assert 'waiting for all of 2 processes at ' in results['until_two'][0][1]
    one, two = (checkpoint.read(folder / f'{name}/2') for name in ('stages', 'stages_two'))
    for key, value in one['net_model'].items():
        assert torch.allclose(value, two['net_model'][key], atol=1e-4), key


def test_two_machines(tmp_path):
    """torchrun on each, here on one: two processes, of which the first one's prints and writes."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1',
                '--rdzv_id=7', '--rdzv_backend=c10d', f'--rdzv_endpoint=127.0.0.1:{free_port()}',
                '--local_addr=127.0.0.1']
    nodes = [subprocess.Popen(
        [*torchrun, f'--rdzv_conf=is_host={is_host}', *BASE, f'--logdir={tmp_path}/run'],
        cwd=str(ROOT), env=environment(), stdout=subprocess.PIPE, universal_newlines=True)
             for is_host in (1, 0)]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sorted('2 processes over gloo' in out for out in outputs) == [False, True]
    assert checkpoint.read(tmp_path / 'run')['step'] == 4


# Mistakes: one sentence with the reason, exit code 2, nothing created

@pytest.mark.parametrize('name', sorted(MISTAKES))
def test_mistake(runs, name):
    assert_refused(runs[1][name][0], MISTAKES[name][0], code=1 if name == 'port' else 2)


def test_mistakes_change_nothing(runs):
    assert [path.name for path in (runs[0] / 'bad').iterdir()] == ['file']


# Killed again and again: slow, python -m pytest -m slow tests/test_scripts.py

@pytest.mark.slow
@pytest.mark.parametrize('name', ['base', 'pd', 'rdd'])
def test_signals_at_random_steps(runs, name):
    """Also before the first checkpoint, while one is written, and right after a start."""
    whole, killed = (started(runs[0], name, f'{name}_{how}', *FORTY) for how in ('whole', 'killed'))
    rng, log = random.Random(name), f'{runs[0]}/{name}_killed/metrics.jsonl'
    kinds = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    again = [dict(killed, signal=[rng.choice(kinds), log, step])
             for step in sorted(rng.sample(range(1, 40), 5))]
    made = fork_all(dict(whole=[whole], killed=[*again, killed]))
    assert_ran(made['whole'])
    assert made['killed'][-1][0] == 0 and any(code for code, *_ in made['killed'])
    assert_same_runs(runs[0] / f'{name}_whole', runs[0] / f'{name}_killed')


@pytest.mark.slow
def test_restarts_by_torchrun(runs):
    """A worker is killed twice, and torchrun starts both of them again."""
    whole, killed = (['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                      '--max-restarts=3', *started(runs[0], 'rdd', name, *FORTY)['argv']]
                     for name in ('two_whole', 'two'))
    assert start(whole).returncode == 0
    launcher = subprocess.Popen([sys.executable, *killed], cwd=str(ROOT), env=environment(),
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = runs[0] / 'two/metrics.jsonl'
    for step in (12, 30):
        while not log.exists() or log.read_text().count('\n') < step:
            assert launcher.poll() is None
            time.sleep(.02)
        workers = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
        os.kill(int(random.Random(step).choice(workers)), signal.SIGKILL)
        time.sleep(5)           # until torchrun has noticed
    assert launcher.wait() == 0
    assert_same_runs(runs[0] / 'two_whole', runs[0] / 'two')
