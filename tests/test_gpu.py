"""On a real GPU: the scripts as a user starts them, and its numbers against those of the CPU."""

import os
import subprocess
import sys

import pytest
import torch

from helpers import BASE, EVAL, PD, RDD, ROOT, free_port, log_of, make_scorer
from losses import MemoryP2P, feature_kl, intra_sample_p2p
from wiring import random_unet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='torch finds no GPU here')
# a group of one process, which no launcher makes: NCCL, DDP and a gloo group of the hosts
NCCL = ['-c', """
import runpy, sys, torch
sys.path.insert(0, '')
from runtime import distributed
torch.cuda.set_device(0)
distributed.join(torch.device('cuda', 0), 1)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""]
RANK = dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1')


def run(words, *more, launcher=(), **env):
    """A script, which has to use the GPU; returns what it printed."""
    done = subprocess.run([sys.executable, *launcher, *words, *map(str, more)], cwd=str(ROOT),
                          env=dict(os.environ, **env), universal_newlines=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and 'No GPU found' not in done.stdout, done.stdout[-3000:]
    return done.stdout


@pytest.mark.parametrize('how', [
    '--amp=none', '--amp=bf16', pytest.param('--compile', marks=pytest.mark.slow)])
def test_all_scripts_on_the_gpu(how, tmp_path):
    """Teacher, PD, classifier, RDD, DMD with one process over NCCL, scores."""
    base, student, rdd, dmd = (tmp_path / name for name in ('base', 'pd', 'rdd', 'dmd'))
    run(BASE, how, '--T=16', f'--logdir={base}')
    run(PD, how, f'--base_ckpt={base}', f'--logdir={student}')
    run(['classifier/train.py'], '--dataset=digits', '--model=densenet_small', '--epoch=1',
        '--max_steps=3', how, f'--result_path={tmp_path}')
    run(RDD, how, f'--base_ckpt={student}', f'--logdir={rdd}', '--until=1',
        f'--classifier_path={tmp_path}/digits/densenet_small')
    run(['train_dmd.py', *RDD[1:9]], how, f'--teacher_ckpt={base}', f'--base_ckpt={rdd}/1',
        f'--logdir={dmd}', launcher=NCCL, **RANK, MASTER_PORT=free_port())
    for logdir, steps in ((base, 4), (student, 4), (rdd / '1', 8), (dmd, 4)):
        assert len(log_of(logdir)) == steps
    assert 'Frechet distance' in run(EVAL, how, f'--logdir={dmd}', *make_scorer(tmp_path))


def test_a_resumed_run_ends_like_another(tmp_path):
    """The same random numbers; kernels of a GPU may add in another order."""
    once, twice = ([*BASE, '--amp=none', f'--logdir={tmp_path / name}'] for name in 'ab')
    run(once)
    run(twice, '--total_steps=2')
    assert 'resum' in run(twice).lower()
    a, b = log_of(tmp_path / 'a'), log_of(tmp_path / 'b')
    assert len(a) == len(b) == 4
    for one, other in zip(a, b):
        assert one == pytest.approx(other, rel=1e-4)


def test_network_and_losses_as_on_the_cpu(monkeypatch):
    """In float32 without TF32: outputs, losses and gradients."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    found = []
    for device in ('cpu', 'cuda'):
        rng = torch.Generator().manual_seed(0)
        x, S, T = (torch.randn(shape, generator=rng).to(device).requires_grad_()
                   for shape in ((4, 3, 8, 8), (4, 32, 4, 4), (4, 32, 4, 4)))
        net = random_unet().to(device, memory_format=torch.channels_last)
        torch.manual_seed(0)
        memory = MemoryP2P(32, queue_size=64, contrast_size=16, update_size=8).to(device)
        memory.enqueue(memory.pixels_at(T, torch.arange(8), 0, 4))
        losses = [net(x, torch.arange(4, device=device)).square().mean(),
                  feature_kl(S.mean((2, 3)), T.detach().mean((2, 3)), .9),
                  intra_sample_p2p(S, T, .1, 2), memory(memory.project_head(S), T)]
        sum(losses).backward()
        found.append([v.detach().cpu() for v in (*losses, x.grad, S.grad, memory.queue)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
