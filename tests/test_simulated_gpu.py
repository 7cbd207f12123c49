"""The scripts' own steps on a simulated GPU: devices agree, the host never waits, few operations.

No GPU is needed, only a C++ compiler. What this cannot see: values, time, memory, streams, pinned
memory, CUDA's random numbers, DDP and NCCL, fused kernels (Adam's is replaced by a check of devices
and layouts; SiLU's backward and attention count as the operations they are made of), and what
happens when a log line, a grid or a checkpoint is due. The loop of `Run` is replaced by one that
writes nothing, images and frozen networks are stand-ins, and ddim_eval.py's clock is replaced: it
waits for the GPU twice per batch, to time the sampler.
"""

import pytest

from tools import inductor, launches, simulated_gpu

# operations on the device in a step, as counted, rounded up; before: 1,403 2,153 3,533 6,143 8,068
CIFAR10 = [
    ('base', 'none', 1160), ('base', 'bf16', 1750),
    ('pd', 'bf16', 2510), ('rdd', 'none', 3650), ('rdd', 'bf16', 4530)]
DIGITS = [      # one process of four, parts, dropout, every loss
    ('base', '--amp=bf16 --dropout=0.1 --ranks=4', 1000),
    ('pd', '--amp=none --until=0 --grad_accum=2', 2090),
    ('rdd', '--amp=bf16 --ranks=4 --grad_accum=2 --alpha=0.1 --beta=0.5 --logits --gt', 4240)]


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    try:
        return simulated_gpu.build(tmp_path_factory.mktemp('simulated_gpu'))
    except simulated_gpu.NotHere as error:
        pytest.skip(f'no GPU can be simulated: {error}')


@pytest.mark.parametrize('row, amp, most', CIFAR10)
def test_cifar10(library, row, amp, most):
    found = launches.measured(library, row, launches.cifar10(row), f'--amp={amp}')
    assert 0.9 * most < found['total'] <= most


@pytest.mark.parametrize('row, words, most', DIGITS)
def test_digits(library, row, words, most):
    flagfile = f'--flagfile=config/DIGITS_{row.upper()}.txt'
    found = launches.measured(library, row, flagfile, *words.split())
    assert 0.9 * most < found['total'] <= most


@pytest.mark.parametrize('words, most', [
    ('CIFAR10_EVAL.txt --num_images=256 --stride=8 --amp=bf16', 670),
    ('DIGITS_EVAL.txt --amp=none --stride=4 --ranks=4', 425)])
def test_evaluation(library, words, most):
    found = launches.measured(library, 'eval', *f'--flagfile=config/{words}'.split())
    assert 0.9 * most < found['total'] <= most


def test_compiled(library):
    """The networks of a step become kernels of Inductor; what is around them stays."""
    if not inductor.has_triton():
        pytest.skip('Triton is not installed, which Inductor needs for the code of a GPU')
    words = '--flagfile=config/DIGITS_PD.txt --amp=none --until=0'.split()
    eager = launches.measured(library, 'pd', *words)
    compiled = launches.measured(library, 'pd', *words, '--compile')
    kernels, calls = (compiled['operations'][kind] for kind in inductor.KINDS)
    assert 0 < compiled['total'] - kernels - calls < 0.2 * eager['total'] and kernels < 700
    convolutions = eager['operations']['aten.convolution.default']
    assert calls >= convolutions + eager['operations']['aten.convolution_backward.default']


def test_nothing_grows_with_the_processes(library):
    """One step of a process of 2 and of 64 that share a batch: drawn, sent, started."""
    words = '--flagfile=config/DIGITS_RDD.txt --amp=none --dropout=0.1 --batch_size=128'
    few, many = (launches.measured(library, 'rdd', *words.split(), f'--ranks={ranks}')
                 for ranks in (2, 64))
    assert many['drawn'] <= few['drawn'] and many['sent'] <= few['sent']
    assert many['total'] <= few['total'] and few['sent'] > 0


CODE = """
import torch
from tools.simulated_gpu import GPU, simulated_gpu
def refused(function):
    try:
        return function() is None
    except Exception:
        return True
with simulated_gpu() as counter:
    x = torch.ones(3, device=GPU)
    counter.take()
    (x + 1).view(1, 3).t()
    print(sum(counter.take()[0].values()), refused(lambda: x + torch.ones(3)),
          refused(x[0].item), refused(x.tolist), refused(lambda: bool(x[0] > 0)))
"""


def test_the_simulation_notices(library):
    """Another device, and every way to wait for a value; a view is no operation."""
    done = simulated_gpu.start(library, ['-c', CODE])
    assert done.stdout.split() == ['1', 'True', 'True', 'True', 'True'], done.stderr
