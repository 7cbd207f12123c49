"""Teachers of diffusers and pytorch-ddpm: the same images, students, exports; odd folders."""

import json
import shutil

import numpy as np
import pytest
import torch

from diffusion import Diffusion, clean_linear
from formats import diffusers_scheduler
from model import UNet
from runtime import checkpoint, models
from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision
from helpers import NETWORK, assert_ran, command, fork_all

SIZE = 8
SMALL = dict(sample_size=SIZE, layers_per_block=1, block_out_channels=(32, 64),
             down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
             up_block_types=('AttnUpBlock2D', 'UpBlock2D'))
# the structure of published networks, in widths and a size that a test can afford
GOOGLE = dict(norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
              attention_head_dim=None)
CIFAR10 = dict(GOOGLE, sample_size=16, layers_per_block=2, block_out_channels=(32, 64, 64, 64),
               down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'),
               up_block_types=('UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'))
CELEBAHQ = dict(GOOGLE, sample_size=64, layers_per_block=2,
                block_out_channels=(32, 32, 64, 64, 128, 128),
                down_block_types=('DownBlock2D',) * 4 + ('AttnDownBlock2D', 'DownBlock2D'),
                up_block_types=('UpBlock2D', 'AttnUpBlock2D') + ('UpBlock2D',) * 4)
HEADS = dict(sample_size=16, layers_per_block=2, block_out_channels=(32, 64, 64, 128),
             down_block_types=('DownBlock2D', 'DownBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
             up_block_types=('AttnUpBlock2D', 'AttnUpBlock2D', 'UpBlock2D', 'UpBlock2D'))
TRAINING = ['--dataset=digits', '--batch_size=4', '--num_workers=0', '--sample_size=2',
            '--log_step=1', '--sample_step=0', '--save_step=0', '--total_steps=1', '--lr=1e-4']


def diffusers():
    torchvision()       # diffusers imports it if it is installed
    return pytest.importorskip('diffusers', reason='optional, see requirements-export.txt')


def pipeline(folder, schedule=None, **config):
    """A folder as diffusers saves a pipeline, with random weights; returns network, scheduler."""
    lib = diffusers()
    torch.manual_seed(2)
    unet = lib.UNet2DModel(**dict(SMALL, **config)).eval()
    scheduler = lib.DDPMScheduler(**(schedule or {}))
    lib.DDPMPipeline(unet, scheduler).save_pretrained(str(folder))
    return unet, scheduler


def ddim(scheduler, prediction, steps):
    """DDIMScheduler with the spacing "trailing", for the betas of another scheduler."""
    result = diffusers().DDIMScheduler.from_config(
        scheduler.config, timestep_spacing='trailing', set_alpha_to_one=True, steps_offset=0,
        clip_sample=True, prediction_type=prediction)
    result.set_timesteps(steps)
    return result


@torch.no_grad()
def their_images(unet, scheduler, z, y=None):
    for t in scheduler.timesteps:
        out = unet(z, t, y)
        z = scheduler.step(getattr(out, 'sample', out), t, z,
                           use_clipped_model_output=True).prev_sample
    return z.clamp(-1, 1)


@torch.no_grad()
def our_images(model, z, stride=1, y=None):
    return model.diffusion.sample(model.network, z, stride, y=y)


def noise(count=3, size=SIZE):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


# DDIM

@pytest.mark.parametrize('steps', [8, 50])
@pytest.mark.parametrize('prediction', ['epsilon', 'sample', 'v_prediction'])
@pytest.mark.parametrize('beta_schedule', ['linear', 'scaled_linear', 'squaredcos_cap_v2'])
def test_ddim_of_diffusers(beta_schedule, prediction, steps):
    scheduler = diffusers().DDPMScheduler(beta_schedule=beta_schedule, prediction_type=prediction)
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 3, 3, padding=1)

    def network(z, t, y=None):
        return torch.tanh(convolution(z) + torch.sin(t / 300.).reshape(-1, 1, 1, 1))

    grid = diffusers_scheduler.grid_of_scheduler(
        json.loads(scheduler.to_json_string()))
    diffusion = Diffusion(**grid).with_steps(steps)
    theirs = their_images(network, ddim(scheduler, prediction, steps), noise())
    with torch.no_grad():
        ours = diffusion.sample(lambda z, t, y: network(z, t - 1), noise())
    assert ours.std() > .1 and (ours - theirs).abs().max() <= 1e-5
    assert diffusion.times()[:-1] == (ddim(scheduler, prediction, steps).timesteps + 1).tolist()


@pytest.mark.parametrize('steps', [128, 64, 32, 16, 3])
def test_rounded_times_are_those_of_trailing_spacing(steps):
    """The times, where the number of steps does not divide 1000; their step() is not right then."""
    scheduler = ddim(diffusers().DDPMScheduler(), 'epsilon', steps)
    assert Diffusion(steps, N=1000).times()[:-1] == (scheduler.timesteps + 1).tolist()


# Networks

@pytest.mark.parametrize('name, conditional, ours', [
    ('CIFAR10', False, True), ('CIFAR10', True, True), ('CELEBAHQ', False, True),
    ('HEADS', False, False), ('HEADS', True, False)])
def test_a_network_is_loaded_trained_and_exported(tmp_path, name, conditional, ours):
    config = dict(globals()[name], num_class_embeds=10 if conditional else None)
    unet, scheduler = pipeline(tmp_path / 'given', **config)
    y, x_T = (torch.tensor([3, 9]) if conditional else None), noise(2, config['sample_size'])
    model = models.load_model(tmp_path / 'given', steps=4)
    assert isinstance(model.network, UNet) == ours and model.img_size == config['sample_size']
    unet.double(), model.network.double()   # random weights enlarge the rounding of float32
    with torch.no_grad():
        t = torch.tensor([0, 999])
        assert (unet(x_T.double(), t, y).sample - model.network(x_T.double(), t + 1, y)
                ).abs().max() < 1e-9
    theirs = their_images(unet, ddim(scheduler, 'epsilon', 4), x_T.double(), y)
    assert (our_images(model, x_T.double(), y=y) - theirs).abs().max() < 1e-3

    given = [f'--base_ckpt={tmp_path}/given', '--teacher_steps=4', *TRAINING,
             f'--img_size={config["sample_size"]}']
    made = f'--logdir={tmp_path}/student'
    assert_ran(fork_all(dict(run=[
        command(['PD.py'], *given, made), command(['PD.py'], *given, made, '--total_steps=2'),
        command(['export.py'], made, f'--output={tmp_path}/diffusers')]))['run'])
    student = models.load_model(tmp_path / 'student')
    assert (student.diffusion.T, student.diffusion.N, student.diffusion.mean_type) == (2, 1000, 'v')
    assert student.facts['origin'] == 'given' and student.facts['step'] == 2
    assert '`given`' in (tmp_path / 'diffusers/README.md').read_text()
    lib = diffusers()
    unet = lib.UNet2DModel.from_pretrained(str(tmp_path / 'diffusers/unet')).eval()
    scheduler = lib.DDIMScheduler.from_pretrained(str(tmp_path / 'diffusers/scheduler'))
    scheduler.set_timesteps(2)
    wanted = our_images(student, x_T, y=y)
    assert (their_images(unet, scheduler, x_T, y) - wanted).abs().max() < 1e-4
    again = models.load_model(tmp_path / 'diffusers')
    assert (again.diffusion.T, again.diffusion.mean_type) == (2, 'v')
    difference = (our_images(again, x_T, y=y) - wanted).abs().max()
    assert difference == 0 or conditional and difference < 1e-5     # biases of labels are merged
