"""Our schedule as a `DDIMScheduler` of diffusers, and back."""

import torch

from diffusion import alpha_bar_table
from runtime.cli import UserError

PREDICTIONS = dict(sample='xstart', epsilon='epsilon')          # {theirs: ours}
SCHEDULES = dict(linear='linear', squaredcos_cap_v2='cosine')
DDPM_BETAS = (1e-4, 0.02)       # first and last beta of the linear schedule


def scheduler_config(diffusion, stride):
    """Arguments of the DDIMScheduler that visits our times with our alpha and sigma.

    The table of betas has N + 1 entries, but `num_train_timesteps` is N, so that n steps are N / n
    apart. `steps_offset` makes the first time N; the last step ends at index 0, as ours does.
    """
    alpha_bar = diffusion.alpha ** 2
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return dict(num_train_timesteps=diffusion.N, trained_betas=betas.tolist(),
                timestep_spacing='leading', steps_offset=stride * diffusion.time_scale,
                clip_sample=True, clip_sample_range=1., set_alpha_to_one=False,
                prediction_type='sample' if diffusion.mean_type == 'xstart' else 'epsilon')


def grid_of_scheduler(config, file='the scheduler'):
    """dict(T, time_scale, mean_type, schedule) of a scheduler's configuration.

    Args:
        file: of the configuration, for messages.
    Raises:
        UserError: the network predicts neither x_0 nor eps, or the schedule is neither our cosine
        one nor DDPM's linear one.
    """
    prediction = config.get('prediction_type', 'epsilon')
    if prediction not in PREDICTIONS:
        raise UserError(f'prediction_type in {file} is {prediction}, expected sample or epsilon; '
                        f'give a model that predicts one of them')
    betas = config.get('trained_betas')
    if betas is None:
        N = config.get('num_train_timesteps', 1000) - 1
        schedule = named_schedule(config)
    else:
        N = len(betas) - 1
        schedule = schedule_of_betas(betas)
    if schedule is None:
        raise UserError(f'the schedule in {file} is {config.get("beta_schedule", "its own")}, '
                        f'expected DDPM\'s linear one (betas from 1e-4 to 0.02) or the cosine one; '
                        f'give a model with one of them')
    time_scale, offset = 1, config.get('steps_offset', 0)
    if betas is not None and offset and N % offset == 0:        # as `scheduler_config` writes it
        time_scale = offset
    return dict(T=N // time_scale, time_scale=time_scale, schedule=schedule,
                mean_type=PREDICTIONS[prediction])


def named_schedule(config):
    """Our name of the schedule that a configuration names, or None."""
    schedule = SCHEDULES.get(config.get('beta_schedule', 'linear'))
    ends = config.get('beta_start', DDPM_BETAS[0]), config.get('beta_end', DDPM_BETAS[1])
    if schedule == 'linear' and ends != DDPM_BETAS:
        return None
    return schedule


def schedule_of_betas(betas):
    """The name of our schedule with these betas, or None."""
    alpha_bar = torch.cumprod(1 - torch.tensor(betas).double(), 0)
    for name in SCHEDULES.values():
        if torch.allclose(alpha_bar, alpha_bar_table(len(betas) - 1, name), rtol=1e-3, atol=1e-6):
            return name
    return None
