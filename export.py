"""Take a trained model elsewhere: diffusers, ONNX or safetensors, with a model card.

  pip install -r requirements-export.txt
  python export.py --logdir ./logs/8to4/rdd --format diffusers --output ./export/diffusers
  python export.py --logdir ./logs/8to4/rdd --format onnx --output ./export/onnx --precision int8
  python export.py --from_diffusers FOLDER --output ./logs/taken_over

diffusers: UNet2DModel and DDIMScheduler, loaded without this repository. onnx: one graph from noise
(and labels) to images, all steps inside. safetensors: weights and config.json. README.md in the
folder says how the model was trained and how to load it. --from_diffusers goes the other way: a
UNet2DModel of the DDPM family becomes <output>/ckpt.pt, which ddim_eval.py scores. docs/export.md
has the details.
"""

import importlib
import json
import logging
import shutil
import time
import warnings
from inspect import signature
from pathlib import Path

import torch
from absl import flags
from torch import nn

from diffusion import Diffusion
from runtime import checkpoint, diffusers_format, model_card, options
from runtime.options import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string('logdir', None, 'folder (or file) of the checkpoint')
flags.DEFINE_enum('format', 'diffusers', ['diffusers', 'onnx', 'safetensors'], 'what to write')
flags.DEFINE_string('output', None, 'new folder for the result')
flags.DEFINE_enum('weights', 'auto', ['auto', 'net', 'ema'], 'weights to take; auto: the average '
                  'for a base model, the raw ones for a distilled student')
flags.DEFINE_integer('stride', 1, 'steps of the model per DDIM step: NFE = T / stride',
                     lower_bound=1)
flags.DEFINE_enum('precision', 'float32', ['float32', 'float16', 'int8'], 'of the weights in an '
                  'ONNX graph; int8: also of the products, by dynamic quantisation')
flags.DEFINE_string('license', 'mit', 'licence named on the model card')
flags.DEFINE_string('from_diffusers', None, 'folder of a diffusers pipeline or UNet2DModel to '
                    'turn into <output>/ckpt.pt, instead of exporting')
flags.DEFINE_integer('img_size', 32, 'height and width of the images, for a checkpoint that does '
                     'not say', lower_bound=1)
flags.DEFINE_enum('mean_type', 'xstart', ['xstart', 'epsilon'], 'what the network predicts, for a '
                  'checkpoint that does not say')

PACKAGES = dict(diffusers=['diffusers', 'safetensors'], onnx=['onnx', 'onnxruntime'],
                safetensors=['safetensors'])
ORIGIN = ('method', 'step', 'dataset', 'batch_size', 'seed', 'flags')     # facts of a training
TOLERANCE = 1e-3        # of a float32 graph against PyTorch; pixels are in [-1, 1]


def main():
    options.require(output='the new folder for the result, such as ./export/rdd')
    output = Path(FLAGS.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f'--output {output} exists and is not an empty folder; choose another')
    if FLAGS.from_diffusers:
        return take_over()
    options.require(logdir='the folder of a trained model, such as ./logs/8to4/rdd')
    if FLAGS.precision != 'float32' and FLAGS.format != 'onnx':
        raise UserError(f'--precision {FLAGS.precision} is for --format onnx, found --format '
                        f'{FLAGS.format}; leave --precision out')
    model = Model()
    need(PACKAGES[FLAGS.format])
    write = dict(diffusers=write_diffusers, onnx=write_onnx, safetensors=write_safetensors)
    publish(lambda folder: write[FLAGS.format](model, folder))


def need(packages):
    """Refuse to start without optional packages."""
    import runtime.torchvision_cpu  # noqa: F401  # diffusers imports torchvision where it finds it
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f'the package {name} is missing; run pip install -r '
                            f'requirements-export.txt', code=1)


def publish(write):
    """Run `write(folder)` on a temporary folder, which becomes --output when it is complete."""
    output = Path(FLAGS.output).expanduser()
    temporary = output.with_name(output.name + '.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        if output.exists():
            output.rmdir()
        temporary.replace(output)
    except OSError as error:
        raise UserError(f'--output {output} cannot be written ({error.strerror or error}); choose '
                        f'another', code=1)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f'{output}: {", ".join(sorted(p.name for p in output.iterdir()))}')


class Model:
    """All that an export says: network, schedule, image size, and the facts for the card."""

    def __init__(self):
        self.file = checkpoint.find(FLAGS.logdir)
        self.state = checkpoint.read(self.file)
        network, self.weights = checkpoint.build_unet(self.state, self.file,
                                                      weights_of=FLAGS.weights)
        self.network = network.eval().requires_grad_(False)
        self.arch = checkpoint.architecture(network.state_dict())
        self.T, self.time_scale, self.schedule, mean_type = checkpoint.grid(self.state, self.arch)
        self.mean_type = mean_type or FLAGS.mean_type
        size = self.state['x_T'].shape[-1] if 'x_T' in self.state else FLAGS.img_size
        self.img_size = self.state.get('img_size', size)
        self.diffusion = Diffusion(self.T, self.time_scale, self.mean_type, schedule=self.schedule)
        try:
            self.nfe = len(self.diffusion.times(FLAGS.stride)) - 1
        except ValueError:
            raise UserError(f'--stride {FLAGS.stride} does not divide the {self.T} steps of the '
                            f'model in {self.file}; choose a divisor')

    def grid(self):
        return dict(T=self.T, time_scale=self.time_scale, mean_type=self.mean_type,
                    schedule=self.schedule)

    def origin(self):
        """What a reader may want to know of the training, as plain values."""
        return dict({key: self.state[key] for key in ORIGIN if key in self.state},
                    weights=self.weights)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + '\n')


# diffusers

def write_diffusers(model, folder):
    """unet/, scheduler/ and, unless labels are needed, the model_index.json of a DDIMPipeline."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
    unet = UNet2DModel(**diffusers_format.unet_config(model.network, model.arch, model.img_size))
    unet.load_state_dict(diffusers_format.to_diffusers(model.network.state_dict(), model.arch))
    scheduler = DDIMScheduler(**diffusers_format.scheduler_config(model.diffusion, FLAGS.stride))
    if model.arch['conditional']:       # DDIMPipeline has no labels: the card has the loop
        unet.save_pretrained(folder / 'unet')
        scheduler.save_pretrained(folder / 'scheduler')
    else:
        DDIMPipeline(unet, scheduler).save_pretrained(folder)
    write_json(folder / 'training.json', dict(model.grid(), **model.origin()))
    model_card.write(folder, model, FLAGS.license, 'diffusers')


# safetensors

def write_safetensors(model, folder):
    """model.safetensors and a config.json with all that rebuilds the network and its schedule."""
    from safetensors.torch import save_file
    state_dict = {k: v.contiguous() for k, v in model.network.state_dict().items()}
    save_file(state_dict, folder / 'model.safetensors', dict(format='pt'))
    write_json(folder / 'config.json', dict(
        unet=model.arch, diffusion=model.grid(), details=model.network.details, stride=FLAGS.stride,
        img_size=model.img_size, training=model.origin()))
    model_card.write(folder, model, FLAGS.license, 'safetensors')


# ONNX

class Sampler(nn.Module):
    """x_T (B, 3, H, W) and, for a class-conditional network, y (B,) -> images in [-1, 1]."""

    def __init__(self, model, dtype=torch.float32):
        super().__init__()
        self.network, self.diffusion = model.network.to(dtype), model.diffusion
        self.dtype, self.stride = dtype, FLAGS.stride

    def forward(self, x_T, y=None):
        return self.diffusion.sample(lambda z, t, y: self.network(z.to(self.dtype), t, y), x_T,
                                     self.stride, y=y)


def write_onnx(model, folder):
    """model.onnx, compared with PyTorch in images and time before the folder appears."""
    x_T = torch.randn(4, 3, model.img_size, model.img_size, generator=torch.Generator())
    inputs = (x_T, torch.arange(4) % model.arch['class_num'])[:1 + model.arch['conditional']]
    sampler = Sampler(model)
    with torch.no_grad():
        images, torch_ms = sampler(*inputs), milliseconds(lambda: sampler(*(i[:1] for i in inputs)))
        half = FLAGS.precision == 'float16'
        export_graph(Sampler(model, torch.float16) if half else sampler, inputs,
                     folder / 'model.onnx')
    if FLAGS.precision == 'int8':
        quantise(folder / 'model.onnx')
    feeds = dict(zip(('x_T', 'y'), (i.numpy() for i in inputs)))
    session = inference_session(folder / 'model.onnx')
    found = torch.from_numpy(session.run(None, feeds)[0])
    one = {name: value[:1] for name, value in feeds.items()}
    facts = compare(images, found, torch_ms, milliseconds(lambda: session.run(None, one)))
    model_card.write(folder, model, FLAGS.license, 'onnx', facts)


def export_graph(sampler, inputs, path):
    """One graph of any batch size, by tracing.

    The newer exporter (dynamo) takes ten times as long for steps in a row, and its graph of the
    same operations is larger and no faster.
    """
    names = ['x_T', 'y'][:len(inputs)]
    older = dict(dynamo=False) if 'dynamo' in signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(sampler.eval(), inputs, str(path), input_names=names, opset_version=17,
                          output_names=['images'], dynamic_axes={name: {0: 'batch'} for name in
                                                                names + ['images']}, **older)


def quantise(path):
    """Weights and products of a graph in 8 bits, in place."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    logging.getLogger().setLevel(logging.ERROR)     # advice on another tool
    quantize_dynamic(path, path, weight_type=QuantType.QUInt8)


def inference_session(path):
    """A graph on the CPU, on as many threads as PyTorch has."""
    import onnxruntime
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), settings, providers=['CPUExecutionProvider'])


def milliseconds(call, repeats=9):
    """Median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


def compare(images, found, torch_ms, onnx_ms):
    """Lines on differences and latency; refuses a float32 graph that gives other images."""
    error = (images - found).abs()
    largest, mean = error.max().item(), error.mean().item()
    if not largest < TOLERANCE and FLAGS.precision == 'float32':
        raise UserError(f'the ONNX graph differs from PyTorch by {largest:.2g}, expected less than '
                        f'{TOLERANCE}; nothing was written', code=1)
    lines = [f'{FLAGS.precision}: pixels in [-1, 1] differ from PyTorch in float32 by '
             f'{largest:.2g} at most and {mean:.2g} on average (four images)',
             f'one image on this CPU, {torch.get_num_threads()} thread(s): ONNX Runtime '
             f'{onnx_ms:.1f} ms, PyTorch {torch_ms:.1f} ms (median of nine)']
    print('\n'.join(lines), flush=True)
    return lines


# The other way

def take_over():
    """A diffusers folder -> <output>/ckpt.pt."""
    need(PACKAGES['diffusers'])
    publish(lambda folder: checkpoint.save(folder / 'ckpt.pt', imported(FLAGS.from_diffusers)))


def imported(source):
    """The checkpoint of a pipeline folder or of a UNet2DModel folder with a scheduler beside it."""
    source = Path(source).expanduser()
    folder = source / 'unet' if (source / 'unet').is_dir() else source
    unet = read_unet(folder)
    config = unet.config
    diffusers_format.check_family(config, folder)
    said = read_json(folder.parent / 'training.json')       # written by this script
    grid = said or diffusers_format.grid_of_scheduler(scheduler_config(folder))
    state = {key: grid[key] for key in ('T', 'time_scale', 'mean_type', 'schedule')}
    state.update({key: said[key] for key in ORIGIN if key in said})
    details = dict(norm_eps=config.norm_eps, downsample_padding=config.downsample_padding)
    if details != dict(norm_eps=1e-5, downsample_padding=1):
        state['details'] = details
    ours = diffusers_format.from_diffusers(unet.state_dict(), config,
                                           grid['T'] * grid['time_scale'])
    return dict(state, img_size=config.sample_size, net_model=ours, use='net_model')


def read_unet(folder):
    """The UNet2DModel in a folder; nothing is downloaded."""
    from diffusers import UNet2DModel
    try:
        if not (folder / 'config.json').is_file():
            raise OSError(f'{folder / "config.json"} is missing')
        return UNet2DModel.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'--from_diffusers {folder} is no UNet2DModel that diffusers can read '
                        f'({reason}); give the folder of a pipeline or of its U-Net')


def read_json(path):
    return json.loads(path.read_text()) if path.is_file() else {}


def scheduler_config(folder):
    """The configuration in scheduler/ beside the U-Net, or in the same folder."""
    for path in (folder.parent / 'scheduler', folder / 'scheduler', folder):
        if (path / 'scheduler_config.json').is_file():
            return read_json(path / 'scheduler_config.json')
    raise UserError(f'{folder} has no scheduler_config.json beside it, which says the schedule; '
                    f'give the folder of the whole pipeline')


if __name__ == '__main__':
    options.run(main)
