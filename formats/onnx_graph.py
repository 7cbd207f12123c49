"""One ONNX graph from noise (and labels) to images, compared with PyTorch after writing."""

import copy
import logging
import time
import warnings
from inspect import signature

import torch
from torch import nn

from runtime.cli import UserError

TOLERANCE = 1e-3        # largest difference of a float32 graph from PyTorch; pixels are in [-1, 1]


class Sampler(nn.Module):
    """x_T (B, 3, H, W) and, for a class-conditional network, y (B,) -> images in [-1, 1].

    The network computes in `dtype`, the DDIM steps between its evaluations in that of x_T.
    """

    def __init__(self, network, diffusion, stride, dtype=torch.float32):
        super().__init__()
        self.network, self.diffusion, self.stride = network, diffusion, stride
        self.dtype = dtype

    def forward(self, x_T, y=None):
        return self.diffusion.sample(self.evaluate, x_T, self.stride, y=y)

    def evaluate(self, z_t, t, y):
        return self.network(z_t.to(self.dtype), t, y)


def write(model, stride, folder, precision):
    """model.onnx in `folder`; returns lines on differences and latency, for the model card.

    Args:
        precision: float32, float16 or int8.
    Raises:
        UserError: the images of a float32 graph differ from those of PyTorch.
    """
    path, inputs = folder / 'model.onnx', example_inputs(model)
    reference = Sampler(model.network, model.diffusion, stride)
    exported = reference
    if precision == 'float16':
        half = copy.deepcopy(model.network).half()
        exported = Sampler(half, model.diffusion, stride, torch.float16)
    with torch.no_grad():
        expected = reference(*inputs.values())
        first = [value[:1] for value in inputs.values()]
        torch_ms = milliseconds(lambda: reference(*first))
        export_graph(exported, inputs, path)
    if precision == 'int8':
        quantise(path)
    session = inference_session(path)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    found = torch.from_numpy(session.run(None, feeds)[0])
    first = {name: value[:1] for name, value in feeds.items()}
    onnx_ms = milliseconds(lambda: session.run(None, first))
    return report(expected, found, precision, torch_ms, onnx_ms)


def example_inputs(model):
    """{name: tensor} for four images: x_T and, for a class-conditional network, y."""
    inputs = dict(x_T=torch.randn(4, 3, model.img_size, model.img_size,
                                  generator=torch.Generator()))
    if model.arch['conditional']:
        inputs['y'] = torch.arange(4) % model.arch['class_num']
    return inputs


def export_graph(sampler, inputs, path):
    """Trace a `Sampler` into one graph for any batch size.

    The newer exporter (dynamo) takes ten times as long for many steps, and the graph it makes of
    the same operations is larger and no faster.
    """
    names, older = list(inputs), {}
    if 'dynamo' in signature(torch.onnx.export).parameters:
        older['dynamo'] = False
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(sampler.eval(), tuple(inputs.values()), str(path), input_names=names,
                          output_names=['images'], opset_version=17,
                          dynamic_axes={name: {0: 'batch'} for name in [*names, 'images']}, **older)


def quantise(path):
    """Convert the weights and products of a graph to 8 bits, in place."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    logging.getLogger().setLevel(logging.ERROR)     # it recommends to run another tool first
    quantize_dynamic(path, path, weight_type=QuantType.QUInt8)


def inference_session(path):
    """The graph, ready to run on the CPU with as many threads as PyTorch uses."""
    import onnxruntime
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), settings, providers=['CPUExecutionProvider'])


def milliseconds(call, repeats=9):
    """Median time of a call, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


def report(expected, found, precision, torch_ms, onnx_ms):
    """Print and return lines on differences and latency.

    Raises:
        UserError: a float32 graph gives other images than PyTorch.
    """
    error = (expected - found).abs()
    largest, mean = error.max().item(), error.mean().item()
    if precision == 'float32' and not largest < TOLERANCE:      # also if it is not a number
        raise UserError(f'the images of the ONNX graph differ from those of PyTorch by '
                        f'{largest:.2g}, expected less than {TOLERANCE}; nothing was written, '
                        f'export with --format safetensors or another version of torch', code=1)
    lines = [f'{precision}: pixels in [-1, 1] differ from PyTorch in float32 by {largest:.2g} at '
             f'most and {mean:.2g} on average (four images)',
             f'one image on this CPU, {torch.get_num_threads()} thread(s): ONNX Runtime '
             f'{onnx_ms:.1f} ms, PyTorch {torch_ms:.1f} ms (median of nine)']
    print('\n'.join(lines), flush=True)
    return lines
