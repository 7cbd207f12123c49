"""Folders of diffusers: write one from a model, and read one as a checkpoint."""

import json
from inspect import signature
from pathlib import Path

from formats import diffusers_scheduler, diffusers_unet, facts
from formats.packages import check_packages
from runtime import checkpoint
from runtime.checkpoint import differences
from runtime.cli import UserError

DETAILS = dict(norm_eps=1e-5, downsample_padding=1)     # of our own networks
WEIGHTS = 'diffusion_pytorch_model'
OLD_ATTENTION = dict(query='to_q', key='to_k', value='to_v', proj_attn='to_out.0')


def write(model, stride, folder):
    """unet/, scheduler/ and training.json; an unconditional model becomes a whole DDIMPipeline.

    DDIMPipeline cannot pass labels on, so the card of a conditional model has a sampling loop.
    Raises:
        UserError: no scheduler visits the times of the model, or no UNet2DModel is its network.
    """
    from diffusers import DDIMPipeline, DDIMScheduler
    scheduler = DDIMScheduler(**diffusers_scheduler.scheduler_config(model.diffusion, stride,
                                                                     model.file))
    unet = as_diffusers(model)
    if model.arch['conditional']:
        unet.save_pretrained(folder / 'unet')
        scheduler.save_pretrained(folder / 'scheduler')
    else:
        DDIMPipeline(unet, scheduler).save_pretrained(folder)
    facts.write_json(folder / 'training.json',
                     dict(model.diffusion.arguments(), **facts.origin(model)))


def as_diffusers(model):
    """The UNet2DModel with the weights of a `runtime.models.Model`."""
    from diffusers import UNet2DModel
    network, arch, file = model.network, model.arch, model.file
    if 'unet_config' in model.facts:
        return network.unet
    unet = UNet2DModel(**diffusers_unet.unet_config(network, arch, model.img_size, file))
    unet.load_state_dict(diffusers_unet.to_diffusers(network.state_dict(), arch, file))
    return unet


def is_folder(path):
    """Whether a path is a folder of diffusers rather than that of a run."""
    return not (Path(path).expanduser() / 'ckpt.pt').exists() and main_file(path) is not None


def main_file(path):
    """What stands for a folder of diffusers in messages, or None; results go beside it."""
    names = ('model_index.json', 'unet', 'config.json', 'scheduler_config.json')
    return next((file for file in (Path(path).expanduser() / name for name in names)
                 if file.exists()), None)


def read(source):
    """The checkpoint of a pipeline folder, or of a UNet2DModel folder with a scheduler beside it.

    Nothing is downloaded, and nothing in the folder is run.
    Raises:
        UserError: there is no such model, its files are damaged, or it is no model of images.
    """
    check_packages(['diffusers', 'safetensors'])
    source = Path(source).expanduser()
    check_pipeline(source / 'model_index.json')
    folder = source / 'unet' if (source / 'unet').is_dir() else source
    state = grid_of(folder)
    config = read_config(folder)
    weights = read_weights(folder)
    check_shapes(weights, config, folder)
    state.update(img_size=config['sample_size'], use='net_model',
                 origin=name_of(folder, config['_name_or_path']))
    del config['_name_or_path']
    if isinstance(state['schedule'], dict) and diffusers_unet.difference(config):
        weights = {f'unet.{key}': value for key, value in weights.items()}
        return dict(state, unet_config=config, net_model=weights)
    diffusers_unet.check_family(config, folder)
    details = {key: config[key] for key in DETAILS}
    if details != DETAILS:
        state['details'] = details
    N, first = state.get('N', state['T'] * state['time_scale']), 0
    if isinstance(state['schedule'], dict):
        first = -1      # index 0 is the clean end, where no network is called
    return dict(state, net_model=diffusers_unet.from_diffusers(weights, config, N, first))


def name_of(folder, path):
    """Name of the model in a folder: owner/name on a hub, if its configuration says so."""
    folder = folder.resolve()
    if len(path.split('/')) == 2 and path[0] not in './~':
        return path
    return folder.parent.name if folder.name == 'unet' else folder.name


def read_json(file, meaning):
    """The dictionary in a file of diffusers."""
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f'{file.parent} has no {file.name}, {meaning}; give the folder of a whole '
                        f'pipeline of diffusers')
    except (ValueError, OSError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f'{file} is damaged: it is no dictionary in JSON; restore a copy')
    return config


def check_pipeline(file):
    """Refuse a pipeline that has more than a U-Net and a scheduler, such as one of latents."""
    index = read_json(file, '') if file.exists() else {}
    more = sorted(key for key in index if key[0] != '_' and key not in ('unet', 'scheduler'))
    if more:
        raise UserError(f'the pipeline in {file.parent} has {", ".join(more)} besides its U-Net '
                        f'and scheduler; give one that makes images with a U-Net alone')


def read_config(folder):
    """All arguments of the UNet2DModel in a folder, as plain types, and its _name_or_path."""
    import torch
    from diffusers import UNet2DModel
    file = folder / 'config.json'
    config = read_json(file, 'which describes a UNet2DModel')
    diffusers_scheduler.check_class(config, 'UNet2DModel', file)
    diffusers_scheduler.check_fields(config, UNet2DModel, file)
    given = {key: value for key, value in config.items()
             if key in signature(UNet2DModel.__init__).parameters}
    try:
        with torch.device('meta'):
            full = dict(UNet2DModel(**given).config)
    except Exception as error:      # what is raised depends on the values
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f'{file} describes no network that diffusers can build ({reason}); restore '
                        f'a copy')
    full = {key: value for key, value in json.loads(json.dumps(full)).items() if key[0] != '_'}
    check_images(full, file)
    return dict(full, _name_or_path=str(config.get('_name_or_path') or 'none'))


def check_images(config, file):
    """Refuse a network that does not map square RGB images to square RGB images."""
    expected = dict(in_channels=3, out_channels=3, class_embed_type=None)
    for name, value in expected.items():
        if config[name] != value:
            raise UserError(f'{name} in {file} is {config[name]}, expected {value}; give a network '
                            f'of RGB images without labels or with a table of them')
    if not isinstance(config['sample_size'], int):
        raise UserError(f'sample_size in {file} is {config["sample_size"]}, expected one number; '
                        f'write the height and width of the images there')


def read_weights(folder):
    """{name: float32 tensor} of the U-Net in a folder, attention in today's names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    files = sorted(folder.glob('*.safetensors'), key=lambda f: (f.stem != WEIGHTS, f.name))
    pickled = folder / f'{WEIGHTS}.bin'
    if not files and not pickled.is_file():
        raise UserError(f'{folder} has no {WEIGHTS}.safetensors, the weights of its U-Net; give '
                        f'the folder of a whole pipeline of diffusers')
    try:
        weights = load_file(files[0]) if files else checkpoint.read(pickled)
    except (SafetensorError, ValueError, OSError):
        raise UserError(f'{files[0]} is truncated or no file of safetensors; nothing in it was '
                        f'run, restore a copy')
    return {new_name(key): value.float() for key, value in weights.items()}


def new_name(key):
    """The name of a parameter in today's diffusers, where older ones had other attention layers."""
    words = key.split('.')
    if 'attentions' in words and words[-2] in OLD_ATTENTION:
        words[-2] = OLD_ATTENTION[words[-2]]
    return '.'.join(words)


def check_shapes(weights, config, folder):
    """Refuse weights that are not those of the network that the configuration describes."""
    import torch
    from diffusers import UNet2DModel
    with torch.device('meta'):
        unet = UNet2DModel(**{key: value for key, value in config.items() if key[0] != '_'})
    for key, found, expected in differences(weights, unet.state_dict()):
        raise UserError(f'the weights in {folder} are not those of its config.json: {key} is '
                        f'{found}, expected {expected}; restore a copy of both')


def grid_of(folder):
    """The arguments of the `Diffusion` of the U-Net in a folder, and facts about its training."""
    training = facts.read_json(folder.parent / 'training.json')     # if `write` made the folder
    training = training or facts.read_json(folder / 'training.json')
    if 'T' not in training:
        file = scheduler_file(folder)
        config = read_json(file, 'which defines the schedule')
        return diffusers_scheduler.grid_of_scheduler(config, file)
    keys = ('T', 'time_scale', 'mean_type', 'schedule', 'N', *facts.ORIGIN)
    return {key: training[key] for key in keys if key in training}


def scheduler_file(folder):
    """The configuration of the scheduler that belongs to the U-Net in a folder."""
    for path in (folder.parent / 'scheduler', folder / 'scheduler', folder):
        if (path / 'scheduler_config.json').is_file():
            return path / 'scheduler_config.json'
    raise UserError(f'there is no scheduler_config.json, which defines the schedule, beside '
                    f'{folder}; give the folder of a whole pipeline of diffusers')
