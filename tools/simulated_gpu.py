"""Run code as if on a GPU, on a machine without one: tensors with shapes and devices, no numbers.

Inside `simulated_gpu()`, a tensor on another device than its partner raises, as do `.item()`,
`.tolist()` and `bool(tensor)` of a tensor on the GPU, for which the host would wait. Every
operation on the device is counted. It needs a process started by `start`, which preloads a guard
that is built from simulated_gpu.cpp with the C++ compiler of this machine.

Not simulated: values, memory, time, streams, pinned memory, the random numbers of CUDA, what DDP
and NCCL do, and the kernels behind an operation, which may be several or none. A `_foreach_`
operation counts as one. For torch.compile see inductor.py.
"""

import collections
import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime import cli, data, distributed, precision, seeding

GPU = torch.device('cuda', 0)
FREE = ('aten.empty', 'aten.new_empty', 'aten.detach', 'aten._unsafe_view', 'aten.lift_fresh',
        'aten.as_strided', 'aten._reshape_alias', 'aten.set_', 'prim.')     # start no kernel


class NotHere(Exception):
    """Why no GPU can be simulated on this machine."""


def build(folder):
    """Compile the guard into `folder`; returns the library.

    Raises:
        NotHere: there is no compiler, or this torch is too old or has CUDA.
    """
    if torch.version.cuda or torch.version.hip:
        raise NotHere('this build of torch has real GPUs, whose guard cannot be replaced')
    if precision.TORCH < (2, 10):
        raise NotHere(f'it was written for torch 2.13, this is {torch.__version__}')
    compiler = shutil.which('g++') or shutil.which('c++')
    if not compiler:
        raise NotHere('there is no C++ compiler')
    root, library = Path(torch.__file__).parent, Path(folder) / 'simulated_gpu.so'
    include = [f'-I{root / "include"}', f'-I{sysconfig.get_paths()["include"]}']
    done = subprocess.run(
        [compiler, '-shared', '-fPIC', '-std=c++20', '-O0', *include,
         f'-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}',
         str(Path(__file__).with_suffix('.cpp')), '-o', str(library), f'-L{root / "lib"}',
         '-lc10', '-ltorch_cpu', f'-Wl,-rpath,{root / "lib"}'],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode:
        raise NotHere('the guard does not build against this torch: '
                      + done.stdout.strip().splitlines()[0])
    return library


def start(library, words):
    """Run a Python command in a process that has the guard; returns the finished process."""
    env = dict(os.environ, LD_PRELOAD=str(library), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, *map(str, words)], cwd=str(cli.ROOT), env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)


class Counter(TorchDispatchMode):
    """Operations on the GPU and the bytes that random numbers fill, since `take` was called."""

    def __init__(self):
        super().__init__()
        self.operations, self.drawn, self.sent = collections.Counter(), 0, 0
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        name = str(func)
        tensors = [v for v in torch.utils._pytree.tree_leaves((args, kwargs, out))
                   if isinstance(v, torch.Tensor)]
        if any(v.device.type == 'cuda' for v in tensors) and not is_free(func, name):
            self.operations[name] += 1
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(out, torch.Tensor):
            self.drawn += out.numel() * out.element_size()
        return out

    def take(self):
        """(operations by name, bytes drawn, bytes sent) since the last call."""
        found = self.operations, self.drawn, self.sent
        self.operations, self.drawn, self.sent = collections.Counter(), 0, 0
        return found


def is_free(func, name):
    """Whether an operation is a view or an allocation, which start no kernel."""
    return func.is_view or name.startswith(FREE)


@contextlib.contextmanager
def simulated_gpu(world=1, rank=0):
    """Inside, `GPU` is a device; yields a `Counter`. With `world` > 1, one process of a group."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    counter = Counter()
    with contextlib.ExitStack() as stack:
        for owner, name, form in replacements(FakeTensor):
            stack.enter_context(mock.patch.object(owner, name, form))
        if world > 1:
            stack.enter_context(fake_group(counter, world, rank))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(counter)
        yield counter


def replacements(FakeTensor):
    """What a build of torch without CUDA refuses, and what would read a tensor without numbers."""
    supported = torch.utils._foreach_utils._foreach_supported_types
    yield torch.utils._foreach_utils, '_foreach_supported_types', [*supported, FakeTensor]
    yield seeding, 'generator', generator
    yield seeding, 'sent', lambda tensor, device: tensor.to(device)
    yield data.StepOrder, '__iter__', any_order
    yield torch, '_fused_adam_', checked_adam
    yield torch.nn.Module, '_apply', new_parameters
    yield torch.cuda, 'get_device_capability', lambda *_: (9, 0)
    yield torch.cuda, 'is_bf16_supported', lambda *_, **__: True
    yield torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False


class _Generator(torch.Generator):
    """A generator of the CPU that says it is one of `at`."""

    at = torch.device('cpu')

    @property
    def device(self):
        return self.at


def generator(device, *key):
    found = _Generator().manual_seed(seeding.mix(*key))
    found.at = torch.device(device)
    return found


def any_order(order):
    """Indices that are plain integers, in the order of the rows."""
    while True:
        for micro in range(order.accum):
            rows = distributed.rows(order.batch_size, micro, order.accum)
            yield [i % order.length for i in range(rows.start, rows.stop)]


def checked_adam(params, grads, averages, squares, *_, found_inf, **__):
    """In the place of the fused kernel: all is on the GPU, in one layout."""
    for tensors in zip(params, grads, averages, squares):
        assert {v.device.type for v in (*tensors, found_inf)} == {'cuda'}
        dense = {tuple(s for s, n in zip(v.stride(), v.shape) if n != 1) for v in tensors}
        assert len(dense) == 1, [(v.shape, v.stride()) for v in tensors]


def new_parameters(module, function, recurse=True):
    """`Module._apply` for tensors that cannot change their device in place."""
    for part in module.modules():
        for key, p in part._parameters.items():
            if p is not None:
                part._parameters[key] = torch.nn.Parameter(function(p.detach()), p.requires_grad)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[key] = function(buffer)
    return module


@contextlib.contextmanager
def fake_group(counter, world, rank):
    """A group of `world` processes of which this one alone exists; counts what it sends."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group('fake', store=FakeStore(), rank=rank, world_size=world)
    reduce = dist.all_reduce

    def counted(tensor, *args, **how):
        counter.sent += tensor.numel() * tensor.element_size()
        return reduce(tensor, *args, **how)

    try:
        with mock.patch.object(dist, 'all_reduce', counted), \
                mock.patch.object(distributed, 'wrap_ddp', lambda module: module), \
                mock.patch.object(distributed, 'broadcast_object', lambda value: value), \
                mock.patch.object(distributed, 'barrier', lambda: None):
            yield
    finally:
        dist.destroy_process_group()
