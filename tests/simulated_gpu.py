"""Runs a script as on a GPU, on a machine without one: its tensors are on torch's meta device.

  python tests/simulated_gpu.py train_rdd.py [flags of the script]
Tensors on the meta device have a shape and no values. To read one (`.item()`, `bool(tensor)`,
`.cpu()`, a mask as an index) raises where the host would wait for a GPU; so does an operation on
tensors of two devices. The script ends in its third step or batch, before it writes results.

Not simulated: values, memory, time, streams, pinned memory, autocast, DDP and NCCL.
"""

import contextlib
import itertools
import runpy
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import distributed, optim, seeding     # noqa: E402
from score import ActivationStats       # noqa: E402

GPU = torch.device('meta')


class OneDevice(TorchDispatchMode):
    """Inside, an operation on tensors of two devices raises; single numbers and copies may be.

    Attributes:
        starting: whether the host may read tensors, as zeros: scripts digest the weights they load.
    """

    starting = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values, _ = tree_flatten((args, kwargs))
        devices = {v.device.type for v in values if isinstance(v, torch.Tensor) and v.dim()}
        if len(devices) > 1 and func is not torch.ops.aten.copy_.default:
            raise RuntimeError(f'{func} on tensors of {" and ".join(sorted(devices))}')
        if self.starting and func is torch.ops.aten._to_copy.default and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=kwargs.get('dtype') or args[0].dtype,
                               device=kwargs.get('device') or GPU)
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """A generator of the CPU whose `device` is the simulated GPU, which has none of its own."""

    device = GPU


def generator(device, *key):
    kind = Generator if torch.device(device) == GPU else torch.Generator
    return kind().manual_seed(seeding.mix(*key))


def adam_step(adam):
    """In place of the fused kernel, which the meta device does not have."""
    params = adam.param_groups[0]['params']
    assert {v.device for p in params for v in (p, p.grad, adam.found_inf)} == {GPU}


def stop_after(function, mode):
    """`function`, called in every step: the script is ready at the first, and ends in the third."""
    calls = itertools.count(1)

    def call(*args, **how):
        mode.starting = False
        if next(calls) == 3:
            sys.exit(print('reached step 3'))
        return function(*args, **how)
    return call


def main():
    del sys.argv[0]
    mode = OneDevice()
    mode.starting = True
    forms = [(distributed, 'init', lambda *_: GPU), (seeding, 'generator', generator),
             (torch.optim.Adam, 'step', adam_step),
             (torch, 'autocast', lambda *_, **__: contextlib.nullcontext()),
             (optim, 'learning_rate', stop_after(optim.learning_rate, mode)),
             (ActivationStats, 'update', stop_after(ActivationStats.update, mode))]
    with contextlib.ExitStack() as stack:
        for owner, name, form in forms:
            stack.enter_context(mock.patch.object(owner, name, form))
        stack.enter_context(mode)
        runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
