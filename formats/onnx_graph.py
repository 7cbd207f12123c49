"""One ONNX graph from noise (and labels) to images, compared with PyTorch after writing."""

import copy
import logging
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
    """model.onnx in `folder`; returns a line on its accuracy, for the model card.

    Args:
        precision: float32, float16 or int8.
    Raises:
        UserError: the images of a float32 graph differ from those of PyTorch.
    """
    path, inputs = folder / 'model.onnx', example_inputs(model)
    reference = exported = Sampler(model.network, model.diffusion, stride)
    if precision == 'float16':
        half = copy.deepcopy(model.network).half()
        exported = Sampler(half, model.diffusion, stride, torch.float16)
    with torch.no_grad():
        expected = reference(*inputs.values())
        export_graph(exported, inputs, path)
    if precision == 'int8':
        quantise(path)
    found = run(path, {name: value.numpy() for name, value in inputs.items()})
    error = (expected - torch.from_numpy(found)).abs()
    largest, mean = error.max().item(), error.mean().item()
    if precision == 'float32' and not largest < TOLERANCE:      # also if it is not a number
        raise UserError(f'the images of the ONNX graph differ from those of PyTorch by '
                        f'{largest:.2g}, expected less than {TOLERANCE}; nothing was written, '
                        f'export with --format safetensors or another version of torch', code=1)
    line = (f'{precision}: pixels in [-1, 1] differ from PyTorch in float32 by {largest:.2g} at '
            f'most and {mean:.2g} on average (four images)')
    print(line, flush=True)
    return line


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


def run(path, feeds):
    """The images that a graph makes of {input: array} on the CPU, an array (B, 3, H, W)."""
    import onnxruntime
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), settings, providers=['CPUExecutionProvider'])
    return session.run(None, feeds)[0]
