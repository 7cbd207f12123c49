"""Our schedule as a `DDIMScheduler` of diffusers, and back."""

from inspect import signature

import torch

from diffusion import alpha_bar_table
from runtime.cli import UserError

PREDICTIONS = dict(sample='xstart', epsilon='epsilon', v_prediction='v')        # {theirs: ours}
TABLES = ('linear', 'cosine')       # our own, without a clean end
# Schedulers with betas and timesteps 0..N - 1; how they sample does not matter here
SCHEDULERS = ('DDPMScheduler', 'DDIMScheduler', 'PNDMScheduler', 'DPMSolverMultistepScheduler',
              'DPMSolverSinglestepScheduler', 'DEISMultistepScheduler', 'UniPCMultistepScheduler',
              'EulerDiscreteScheduler', 'EulerAncestralDiscreteScheduler', 'LMSDiscreteScheduler')
BETAS = ('num_train_timesteps', 'beta_start', 'beta_end', 'beta_schedule', 'trained_betas',
         'rescale_betas_zero_snr')


def scheduler_config(diffusion, stride, file='the checkpoint'):
    """Arguments of the DDIMScheduler that visits our times with our alpha and sigma.

    A schedule with a clean end is theirs: index k is their timestep k - 1, the spacing "trailing".
    Our own table of betas has N + 1 entries, but `num_train_timesteps` is N, so that n steps are
    N / n apart. `steps_offset` makes the first time N; the last step ends at index 0, as ours does.
    Raises:
        UserError: the steps are not equally far apart, as those of DDIMScheduler are.
    """
    nfe, N, schedule = diffusion.T // stride, diffusion.N, diffusion.schedule
    if N % nfe:
        raise UserError(f'{file} has {nfe} steps on a grid of {N}, and the steps of diffusers are '
                        f'equally far apart only if their number divides {N}; export with --format '
                        f'onnx or safetensors, or with a --stride that leaves a divisor')
    theirs = {ours: name for name, ours in PREDICTIONS.items()}
    common = dict(num_train_timesteps=N, clip_sample=True, clip_sample_range=1.,
                  prediction_type=theirs[diffusion.mean_type])
    if isinstance(schedule, dict):
        return dict(common, trained_betas=schedule['betas'], timestep_spacing='trailing',
                    set_alpha_to_one=True, steps_offset=0)
    alpha_bar = diffusion.alpha ** 2
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return dict(common, trained_betas=betas.tolist(), timestep_spacing='leading',
                set_alpha_to_one=False, steps_offset=N // nfe)


def grid_of_scheduler(config, file='the scheduler'):
    """The arguments of the `Diffusion` that a scheduler's configuration describes.

    Args:
        file: of the configuration, for messages.
    Raises:
        UserError: an unknown scheduler, output or field, or a schedule on which eps says nothing.
    """
    betas = config.get('trained_betas')
    prediction = config.get('prediction_type', 'epsilon')
    if prediction not in PREDICTIONS:
        raise UserError(f'prediction_type in {file} is {prediction}, expected one of '
                        f'{", ".join(PREDICTIONS)}; give a model that predicts one of them')
    grid = dict(time_scale=1, mean_type=PREDICTIONS[prediction])
    if betas is not None and len(betas) == config.get('num_train_timesteps', 1000) + 1:
        N, offset = len(betas) - 1, config.get('steps_offset', 0)       # from `scheduler_config`
        name = schedule_of_betas(betas)
        if name and offset and N % offset == 0:
            return dict(grid, T=N // offset, time_scale=offset, schedule=name)
    betas = betas_of(config, file)
    name = 'trained' if config.get('trained_betas') else config.get('beta_schedule', 'linear')
    return dict(grid, T=len(betas), schedule=dict(name=name, betas=betas))


def betas_of(config, file):
    """The betas of a scheduler as diffusers computes them, a list."""
    import diffusers
    check_class(config, SCHEDULERS, file)
    check_fields(config, getattr(diffusers, config['_class_name']), file)
    try:
        settings = {key: config[key] for key in BETAS if key in config}
        betas = diffusers.DDPMScheduler(**settings).betas
        alpha_bar = torch.cumprod(1 - betas, 0)
        if len(betas) < 1 or betas.min() < 0 or not alpha_bar.isfinite().all():
            raise ValueError('its betas are not numbers from 0 to 1')
    except Exception as error:      # what is raised depends on the values
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f'{file} describes no schedule that diffusers can compute ({reason}); '
                        f'restore a copy')
    if config.get('prediction_type', 'epsilon') == 'epsilon' and alpha_bar[-1] <= 0:
        raise UserError(f'the schedule in {file} ends with alpha 0, where eps says nothing about '
                        f'the image; give a model with the prediction_type v_prediction or sample')
    return betas.float().tolist()


def check_class(config, expected, file):
    """Refuse a configuration of another class than the `expected` one, or ones."""
    names = [expected] if isinstance(expected, str) else expected
    if config.get('_class_name') not in names:
        raise UserError(f'the class in {file} is {config.get("_class_name")}, expected '
                        f'{" or ".join(names)}; give another model')


def check_fields(config, kind, file):
    """Refuse settings that this version of diffusers does not know for a class, `kind`.

    What old versions knew and left at null says nothing.
    """
    known = signature(kind.__init__).parameters
    unknown = sorted(key for key, value in config.items()
                     if key[:1] != '_' and key not in known and value is not None)
    if unknown:
        raise UserError(f'{file} has {", ".join(unknown)}, which {kind.__name__} of the installed '
                        f'diffusers does not know; remove it there, or install another version')


def schedule_of_betas(betas):
    """The name of our own table with these betas, or None."""
    alpha_bar = torch.cumprod(1 - torch.tensor(betas).double(), 0)
    for name in TABLES:
        if torch.allclose(alpha_bar, alpha_bar_table(len(betas) - 1, name), rtol=1e-3, atol=1e-6):
            return name
    return None
