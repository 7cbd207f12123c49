"""Our schedule as a `DDIMScheduler` of diffusers, and schedules of diffusers as ours."""

from inspect import signature

import torch

from formats.diffusers_network import check_config
from formats.entries import TIMES, are_betas
from formats.packages import first_line
from runtime import distributed
from runtime.cli import UserError

PREDICTIONS = dict(sample='xstart', epsilon='epsilon', v_prediction='v')        # {theirs: ours}
# Schedulers with betas and timesteps 0..N - 1; how they sample does not matter here
SCHEDULERS = ('DDPMScheduler', 'DDIMScheduler', 'PNDMScheduler', 'DPMSolverMultistepScheduler',
              'DPMSolverSinglestepScheduler', 'DEISMultistepScheduler', 'UniPCMultistepScheduler',
              'EulerDiscreteScheduler', 'EulerAncestralDiscreteScheduler', 'LMSDiscreteScheduler')
BETAS = ('num_train_timesteps', 'beta_start', 'beta_end', 'beta_schedule', 'trained_betas',
         'rescale_betas_zero_snr')
# Settings of earlier versions, of which predict_epsilon alone matters here
EARLIER = ('predict_epsilon', 'tensor_format', 'timestep_values', 'skip_prk_steps')
SETTINGS = dict(
    num_train_timesteps=TIMES, trained_betas=(list, are_betas, 'null or betas in (0, 1)'),
    prediction_type=(str, lambda value: value in PREDICTIONS, ' or '.join(PREDICTIONS)))


def scheduler_config(diffusion, stride, file='the checkpoint'):
    """Arguments of the DDIMScheduler that visits our times with our alpha and sigma.

    Where index 0 is the clean image, our index k is their timestep k - 1, the spacing "trailing".
    Our own table of betas has N + 1 entries, but `num_train_timesteps` is N, so that n steps are
    N / n apart. `steps_offset` makes the first time N; the last step ends at index 0, as ours does.
    Raises:
        UserError: the steps are not equally far apart, as those of DDIMScheduler are.
    """
    nfe, N = diffusion.T // stride, diffusion.N
    if N % nfe:
        raise UserError(f'{file} has {nfe} steps on a grid of {N}, and the steps of diffusers are '
                        f'equally far apart only if their number divides {N}; export with --format '
                        f'onnx or safetensors, or with a --stride that leaves a divisor')
    theirs = {ours: name for name, ours in PREDICTIONS.items()}
    common = dict(num_train_timesteps=N, clip_sample=True, clip_sample_range=1.,
                  prediction_type=theirs[diffusion.mean_type])
    if diffusion.clean_end:
        # without rescale_betas_zero_snr, other schedulers of diffusers divide by an alpha of 0
        return dict(common, trained_betas=diffusion.schedule['betas'], timestep_spacing='trailing',
                    set_alpha_to_one=True, steps_offset=0,
                    rescale_betas_zero_snr=bool(diffusion.alpha[-1] == 0))
    alpha_bar = diffusion.alpha ** 2
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return dict(common, trained_betas=betas.tolist(), timestep_spacing='leading',
                set_alpha_to_one=False, steps_offset=N // nfe)


def grid_of_scheduler(config, file='the scheduler'):
    """The arguments of the `Diffusion` that a scheduler's configuration describes.

    Args:
        file: of the configuration, for messages.
    Raises:
        UserError: an unknown scheduler, output or setting, or a schedule that cannot be computed.
    """
    check_config(config, SCHEDULERS, SETTINGS, file, ignored=EARLIER)
    betas = betas_of(config, file)
    unused = [f'{key} {config[key]}' for key, ours in
              dict(clip_sample=True, clip_sample_range=1, thresholding=False).items()
              if config.get(key, ours) != ours]
    if unused:
        distributed.print0(f'note: {", ".join(unused)} in {file} is not used: images are clipped '
                           f'to [-1, 1] here.')
    predicts_x = config.get('predict_epsilon') is False
    prediction = 'sample' if predicts_x else config.get('prediction_type') or 'epsilon'
    name = 'trained' if config.get('trained_betas') else config.get('beta_schedule', 'linear')
    return dict(T=len(betas), time_scale=1, mean_type=PREDICTIONS[prediction],
                schedule=dict(name=name, betas=betas))


def betas_of(config, file):
    """The betas of a scheduler as diffusers computes them, a list."""
    from diffusers import DDPMScheduler
    try:
        known = signature(DDPMScheduler.__init__).parameters
        scheduler = DDPMScheduler(**{key: config[key] for key in BETAS
                                     if key in config and key in known})
        betas = scheduler.betas.float().tolist()
        if len(betas) != scheduler.config.num_train_timesteps or not are_betas(betas):
            raise ValueError('expected num_train_timesteps betas in (0, 1)')
    except Exception as error:      # what is raised depends on the values
        raise UserError(f'{file} describes no schedule that diffusers can compute '
                        f'({first_line(error)}); restore a copy')
    return betas
