"""Folders of diffusers: write one from a model, and read one."""

import json
from pathlib import Path

from diffusion import Diffusion
from formats import diffusers_scheduler, diffusers_unet
from formats.diffusers_network import SETTINGS, DiffusersUNet, check_config
from formats.entries import ENTRIES, Model, check, grid_of
from formats.packages import check_packages, first_line
from runtime import checkpoint
from runtime.cli import UserError

# diffusers' script that trains a UNet2DModel saves the settings of its average as well
AVERAGE = ('decay', 'min_decay', 'optimization_step', 'update_after_step', 'use_ema_warmup',
           'inv_gamma', 'power')


def write(model, stride, folder):
    """unet/, scheduler/ and training.json; an unconditional model becomes a whole DDIMPipeline.

    DDIMPipeline cannot pass labels on, so the card of a conditional model has a sampling loop.
    Raises:
        UserError: no scheduler visits the times of the model, or no UNet2DModel is its network.
    """
    from diffusers import DDIMPipeline, DDIMScheduler
    scheduler = DDIMScheduler(**diffusers_scheduler.scheduler_config(model.diffusion, stride,
                                                                     model.file))
    network = model.network
    unet = network.unet if isinstance(network, DiffusersUNet) else diffusers_unet.convert(model)
    if network.conditional:
        unet.save_pretrained(folder / 'unet')
        scheduler.save_pretrained(folder / 'scheduler')
    else:
        DDIMPipeline(unet, scheduler).save_pretrained(folder)
    training = dict(model.diffusion.arguments(), img_size=model.img_size,
                    weights=model.weights_name, **model.provenance())
    (folder / 'training.json').write_text(json.dumps(training, indent=2) + '\n')


def is_folder(path):
    """Whether a path is a folder of diffusers rather than that of a run."""
    return not (Path(path).expanduser() / 'ckpt.pt').exists() and main_file(path) is not None


def main_file(path):
    """What stands for a folder of diffusers in messages, or None; results go beside it."""
    names = ('model_index.json', 'unet', 'config.json', 'scheduler_config.json')
    return next((file for file in (Path(path).expanduser() / name for name in names)
                 if file.exists()), None)


def read(path, dropout=0., img_size=32):
    """The `Model` in the folder of a pipeline, or of a UNet2DModel with a scheduler beside it.

    Nothing is downloaded, and nothing in the folder is run.
    Args:
        dropout: rate in training. img_size: where the configuration does not state it.
    Raises:
        UserError: there is no such model, its files are damaged, or it is no model of images.
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
    entries = read_schedule(folder)
    config = read_config(folder)
    network = DiffusersUNet(read_unet(folder, config, dropout),
                            isinstance(entries['schedule'], dict))
    network.entries['origin'] = name_of(folder, str(config.get('_name_or_path') or 'none'))
    arch = network.architecture(entries.get('N', entries['T'] * entries['time_scale']))
    diffusion = Diffusion(**grid_of(entries, arch['T'], folder))
    size = config.get('sample_size') or entries.get('img_size', img_size)
    return Model(network, diffusion, main_file(path), 'net_model', arch, size,
                 dict(entries, **network.entries))


def name_of(folder, path):
    """Name of the model in a folder: owner/name on a hub, if its configuration says so."""
    folder = folder.resolve()
    if len(path.split('/')) == 2 and path[0] not in './~':
        return path
    return folder.parent.name if folder.name in ('unet', 'unet_ema') else folder.name


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


def read_config(folder):
    """The settings in config.json of a UNet2DModel, checked; sample_size is a number or absent."""
    file = folder / 'config.json'
    config = read_json(file)
    size = config.pop('sample_size', None)
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if size is not None:
        config['sample_size'] = size
    table = dict(SETTINGS, sample_size=ENTRIES['img_size'])
    check_config(config, ['UNet2DModel'], table, file, ignored=AVERAGE)
    return config


def read_unet(folder, config, dropout):
    """The UNet2DModel in a folder, as diffusers reads it, in float32; `config` is its config.json.

    Raises:
        UserError: its weights are missing, damaged, not finite, or those of another network.
    """
    from diffusers import UNet2DModel
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
            ignore_mismatched_sizes=True, output_loading_info=True, dropout=dropout)
    except Exception as error:      # what is raised depends on the files
        raise UserError(f'{folder} holds no network that diffusers can load '
                        f'({first_line(error)}); restore a copy of config.json and the weights')
    wrong = [*info['missing_keys'], *info['unexpected_keys'],
             *(key for key, *_ in info['mismatched_keys'])]
    if wrong:
        raise UserError(f'the weights in {folder} are not those of its config.json: {wrong[0]} is '
                        f'missing, unexpected or of another shape; restore a copy of both')
    for key, value in unet.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f'{key} in {folder} has values that are not finite; give another model')
    return unet


def read_schedule(folder):
    """The arguments of the `Diffusion` of the U-Net in a folder, and how it was trained."""
    for file in (folder.parent / 'training.json', folder / 'training.json'):    # from `write`
        training = read_json(file) if file.is_file() else {}
        if {'T', 'time_scale', 'mean_type', 'schedule'} <= set(training):
            check(training, ENTRIES, file)
            return training
    for place in (folder.parent / 'scheduler', folder.parent.parent / 'scheduler',
                  folder / 'scheduler', folder):
        file = place / 'scheduler_config.json'
        if file.is_file():
            return diffusers_scheduler.grid_of_scheduler(read_json(file), file)
    raise UserError(f'there is no scheduler_config.json, which defines the schedule, beside '
                    f'{folder}; give the folder of a whole pipeline of diffusers')
