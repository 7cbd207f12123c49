"""Teachers of diffusers and pytorch-ddpm: the same images, students, exports; odd folders."""

import copy
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
from helpers import assert_ran, command, fork_all

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


def test_group_norms_in_float32(tmp_path):
    """Under bfloat16 autocast on a CPU, in copies too, as in our U-Net; convolutions are not."""
    pipeline(tmp_path, **HEADS)
    network, seen = copy.deepcopy(models.load_model(tmp_path, steps=4).network), {}
    for module in network.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.Conv2d)):
            module.register_forward_hook(
                lambda module, _, out: seen.setdefault(type(module), set()).add(out.dtype))
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        network(noise(2, 16), torch.tensor([1, 1000]))
    assert seen == {torch.nn.GroupNorm: {torch.float32}, torch.nn.Conv2d: {torch.bfloat16}}


def test_students_of_every_output(tmp_path):
    """One training step to each; the default of a teacher that predicts x_0 is x_0."""
    pipeline(tmp_path / 'eps')
    pipeline(tmp_path / 'x', dict(prediction_type='sample'))
    pipeline(tmp_path / 'v', dict(prediction_type='v_prediction', rescale_betas_zero_snr=True))
    cases = [('eps', None, 'v'), ('eps', 'epsilon', 'epsilon'), ('eps', 'xstart', 'xstart'),
             ('x', None, 'xstart'), ('v', None, 'v'), ('v', 'xstart', 'xstart')]
    jobs = {}
    for teacher, wanted, _ in cases:
        words = [f'--base_ckpt={tmp_path}/{teacher}', '--teacher_steps=128', '--img_size=8',
                 f'--logdir={tmp_path}/{teacher}_{wanted}', *TRAINING]
        words += [f'--mean_type={wanted}'] if wanted else []
        jobs[f'{teacher}_{wanted}'] = [command(['PD.py'], *words)]
    results = fork_all(jobs)
    for teacher, wanted, found in cases:
        name = f'{teacher}_{wanted}'
        assert_ran(results[name])
        student = models.load_model(tmp_path / name)
        assert (student.diffusion.T, student.diffusion.mean_type) == (64, found), name
        note = dict(eps='epsilon', x='xstart').get(teacher, teacher) != found
        assert ('note: the student predicts' in results[name][0][1]) == note
        losses = [json.loads(line)['loss']
                  for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]
        assert np.isfinite(losses).all()
    assert models.load_model(tmp_path / 'v').diffusion.alpha[-1] == 0


# pytorch-ddpm

def test_a_file_of_pytorch_ddpm_becomes_a_teacher(tmp_path):
    """Its times 0..999 are 1..1000 behind a clean end, and its average is distilled."""
    torch.manual_seed(0)
    old, average = (UNet(999, 32, [1, 1], [1], 1).eval() for _ in range(2))
    checkpoint.save(tmp_path / 'ckpt.pt', dict(net_model=old.state_dict(),
                                               ema_model=average.state_dict()))
    model, t = models.load_model(tmp_path, steps=128), torch.tensor([0, 999])
    with torch.no_grad():
        assert torch.equal(model.network(noise(2), t + 1), average(noise(2), t))
    d = model.diffusion
    assert (d.T, d.N, d.mean_type, d.schedule) == (128, 1000, 'epsilon', clean_linear())
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, .02, 1000).double(), 0)
    torch.testing.assert_close(d.alpha[1:] ** 2, alpha_bar, rtol=1e-5, atol=0)
    assert_ran(fork_all(dict(run=[command(
        ['PD.py'], f'--base_ckpt={tmp_path}', '--teacher_steps=8', '--until=2', '--img_size=8',
        f'--logdir={tmp_path}/students', *TRAINING)]))['run'])
    student = models.load_model(tmp_path / 'students/2').diffusion
    assert (student.times(), student.mean_type) == ([1000, 500, 0], 'v')


# Odd folders

def edited(file, **changes):
    """Other settings in a JSON file; None takes one out."""
    config = dict(json.loads(file.read_text()), **changes)
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def no_scheduler(folder):
    shutil.rmtree(str(folder / 'scheduler'))


def unknown_class(folder):
    edited(folder / 'unet/config.json', _class_name='UNet2DConditionModel')


def unknown_scheduler(folder):
    edited(folder / 'scheduler/scheduler_config.json', _class_name='EDMEulerScheduler')


def zero_alpha(folder):
    edited(folder / 'scheduler/scheduler_config.json', rescale_betas_zero_snr=True)


def unknown_prediction(folder):
    edited(folder / 'scheduler/scheduler_config.json', prediction_type='flow')


def unknown_betas(folder):
    edited(folder / 'scheduler/scheduler_config.json', beta_schedule='mine')


def no_time(folder):
    edited(folder / 'scheduler/scheduler_config.json', num_train_timesteps='many')


def truncated(folder):
    file = folder / 'unet/diffusion_pytorch_model.safetensors'
    file.write_bytes(file.read_bytes()[:5000])


def no_weights(folder):
    (folder / 'unet/diffusion_pytorch_model.safetensors').unlink()


def unknown_field(folder):
    edited(folder / 'unet/config.json', use_novelty=True)


def impossible_field(folder):
    edited(folder / 'unet/config.json', down_block_types=['DownBlock2D', 'NoBlock2D'])


def no_json(folder):
    (folder / 'unet/config.json').write_text('{"act_fn": ')


def other_widths(folder):
    edited(folder / 'unet/config.json', block_out_channels=[32, 32])


def grey(folder):
    edited(folder / 'unet/config.json', in_channels=1)


def latents(folder):
    edited(folder / 'model_index.json', vqvae=['diffusers', 'VQModel'])


class Evil:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), 'w')


def pickle_for_safetensors(folder):
    torch.save(dict(a=Evil(folder / 'ran')), folder / 'unet/diffusion_pytorch_model.safetensors')


def pickle_alone(folder):
    no_weights(folder)
    torch.save(dict(a=Evil(folder / 'ran')), folder / 'unet/diffusion_pytorch_model.bin')


ODD = {no_scheduler: 'no scheduler_config.json', unknown_class: 'is UNet2DConditionModel, expected',
       unknown_scheduler: 'is EDMEulerScheduler, expected DDPMScheduler',
       zero_alpha: 'ends with alpha 0', unknown_prediction: 'prediction_type in .* is flow',
       unknown_betas: 'no schedule that diffusers can compute',
       no_time: 'no schedule that diffusers can compute',
       truncated: 'truncated or no file of safetensors', no_weights: 'the weights of its U-Net',
       unknown_field: 'has use_novelty, which UNet2DModel', no_json: 'is no dictionary in JSON',
       impossible_field: 'no network that diffusers can build',
       other_widths: 'not those of its config.json', grey: 'in_channels in .* is 1, expected 3',
       latents: 'has vqvae besides', pickle_alone: 'could run code',
       pickle_for_safetensors: 'no file of safetensors'}


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    diffusers()
    folder = tmp_path_factory.mktemp('odd') / 'good'
    pipeline(folder)
    return folder


@pytest.mark.parametrize('damage', list(ODD), ids=lambda damage: damage.__name__)
def test_an_odd_folder_is_refused(good, tmp_path, damage):
    shutil.copytree(str(good), str(tmp_path / 'given'))
    damage(tmp_path / 'given')
    with pytest.raises(UserError, match=ODD[damage]) as caught:
        models.load_model(tmp_path / 'given', steps=8)
    assert '\n' not in str(caught.value) and not (tmp_path / 'given/ran').exists()


def test_mistakes_are_one_sentence_and_write_nothing(good, tmp_path):
    base = [f'--base_ckpt={good}', f'--logdir={tmp_path}/new', '--img_size=8', *TRAINING]
    cases = {
        '--teacher_steps 2000 is more than the 1000 steps': ['PD.py', *base,
                                                             '--teacher_steps=2000'],
        'has 125 sampling steps, which cannot be halved': ['PD.py', *base, '--teacher_steps=125'],
        '--until 8 is not reached': ['PD.py', *base, '--until=8'],
        '--img_size is 16': ['train_rdd.py', *base, '--img_size=16', '--teacher_steps=8'],
        '--ch is 64 and the network': ['PD.py', *base, '--ch=64', '--teacher_steps=8'],
        'set --dropout=0': ['PD.py', *base, '--dropout=0.1', '--teacher_steps=8'],
        'divides 1000; export with': ['export.py', f'--logdir={good}', '--teacher_steps=128',
                                      f'--output={tmp_path}/new']}
    results = fork_all({name: [command(words[:1], *words[1:])] for name, words in cases.items()})
    for sentence, ((code, _, error),) in results.items():
        lines = [line for line in error.strip().splitlines() if 'error: ' in line]
        assert code == 2 and len(lines) == 1 and sentence in lines[0], error
    assert not (tmp_path / 'new').exists()
