"""Models of diffusers: the folder of a `UNet2DModel` with a scheduler, and its students."""

import contextlib
import importlib
import json
import logging
from inspect import signature
from pathlib import Path

import torch
from torch import nn

from formats.entries import ENTRIES, NUMBER, are_betas, check
from runtime import checkpoint, distributed
from runtime.cli import UserError, first_line
from runtime.torchvision_cpu import torchvision

RGB = (int, lambda value: value == 3, '3, for RGB images')
# Settings that are checked before anything is built, as in `entries.ENTRIES`
UNET = dict(
    in_channels=RGB, out_channels=RGB, num_class_embeds=NUMBER, num_train_timesteps=NUMBER,
    time_embedding_dim=(int, lambda value: 1 <= value <= 2 ** 16, 'null or a number to 65,536'),
    sample_size=(object, lambda value: 1 <= side_of(value) <= 4096,
                 'null or the side of a square from 1 to 4096'),
    class_embed_type=(str, lambda value: False, 'null: no labels, or a table of them'),
    # the logarithm in a Fourier embedding of times is not finite at time 0
    time_embedding_type=(str, lambda value: value in ('positional', 'learned'),
                         'positional or learned'),
    layers_per_block=(int, lambda value: 1 <= value <= 64, 'a whole number from 1 to 64'),
    block_out_channels=(list, lambda value: 1 <= len(value) <= 16 and all(
        type(width) is int and 1 <= width <= 2 ** 14 for width in value),
        '1 to 16 whole numbers from 1 to 16,384'))
# diffusers' script that trains a UNet2DModel saves the settings of its average as well
AVERAGE = ('decay', 'min_decay', 'optimization_step', 'update_after_step', 'use_ema_warmup',
           'inv_gamma', 'power')

PREDICTIONS = dict(sample='xstart', epsilon='epsilon', v_prediction='v')        # {theirs: ours}
SCHEDULER = dict(
    num_train_timesteps=NUMBER, trained_betas=(list, are_betas, 'null or betas in (0, 1)'),
    prediction_type=(str, lambda value: value in PREDICTIONS, ' or '.join(PREDICTIONS)),
    timestep_type=(str, lambda value: value == 'discrete', 'discrete'),
    use_flow_sigmas=(bool, lambda value: not value, 'false'))
# Schedulers with betas and timesteps 0..N - 1; how they sample does not matter here
SCHEDULERS = ('DDPMScheduler', 'DDIMScheduler', 'PNDMScheduler', 'DPMSolverMultistepScheduler',
              'DPMSolverSinglestepScheduler', 'DEISMultistepScheduler', 'UniPCMultistepScheduler',
              'EulerDiscreteScheduler', 'EulerAncestralDiscreteScheduler', 'LMSDiscreteScheduler')
BETAS = ('num_train_timesteps', 'beta_start', 'beta_end', 'beta_schedule', 'trained_betas',
         'rescale_betas_zero_snr')
# Settings of earlier versions, of which predict_epsilon alone matters here
EARLIER = ('predict_epsilon', 'tensor_format', 'timestep_values', 'skip_prk_steps')


# Networks

class DiffusersUNet(nn.Module):
    """A UNet2DModel in the form that formats/load.py describes.

    clean_end: see `Diffusion.clean_end`. With it, our time t is the timestep t - 1 of diffusers;
        without it, as for exports of our own networks, t.
    """

    in_float32 = ('unet',)      # weights stay as they are: diffusers takes its precision from them

    def __init__(self, unet, clean_end):
        super().__init__()
        self.unet, self.first = unet, int(clean_end)
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(in_precision_of_weights)
        config = arguments(unet)
        self.conditional = config['num_class_embeds'] is not None
        self.class_num = config['num_class_embeds'] or 10
        self.entries = dict(unet_config=dict(config, dropout=0.))

    def forward(self, x, t, y=None):
        """Images (B, 3, H, W), times (B,) int in 1..N, labels (B,) or None -> (B, 3, H, W)."""
        return self.unet(x, t - self.first, y if self.conditional else None, return_dict=False)[0]

    def architecture(self, N):
        """The nearest to the arguments of our U-Net, for times 0..N."""
        config, widths = self.unet.config, self.unet.config['block_out_channels']
        learned = config['time_embedding_type'] == 'learned'        # a table of times
        return dict(T=config['num_train_timesteps'] if learned else N, ch=widths[0],
                    ch_mult=[width // widths[0] for width in widths],
                    attn=[i for i, name in enumerate(config['down_block_types']) if 'Attn' in name],
                    num_res_blocks=config['layers_per_block'], conditional=self.conditional,
                    class_num=self.class_num)


def arguments(unet):
    """Those that a UNet2DModel was built with, as JSON has them: lists in place of tuples."""
    known = signature(type(unet).__init__).parameters
    return json.loads(json.dumps({key: unet.config[key] for key in known if key in unet.config}))


def in_precision_of_weights(norm, inputs):
    """A hook that gives group norm float32 under autocast, as in `model.GroupNorm`."""
    return tuple(x.to(norm.weight.dtype) for x in inputs)


def build(entries, dropout=0., where='the checkpoint'):
    """The network of a checkpoint with `unet_config`, on the meta device, without weights."""
    check_packages(['diffusers'])
    from diffusers import UNet2DModel
    config = entries['unet_config']
    check_config(dict(config, _class_name='UNet2DModel'), ['UNet2DModel'], UNET, where)
    try:
        with torch.device('meta'):
            unet = UNet2DModel(**dict(config, dropout=dropout))
        for module in unet.modules():
            # filters of KDownBlock2D, constants that the weights lack, are made on the CPU
            if module._non_persistent_buffers_set:
                module.__init__()
        return DiffusersUNet(unet, isinstance(entries['schedule'], dict))
    except Exception as error:      # what is raised depends on the values
        raise UserError(f'{where} describes no network that diffusers can build '
                        f'({first_line(error)}); restore a copy')


# Folders

def main_file(path):
    """What stands for a folder of diffusers in messages, or None; results go beside it."""
    names = ('model_index.json', 'unet', 'config.json', 'scheduler_config.json')
    return next((file for file in (Path(path).expanduser() / name for name in names)
                 if file.exists()), None)


def read(path):
    """A checkpoint with the content of a folder: a pipeline, or a UNet2DModel and a scheduler.

    Nothing is downloaded, and nothing in the folder is run.
    """
    check_packages(['diffusers', 'safetensors'])
    path = Path(path).expanduser()
    index = path / 'model_index.json'
    more = sorted(key for key in (read_json(index) if index.exists() else {})
                  if key[:1] != '_' and key not in ('unet', 'scheduler'))
    if more:
        raise UserError(f'the pipeline in {path} has {", ".join(more)} in addition to its U-Net '
                        f'and scheduler; give one that makes images with a U-Net alone')
    folder = path / 'unet' if (path / 'unet').is_dir() else path
    state, file = read_schedule(folder), folder / 'config.json'
    config = check_config(read_json(file), ['UNet2DModel'], UNET, file, ignored=AVERAGE)
    if 'sample_size' in config:
        state['img_size'] = side_of(config['sample_size'])
    unet = read_unet(folder, config)
    weights = {f'unet.{key}': value for key, value in unet.state_dict().items()}
    return dict(state, unet_config=arguments(unet), net_model=weights,
                origin=name_of(folder, str(config.get('_name_or_path') or 'none')))


def side_of(size):
    """The side of the square that a sample_size describes: a number, or a pair of equal ones."""
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if type(size) is int else 0


def name_of(folder, path):
    """Name of the model in a folder: owner/name on a hub, if its configuration has it."""
    folder = folder.resolve()
    if len(path.split('/')) == 2 and path[0] not in './~':
        return path
    return folder.parent.name if folder.name in ('unet', 'unet_ema') else folder.name


def read_unet(folder, config):
    """The UNet2DModel in a folder as diffusers reads it, in float32; `config`: its config.json."""
    from diffusers import UNet2DModel
    from safetensors.torch import load_file
    files = sorted(folder.glob('*.safetensors')) or sorted(folder.glob('*.bin'))
    if not files:
        raise UserError(f'{folder} has no diffusion_pytorch_model.safetensors, the weights of its '
                        f'U-Net; give the folder of a whole pipeline of diffusers')
    plain = any(file.stem.count('.') == 0 for file in files)    # else name.fp16.safetensors
    safe = files[0].suffix == '.safetensors'
    for file in [] if safe else files:
        checkpoint.read(file)       # refuses pickles that could run code
    channels = sum(width ** 2 for width in config.get('block_out_channels', []))
    try:
        # refuse a network of an absurd size before it is built, by a part of its parameters
        size = sum(file.stat().st_size for file in files)
        if 18 * channels * config.get('layers_per_block', 1) > size:
            raise ValueError('config.json describes a network larger than its weights')
        unet, info = UNet2DModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=safe, low_cpu_mem_usage=False,
            variant=None if plain else files[0].stem.split('.')[1].split('-')[0],
            ignore_mismatched_sizes=True, output_loading_info=True)
    except Exception as error:      # what is raised depends on the files
        raise UserError(f'{folder} holds no network that diffusers can load '
                        f'({first_line(error)}); restore a copy of config.json and the weights')
    wrong = [*info['missing_keys'], *info['unexpected_keys'],
             *(key for key, *_ in info['mismatched_keys'])]
    # saved while the network was wrapped for several GPUs or compiled: prefixes before all names
    plain_names = checkpoint.plain_keys({key: key for key in info['unexpected_keys']})
    if wrong and plain_names.keys() == set(unet.state_dict()):
        stored = {}
        for file in files:
            stored.update(load_file(file) if safe else checkpoint.read(file))
        with contextlib.suppress(RuntimeError):     # of other shapes
            unet.load_state_dict({name: stored[key] for name, key in plain_names.items()})
            wrong = []
    if wrong:
        raise UserError(f'the weights in {folder} are not those of its config.json: {wrong[0]} is '
                        f'missing, unexpected or of another shape; restore a copy of both')
    return unet


def read_schedule(folder):
    """The arguments of the `Diffusion` of the U-Net in a folder, and how it was trained."""
    parent, config = folder.parent, 'scheduler/scheduler_config.json'
    for file in (folder / 'training.json', folder / 'scheduler_config.json', folder / config,
                 parent / 'training.json', parent / config, parent.parent / config):
        if file.name == 'training.json':        # of an export
            training = read_json(file) if file.is_file() else {}
            if {'T', 'time_scale', 'mean_type', 'schedule'} <= set(training):
                check(training, ENTRIES, file)
                return training
        elif file.is_file():
            return read_scheduler(file)
    raise UserError(f'there is no scheduler_config.json, which defines the schedule, beside '
                    f'{folder}; give the folder of a whole pipeline of diffusers')


def read_scheduler(file):
    """The arguments of the `Diffusion` that the configuration of a scheduler describes."""
    from diffusers import DDPMScheduler
    config = check_config(read_json(file), SCHEDULERS, SCHEDULER, file, ignored=EARLIER)
    try:
        scheduler = DDPMScheduler(**{key: config[key] for key in BETAS if key in config})
        betas = scheduler.betas.float().tolist()
        if len(betas) != scheduler.config.num_train_timesteps or not are_betas(betas):
            raise ValueError('expected num_train_timesteps betas in (0, 1)')
    except Exception as error:      # what is raised depends on the values
        raise UserError(f'{file} describes no schedule that diffusers can compute '
                        f'({first_line(error)}); restore a copy')
    used = dict(clip_sample=True, clip_sample_range=1, thresholding=False)
    unused = [f'{key} {config[key]}' for key in used if config.get(key, used[key]) != used[key]]
    if unused:
        distributed.print0(f'note: {", ".join(unused)} in {file} is not used: images are clipped '
                           f'to [-1, 1] here.')
    predicts_x = config.get('predict_epsilon') is False
    prediction = 'sample' if predicts_x else config.get('prediction_type', 'epsilon')
    name = 'trained' if 'trained_betas' in config else config.get('beta_schedule', 'linear')
    return dict(T=len(betas), time_scale=1, mean_type=PREDICTIONS[prediction],
                schedule=dict(name=name, betas=betas))


# Files and packages

def read_json(file):
    """The dictionary in a file of diffusers."""
    try:
        config = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f'{file} is missing or no dictionary in JSON; give the folder of a whole '
                        f'pipeline of diffusers')
    return config


def check_config(config, classes, table, file, ignored=()):
    """The settings of a configuration of one of these classes of diffusers that are not null.

    table: see `entries.check`. ignored: settings that may be there although the class has none.
    """
    import diffusers
    name = config.get('_class_name')
    if name not in classes:
        raise UserError(f'the class in {file} is {name}, expected {" or ".join(classes)}; give '
                        f'another model')
    config = {str(key): value for key, value in config.items() if value is not None}
    known = signature(getattr(diffusers, name).__init__).parameters
    unknown = sorted(key for key in set(config).difference(known, ignored) if key[:1] != '_')
    if unknown:
        raise UserError(f'{file} has {", ".join(unknown)}, which {name} of the installed diffusers '
                        f'lacks; remove it there, or install another version')
    check(config, table, file)
    return config


def check_packages(names):
    """Refuse to go on without these packages of requirements-export.txt."""
    torchvision()       # diffusers imports it if it is installed
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f'the package {name} is missing; run pip install -r '
                            f'requirements-export.txt', code=1)
    # what diffusers would warn of is checked here, and refused in one sentence
    logging.getLogger('diffusers').setLevel(logging.CRITICAL)
