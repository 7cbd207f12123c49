"""Trainings that are killed again and again end as if they had not been: weights, moments, log.

Slow, and not run by default: python -m pytest -m slow tests/test_interrupted.py
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import (BASE, PD, RDD, ROOT, assert_ran, assert_same_runs, command, environment,
                     fork_all, launch)

pytestmark = pytest.mark.slow
STEPS = ['--total_steps=40', '--save_step=7', '--dropout=0.1']


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
    """{name: command without its folder}, and the folder of all runs."""
    folder = tmp_path_factory.mktemp('interrupted')
    launch([*BASE, f'--logdir={folder}/teacher'])
    classifier = ['classifier/train.py', '--model=densenet_small', '--dataset=digits', '--seed=0',
                  '--num_workers=0', '--log_step=1']
    launch([*classifier, '--epoch=1', '--max_steps=2', f'--result_path={folder}/made'])
    teacher = f'--base_ckpt={folder}/teacher'
    return dict(
        base=[*BASE, *STEPS], pd=[*PD, *STEPS, teacher],
        rdd=[*RDD, *STEPS, teacher, f'--classifier_path={folder}/made/digits/densenet_small'],
        classifier=[*classifier, '--recipe=released', '--epoch=3', '--batchsize=64']), folder


@pytest.mark.parametrize('name', ['base', 'pd', 'rdd', 'classifier'])
def test_signals_at_random_steps(commands, name):
    """Also before the first checkpoint, while one is written, and right after a start."""
    words, folder = commands[0][name], commands[1]
    flag, below = ('--result_path', '/digits/densenet_small') if name == 'classifier' else (
        '--logdir', '')
    whole, killed = f'{folder}/{name}_whole', f'{folder}/{name}_killed'
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


def test_restarts_by_torchrun(commands):
    """A worker is killed twice, and torchrun starts both of them again."""
    words, folder = commands[0]['rdd'], commands[1]
    start = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    launch([*start, *words, f'--logdir={folder}/two_whole'])
    launcher = subprocess.Popen(
        [sys.executable, *start, '--max-restarts=3', *words, f'--logdir={folder}/two_killed'],
        cwd=str(ROOT), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = folder / 'two_killed/metrics.jsonl'
    for step in (12, 30):
        while not log.exists() or log.read_text().count('\n') < step:
            assert launcher.poll() is None
            time.sleep(.02)
        workers = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
        os.kill(int(random.Random(step).choice(workers)), signal.SIGKILL)
        time.sleep(5)           # until torchrun has noticed
    assert launcher.wait() == 0
    assert_same_runs(f'{folder}/two_whole', f'{folder}/two_killed')
