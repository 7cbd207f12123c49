"""What torch.compile makes of a step on a GPU, counted without one: Inductor's generated code.

Networks that --compile would compile run as AOT autograd splits them into a forward and a backward
graph. Inductor lowers both for a GPU of compute capability 9.0, and the calls in its code are
counted: Triton kernels, and operations of libraries (convolutions, matrix products, attention).
Nothing is compiled further or run. It needs Triton (`pip install triton`) and `simulated_gpu`.

Not seen: what Dynamo would do before (graph breaks), tuning, fused attention, and CUDA graphs,
which start all kernels of a call at once.
"""

import collections
import contextlib
import functools
import importlib.util
import re
import types
from unittest import mock

import torch

H100 = types.SimpleNamespace(
    name='H100', major=9, minor=0, multi_processor_count=132, warp_size=32, gcnArchName='',
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    total_memory=80 << 30)
KINDS = 'Triton kernel', 'library call'


def has_triton():
    return importlib.util.find_spec('triton') is not None


@contextlib.contextmanager
def lowering(counter, options=()):
    """Inside, Inductor believes in a GPU; yields a `compile_networks` that tells `counter`.

    options: names in torch._inductor.config that are switched on.
    """
    from torch._inductor import config

    def compile_networks(enabled, device, *networks, graphs=False):
        for network in networks if enabled else ():
            network._compiled_call_impl = Lowered(network, counter)

    with contextlib.ExitStack() as stack:
        for owner, name, form in replacements():
            stack.enter_context(mock.patch.object(owner, name, form, create=True))
        # folding constants runs them; nothing is compiled
        stack.enter_context(config.patch(
            joint_graph_constant_folding=False, compile_threads=1, **dict.fromkeys(options, True)))
        yield compile_networks


def replacements():
    """What Inductor would ask a GPU or its driver, and what would run an example on it."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import fuse_attention, pad_mm
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import _triton
    from triton import runtime
    from triton.backends.compiler import GPUTarget

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget('cuda', 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_device_interface = staticmethod(lambda: torch.cuda)

    runtime.driver.set_active(Driver)
    answers = {
        torch.cuda: dict(is_available=True, device_count=1, current_device=0, _lazy_init=None,
                         get_device_capability=(9, 0), get_device_properties=H100,
                         _get_device_properties=H100, get_rng_state=torch.zeros(16),
                         set_rng_state=None),
        CudaInterface: dict(is_available=True, current_device=0, get_compute_capability=90),
        CudaInterface.Worker: dict(current_device=0, get_device_properties=H100),
        _triton: dict(triton_hash_with_backend='none'),
        fuse_attention: dict(_sfdp_init=None), pad_mm: dict(_pad_mm_init=None)}
    for owner, values in answers.items():
        for name, value in values.items():
            yield owner, name, staticmethod(lambda *_, value=value, **__: value)
    yield FakeTensorMode, '__deepcopy__', lambda mode, memo: mode   # copies stay in the simulation
    yield FakeTensorMode, 'avoid_device_init', True
    yield torch._C, '_conv_determine_backend_memory_format', format_of_cudnn


def format_of_cudnn(x, weight, *_):
    """channels_last, if one of both is; without CUDA, torch says contiguous."""
    if any(v.is_contiguous(memory_format=torch.channels_last) and not v.is_contiguous()
           for v in (x, weight)):
        return torch.channels_last
    return torch.contiguous_format


class Lowered:
    """The compiled call of a network: counts kernels in the place of its operations."""

    def __init__(self, network, counter):
        self.network, self.counter, self.graphs = network, counter, {}

    def __call__(self, *inputs, **context):
        from torch._functorch.aot_autograd import aot_function
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table
        tensors = [v for v in inputs if torch.is_tensor(v)]
        key = (torch.is_grad_enabled(), *((v.shape, v.dtype, v.requires_grad) for v in tensors))
        if key not in self.graphs:
            self.graphs[key] = aot_function(
                functools.partial(torch.func.functional_call, self.network),
                fw_compiler=self.compile, bw_compiler=self.compile,
                partition_fn=min_cut_rematerialization_partition,
                decompositions=select_decomp_table())
        weights = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        self.network._compiled_call_impl = None     # the graph is traced from the network itself
        try:
            with mock.patch.object(self.counter, 'paused', True):
                return self.graphs[key](weights, inputs, context)
        finally:
            self.network._compiled_call_impl = self

    def compile(self, graph, inputs):
        """A callable that runs `graph` and counts the kernels that Inductor has for it."""
        from torch._functorch.aot_autograd import make_boxed_func
        kernels = kernels_of(graph, inputs)

        def run(*inputs):
            with mock.patch.object(self.counter, 'paused', True):
                outputs = graph(*inputs)
            self.counter.operations.update(kernels)
            return outputs
        return make_boxed_func(run)


def kernels_of(graph, inputs):
    """{what: calls} in the code that Inductor generates for a graph of torch.fx."""
    from torch._inductor import compile_fx, debug, graph as lowered
    from torch._inductor.virtualized import V
    from torch.utils._python_dispatch import _disable_current_modes
    mode = torch._guards.detect_fake_mode(inputs)
    with _disable_current_modes():
        graph = compile_fx._recursive_joint_graph_passes(graph) or graph
    compile_fx.view_to_reshape(graph)
    with V.set_fake_mode(mode), V.set_debug_handler(debug.DebugContext()):
        compile_fx._recursive_post_grad_passes(graph, is_inference=not torch.is_grad_enabled())
        lowering = lowered.GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            code = lowering.codegen()[0].value
    body = code[code.index('def call('):] if 'def call(' in code else code
    return collections.Counter(
        dict(zip(KINDS, (len(re.findall(pattern, body)) for pattern in (
            r'\w+\.run\(', r'(?:extern_kernels\.\w+|torch\.ops\.[\w.]+)\(')))))
