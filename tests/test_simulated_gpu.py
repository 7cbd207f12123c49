"""The scripts' own steps as on a GPU, on a machine without one: tensors are on torch's meta device.

They have a shape and no values. To read one (`.item()`, `bool(tensor)`, `.cpu()`, a mask as an
index) raises where the host would wait for a GPU; so does an operation on tensors of two devices.
Each script is run by this file, in a fork, and ends in its third step or batch.

Not simulated: values, memory, time, streams, pinned memory, autocast, DDP and NCCL.
"""

import contextlib
import itertools
import runpy
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from helpers import BASE, EVAL, PD, RDD, ROOT, assert_ran, command, fork_all, make_scorer
from runtime import checkpoint, distributed, optim, seeding
from score.metrics import ActivationStats
from wiring import random_unet, save_model

GPU = torch.device('meta')


class OneDevice(TorchDispatchMode):
    """Inside, an operation on tensors of two devices raises; single numbers and copies may be."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        values, _ = tree_flatten((args, kwargs))
        devices = {v.device.type for v in values if isinstance(v, torch.Tensor) and v.dim()}
        if len(devices) > 1 and func is not torch.ops.aten.copy_.default:
            raise RuntimeError(f'{func} on tensors of {" and ".join(sorted(devices))}')
        return func(*args, **(kwargs or {}))


class Generator(torch.Generator):
    """A generator of the CPU whose `device` is the simulated GPU, which has none of its own."""

    device = GPU


def adam_step(adam):
    """In place of the fused kernel, which the meta device does not have."""
    params = adam.param_groups[0]['params']
    assert {v.device for p in params for v in (p, p.grad, adam.found_inf)} == {GPU}
    for p in params:        # weights are laid out as their gradients are on a GPU, see losses.py
        assert p.dim() < 4 or p.stride() == p.to(memory_format=torch.channels_last).stride()


def ending(function):
    """`function`, whose third call ends the script."""
    calls = itertools.count(1)

    def call(*args, **how):
        if next(calls) == 3:
            print('reached step 3')
            sys.exit()
        return function(*args, **how)
    return call


def main():
    """Run a script, whose name and flags are the command line, on the simulated GPU."""
    sys.path.insert(0, str(ROOT))        # for what the script imports

    def generator(device, *key):
        kind = Generator if torch.device(device) == GPU else torch.Generator
        return kind().manual_seed(seeding.mix(*key))

    checkpoint.digest = lambda weights: 'no values'     # read at the start, not in a step
    distributed.init = lambda *_: GPU
    seeding.generator = generator
    torch.optim.Adam.step = adam_step
    torch.autocast = lambda *_, **__: contextlib.nullcontext()
    optim.learning_rate = ending(optim.learning_rate)
    ActivationStats.update = ending(ActivationStats.update)
    del sys.argv[0]
    with OneDevice():
        runpy.run_path(sys.argv[0], run_name='__main__')


def test_devices_agree_and_the_host_never_waits(tmp_path):
    save_model(tmp_path / 'teacher', random_unet())
    scorer = make_scorer(tmp_path, 'densenet_small')
    # grids, checkpoints and log lines read values, and are not due in these steps
    steps = ['--save_step=0', '--log_step=9', '--total_steps=9']
    distil = ['--grad_accum=2', f'--base_ckpt={tmp_path}/teacher', *steps]
    runs = dict(
        base=[*BASE, '--dropout=0.1', '--conditional', *steps, f'--logdir={tmp_path}/base'],
        pd=[*PD, '--ema_decay=0.9', *distil, f'--logdir={tmp_path}/pd'],
        rdd=[*RDD, '--alpha=0.1', '--beta=0.5', '--logits', '--gt', *distil,
             f'--classifier_path={tmp_path}/classifier.pt', f'--logdir={tmp_path}/rdd'],
        evaluation=[*EVAL, f'--logdir={tmp_path}/teacher', *scorer])
    results = fork_all({name: [command(['tests/test_simulated_gpu.py', *words])]
                        for name, words in runs.items()})
    for result in results.values():
        assert_ran(result)
        assert result[0][1].endswith('reached step 3\n')


def test_the_simulation_notices():
    """Another device, and a wait for a value."""
    x = torch.ones(3, device=GPU)
    for wrong in (lambda: x + torch.ones(3), lambda: x[torch.tensor([0])], lambda: x[x > 0]):
        with OneDevice(), pytest.raises(RuntimeError, match='(?i)meta'):
            wrong()


if __name__ == '__main__':
    main()
