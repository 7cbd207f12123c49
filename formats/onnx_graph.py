"""One ONNX graph from noise (and labels) to images, compared with PyTorch after writing."""

import warnings
from inspect import signature

import torch
from torch import nn

from runtime.cli import UserError, print0

TOLERANCE = 1e-3        # largest difference from PyTorch; pixels are in [-1, 1]


class Sampler(nn.Module):
    """x_T (B, 3, H, W) and, for a class-conditional network, y (B,) -> images in [-1, 1]."""

    def __init__(self, network, diffusion, stride):
        super().__init__()
        self.network, self.diffusion, self.stride = network, diffusion, stride

    def forward(self, x_T, y=None):
        return self.diffusion.sample(self.network, x_T, self.stride, y=y)


def write(model, stride, folder):
    """model.onnx in `folder`; returns a line on its accuracy, for the model card.

    The newer exporter (dynamo) takes ten times as long for many steps, and the graph it makes of
    the same operations is larger and no faster.
    """
    import onnxruntime
    path, sampler = folder / 'model.onnx', Sampler(model.network, model.diffusion, stride).eval()
    inputs = dict(x_T=torch.randn(4, 3, model.img_size, model.img_size,
                                  generator=torch.Generator()))
    if model.arch['conditional']:
        inputs['y'] = torch.arange(4) % model.arch['class_num']
    older = dict(dynamo=False) if 'dynamo' in signature(torch.onnx.export).parameters else {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        expected = sampler(*inputs.values())
        torch.onnx.export(sampler, tuple(inputs.values()), str(path), input_names=list(inputs),
                          output_names=['images'], opset_version=17, **older,
                          dynamic_axes={name: {0: 'batch'} for name in [*inputs, 'images']})
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), settings, providers=['CPUExecutionProvider'])
    found, = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    error = (expected - torch.from_numpy(found)).abs()
    largest, mean = error.max().item(), error.mean().item()
    if not largest < TOLERANCE:     # also if it is not a number
        raise UserError(f'the images of the ONNX graph differ from those of PyTorch by '
                        f'{largest:.2g}, expected less than {TOLERANCE}; nothing was written, '
                        f'export with --format safetensors or another version of torch', code=1)
    line = (f'Pixels in [-1, 1] differ from PyTorch by {largest:.2g} at most and {mean:.2g} on '
            f'average (four images).')
    print0(line)
    return line
