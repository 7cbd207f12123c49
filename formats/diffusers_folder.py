"""Folders of diffusers: write one from a model, and read one as a checkpoint."""

from pathlib import Path

from formats import diffusers_scheduler, diffusers_unet, facts
from runtime.cli import UserError

DETAILS = dict(norm_eps=1e-5, downsample_padding=1)     # of our own networks


def write(model, stride, folder):
    """unet/, scheduler/ and training.json; an unconditional model becomes a whole DDIMPipeline.

    DDIMPipeline cannot pass labels on, so the card of a conditional model has a sampling loop.
    """
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
    network, arch, file = model.network, model.arch, model.file
    unet = UNet2DModel(**diffusers_unet.unet_config(network, arch, model.img_size, file))
    unet.load_state_dict(diffusers_unet.to_diffusers(network.state_dict(), arch, file))
    scheduler = DDIMScheduler(**diffusers_scheduler.scheduler_config(model.diffusion, stride))
    if arch['conditional']:
        unet.save_pretrained(folder / 'unet')
        scheduler.save_pretrained(folder / 'scheduler')
    else:
        DDIMPipeline(unet, scheduler).save_pretrained(folder)
    facts.write_json(folder / 'training.json',
                     dict(facts.grid(model.diffusion), **facts.origin(model)))


def read(source):
    """The checkpoint of a pipeline folder, or of a UNet2DModel folder with a scheduler beside it.

    Raises:
        UserError: there is no such model, or none that our U-Net and schedules can express.
    """
    source = Path(source).expanduser()
    folder = source / 'unet' if (source / 'unet').is_dir() else source
    unet = read_unet(folder)
    config = unet.config
    diffusers_unet.check_family(config, folder)
    training = facts.read_json(folder.parent / 'training.json')     # if `write` made the folder
    if 'T' in training:
        grid = training
    else:
        file = scheduler_file(folder)
        grid = diffusers_scheduler.grid_of_scheduler(facts.read_json(file), file)
    state = {key: grid[key] for key in ('T', 'time_scale', 'mean_type', 'schedule')}
    state.update({key: training[key] for key in facts.ORIGIN if key in training})
    details = {key: config[key] for key in DETAILS}
    if details != DETAILS:
        state['details'] = details
    ours = diffusers_unet.from_diffusers(unet.state_dict(), config, grid['T'] * grid['time_scale'])
    return dict(state, img_size=config.sample_size, net_model=ours, use='net_model')


def read_unet(folder):
    """The UNet2DModel in a folder; nothing is downloaded."""
    from diffusers import UNet2DModel
    if not (folder / 'config.json').is_file():
        raise UserError(f'--from_diffusers expects a UNet2DModel, but {folder} has no config.json; '
                        f'give the folder of a pipeline or of its U-Net')
    try:
        return UNet2DModel.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f'--from_diffusers expects a UNet2DModel, but diffusers cannot read one '
                        f'from {folder} ({reason}); give the folder of a pipeline or of its U-Net')


def scheduler_file(folder):
    """The configuration of the scheduler that belongs to the U-Net in a folder."""
    for path in (folder.parent / 'scheduler', folder / 'scheduler', folder):
        if (path / 'scheduler_config.json').is_file():
            return path / 'scheduler_config.json'
    raise UserError(f'--from_diffusers needs a scheduler_config.json, which defines the schedule, '
                    f'but there is none beside {folder}; give the folder of the whole pipeline')
