"""Shared by the tests: how scripts are started, in processes and in this one; flags of tiny runs,
a network that scores, comparisons, models of diffusers.
"""

import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from absl import flags
from PIL import Image

from classifier.networks import build_classifier
from runtime import checkpoint
from runtime.torchvision_cpu import torchvision
from score.reference import Statistics, save_statistics

FLAGS = flags.FLAGS
ROOT = Path(__file__).resolve().parent.parent
DATA = '--dataset=digits --batch_size=8 --num_workers=0 --sample_size=4 --log_step=1'.split()
NETWORK = [*DATA, '--img_size=8', '--ch=32', '--ch_mult=1', '--ch_mult=1', '--attn=1',
           '--num_res_blocks=1']
STEPS = ['--total_steps=4', '--save_step=2', '--sample_step=0']
BASE = ['train_base.py', *NETWORK, *STEPS, '--T=8', '--warmup=3', '--ema_decay=0.5']
PD = ['PD.py', *DATA, *STEPS, '--lr=1e-4']
RDD = ['train_rdd.py', *DATA, *STEPS, '--lr=1e-3', '--queue_size=64', '--queue_update=10',
       '--contrast_size=16', '--relation_group=2', '--temperature=0.1',
       '--intra_temperature=0.05', '--classifier=densenet_small']
EVAL = ['ddim_eval.py', '--num_images=20', '--batch_size=8', '--sample_size=4']
# a line of results.jsonl
RESULT = dict(fid=1., inception_score=2., inception_std=.1, nfe=4, seed=0, num_images=9,
              reference='r', reference_images=9, feature_network='n', pixels='8-bit',
              amp='none')


def environment(**more):
    """That of a shell on a machine without a GPU, for processes with one thread."""
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', **more)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        env.pop(name, None)
    return env


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as free:
        return str(free.getsockname()[1])


def start(words):
    """A command as typed in a shell, `python` in front; returns a finished process."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=str(ROOT), env=environment(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)


@functools.lru_cache(None)
def fork_server():
    """forks.py, which ends with this process."""
    return subprocess.Popen([sys.executable, 'tests/forks.py'], cwd=str(ROOT), env=environment(),
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)


def fork_all(jobs):
    """{name: [(exit code, stdout, stderr), ..]} of many runs, cheaper than `start`: forks.py.

    They get the environment of the first call, and what a `command` adds to it as `env`.
    """
    server = fork_server()
    print(json.dumps(jobs), file=server.stdin, flush=True)
    answer = server.stdout.readline()
    if not answer:
        fork_server.cache_clear()
    assert answer, 'tests/forks.py has ended, see its traceback'
    return json.loads(answer)


def command(argv, *more, **extra):
    """A command for `fork_all`."""
    return dict(argv=[*argv, *map(str, more)], **extra)


def is_locked(folder):
    """Whether another process would find the folder of a run in use."""
    code = 'import fcntl, sys; fcntl.lockf(open(sys.argv[1], "a+"), fcntl.LOCK_EX | fcntl.LOCK_NB)'
    done = start(['-c', code, f'{folder}/.lock'])
    assert done.returncode == 0 or 'BlockingIOError' in done.stderr
    return done.returncode != 0


def assert_ran(results, codes=None):
    """The exit codes of `fork_all`, 0 if none are given; no traceback."""
    codes = codes or [0] * len(results)
    assert [result[0] for result in results] == codes, results[-1][2]
    assert not any('Traceback' in result[2] for result in results)


def assert_refused(result, sentence, code=2):
    """A script of `fork_all` ended with one sentence, which fits a regular expression."""
    found, _, err = result
    assert found == code and 'Traceback' not in err and 'Warning' not in err, err
    line, = [line for line in err.splitlines() if ': error: ' in line]
    assert re.search(sentence, line), line


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


def log_of(logdir):
    """The lines of metrics.jsonl, less speed and memory, which depend on the machine."""
    lines = (Path(logdir) / 'metrics.jsonl').read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    for line in lines:
        del line['images_per_s'], line['memory_mb']
    return lines


def assert_same_runs(one, other):
    """The same log, and the same bits in the checkpoints, whose flags alone name their folder."""
    assert_same(checkpoint.read(one), checkpoint.read(other), skip=['flags'])
    assert log_of(one) == log_of(other)


class Call:
    """An object whose pickle is a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# Scripts in the process of the tests

@contextlib.contextmanager
def parsing(define):
    """Gives parse('--lr=1', ..): the command line of a script with the flags of `define()`."""
    before = set(FLAGS)
    define()
    own = set(FLAGS) - before

    def parse(*words):
        for name in own:
            FLAGS[name].unparse()
        assert FLAGS(['script', *map(str, words)]) == ['script']      # no other words

    yield parse
    for name in own:
        delattr(FLAGS, name)


def picture(path, red=9):
    """A file of 8 x 8 pixels of one colour, whose format does not depend on its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8), (red, 0, 0)).save(str(path), 'BMP')


def make_scorer(folder, name='convnet_small'):
    """Write classifier.pt, not trained, and stats.npz; returns flags that score with them."""
    network = build_classifier(name, 10)
    checkpoint.save(folder / 'classifier.pt', dict(model=network.state_dict(), name=name))
    size = network.num_features
    save_statistics(folder / 'stats.npz', Statistics(np.zeros(size), np.eye(size)))
    return [f'--fid_cache={folder}/stats.npz', f'--feature_network={folder}/classifier.pt']


# Models of diffusers and ours

SMALL = dict(sample_size=8, layers_per_block=1, block_out_channels=(32, 64),
             down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
             up_block_types=('AttnUpBlock2D', 'UpBlock2D'))       # for UNet2DModel


def diffusers():
    """The package; without it, the test is skipped."""
    torchvision()       # diffusers imports it if it is installed
    return pytest.importorskip('diffusers', reason='optional, see requirements-export.txt')


def noise(count=3, size=8):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def our_images(model, x_T, y=None, stride=1):
    return model.diffusion.sample(model.network, x_T, stride, y=y)


@torch.no_grad()
def their_images(unet, scheduler, z, y=None):
    """By a scheduler of diffusers, at its timesteps."""
    for t in scheduler.timesteps:
        out = unet(z, t, y)
        z = scheduler.step(getattr(out, 'sample', out), t, z,
                           use_clipped_model_output=True).prev_sample
    return z.clamp(-1, 1)
