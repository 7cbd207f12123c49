"""Exported models, loaded by the libraries they are for, generate the same images as ours."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion import Diffusion
from formats import card, diffusers_scheduler, diffusers_unet
from model import UNet
from runtime import checkpoint, models
from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision

ROOT = Path(__file__).resolve().parent.parent
N, T, SIZE = 1024, 8, 8
EXTRA = 'optional, see requirements-export.txt'


def diffusers():
    torchvision()       # diffusers imports it if it is installed
    return pytest.importorskip('diffusers', reason=EXTRA)


def small_unet(conditional, **changes):
    """A network in which every layer has an effect: those that start near 0 get other weights."""
    torch.manual_seed(1)
    network = UNet(**dict(dict(T=N, ch=32, ch_mult=[1, 2], attn=[1], num_res_blocks=1,
                               conditional=conditional, class_num=3), **changes))
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            scale_of_norm = parameter.ndim == 1 and name.endswith('weight')
            torch.nn.init.normal_(parameter, mean=1. if scale_of_norm else 0., std=std)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """{conditional: folder of a student with 8 steps}, with one result beside it."""
    folder = tmp_path_factory.mktemp('runs')
    for conditional in (False, True):
        run = folder / str(conditional)
        run.mkdir()
        checkpoint.save(run / 'ckpt.pt', dict(
            net_model=small_unet(conditional).state_dict(), T=T, time_scale=N // T, method='rdd',
            step=7, mean_type='xstart', img_size=SIZE, dataset='digits', batch_size=5,
            flags='--base_ckpt=./logs/8\n--classifier=convnet_small\n--lr=0.5'))
        result = dict(nfe=8, fid=1.25, inception_score=2., inception_std=0.5, num_images=9, seed=3,
                      reference='r.npz', reference_images=11, feature_network='inception',
                      pixels='8-bit', weights='net_model')
        lines = [dict(result, step=7), dict(result, step=6, fid=77.)]
        (run / 'results.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder


def export_all(jobs):
    """{name: (exit code, output, error)} of `python export.py <words>` for {name: words}."""
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    jobs = {name: [dict(argv=['export.py', *words])] for name, words in jobs.items()}
    if not jobs:
        return {}
    done = subprocess.run([sys.executable, str(ROOT / 'tools/forks.py')], input=json.dumps(jobs),
                          stdout=subprocess.PIPE, env=env, universal_newlines=True, check=True)
    return {name: results[0] for name, results in json.loads(done.stdout).items()}


def ours(run, x_T, y=None, steps=T):
    """Images of a checkpoint in this repository."""
    state = checkpoint.read(run)
    network, _ = models.build_unet(state)
    with torch.no_grad():
        return Diffusion(state['T'], state['time_scale'], state['mean_type']).sample(
            network.eval(), x_T, state['T'] // steps, y=y)


def run_card(folder, monkeypatch, seed=0):
    """Execute the Python lines of a model card inside its folder; returns their variables."""
    text = (folder / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    monkeypatch.chdir(folder)
    torch.manual_seed(seed)
    variables = {}
    exec(text, variables)
    return variables


# Without the optional packages

@pytest.mark.parametrize('conditional', [False, True])
def test_names_and_layouts_there_and_back(conditional):
    network = small_unet(conditional, ch_mult=[1, 2, 2], attn=[0, 2], num_res_blocks=2)
    state_dict = network.state_dict()
    arch = models.architecture(state_dict)
    config = diffusers_unet.unet_config(network, arch, SIZE)
    theirs = diffusers_unet.to_diffusers(state_dict, arch)
    back = diffusers_unet.from_diffusers(theirs, config, N)
    assert config['down_block_types'] == ['AttnDownBlock2D', 'DownBlock2D', 'AttnDownBlock2D']
    assert theirs['down_blocks.2.attentions.1.to_q.weight'].shape == (64, 64)
    assert set(back) == set(state_dict)
    labels = {'y_embedding.weight', 'y_embedding.bias'}      # one table there: bias in weight
    for key in set(back) - labels:
        assert torch.equal(back[key], state_dict[key]), key
    if conditional:
        assert torch.equal(back['y_embedding.weight'], state_dict['y_embedding.weight']
                           + state_dict['y_embedding.bias'][:, None])


@pytest.mark.parametrize('stride', [1, 2, 8])
def test_scheduler_has_our_table_and_times(stride):
    """The arithmetic of DDIMScheduler with spacing "leading", written out."""
    diffusion = Diffusion(T, N // T)
    config = diffusers_scheduler.scheduler_config(diffusion, stride)
    alpha_bar = torch.cumprod(1 - torch.tensor(config['trained_betas']), 0)
    torch.testing.assert_close(alpha_bar.double().sqrt(), diffusion.alpha, rtol=1e-4, atol=0)
    steps = T // stride
    apart = config['num_train_timesteps'] // steps
    times = [i * apart + config['steps_offset'] for i in reversed(range(steps))]
    assert times + [times[-1] - apart] == diffusion.times(stride)
    assert diffusers_scheduler.grid_of_scheduler(config) == dict(
        T=steps, time_scale=apart, mean_type='xstart', schedule='cosine')


def test_card_says_how_the_model_was_made(runs):
    card.write(runs, models.load_model(runs / 'True'), 1, 'diffusers', 'cc0-1.0')
    text = (runs / 'README.md').read_text()
    for words in ('license: cc0-1.0', '7 steps of 5 images of digits', '--lr=0.5', './logs/8',
                  '1.250', 'r.npz (11)', 'class-conditional, 3 classes', 'train_rdd.py'):
        assert words in text, words
    assert '77.' not in text        # the result of an older step


def test_mistakes_leave_nothing(runs, tmp_path):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/file').write_text('')
    run, new = f'--logdir={runs}/True', f'--output={tmp_path}/new'
    cases = {'not an empty folder': [run, f'--output={tmp_path}/full'],
             'there is no checkpoint': [f'--logdir={tmp_path}/none', new],
             '--stride 3 does not divide the 8': [run, new, '--stride=3'],
             '--format onnx': [run, new, '--precision=int8'], '--output is missing': [run]}
    if importlib.util.find_spec('diffusers') is None:
        cases['pip install -r requirements-export.txt'] = [run, new]
    for sentence, (code, _, error) in export_all(cases).items():
        assert code == (1 if sentence.startswith('pip') else 2), error
        assert sentence in error and len(error.strip().splitlines()) == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ['full']


# diffusers

def importable(*names):
    return all(importlib.util.find_spec(name) for name in names)


@pytest.fixture(scope='module')
def exported(runs, tmp_path_factory):
    """Folder with an export <format>_<conditional> for every format whose packages are there."""
    folder = tmp_path_factory.mktemp('exported')
    jobs = {}
    for conditional in (False, True):
        run = f'--logdir={runs}/{conditional}'
        if importable('diffusers'):
            jobs[f'diffusers_{conditional}'] = [run]
        if importable('safetensors'):
            jobs[f'safetensors_{conditional}'] = [run, '--format=safetensors']
        if importable('onnx', 'onnxruntime'):
            jobs[f'onnx_{conditional}'] = [run, '--format=onnx', '--stride=4']
    if importable('onnx', 'onnxruntime'):
        for precision in ('float16', 'int8'):
            jobs[precision] = [run, '--format=onnx', '--stride=8', f'--precision={precision}']
    for name, words in jobs.items():
        words.append(f'--output={folder}/{name}')
    for name, (code, output, error) in export_all(jobs).items():
        assert code == 0, error
        (folder / f'{name}.txt').write_text(output)
    return folder


@pytest.mark.parametrize('steps', [1, 2, 4, 8])
def test_pipeline_makes_our_images(runs, exported, steps):
    lib = diffusers()
    pipe = lib.DDIMPipeline.from_pretrained(str(exported / 'diffusers_False'))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = lib.DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=N // steps)
    images = pipe(batch_size=3, num_inference_steps=steps, use_clipped_model_output=True,
                  generator=torch.Generator().manual_seed(0), output_type='np').images
    x_T = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    wanted = ours(runs / 'False', x_T, steps=steps)
    found = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    assert wanted.std() > 0.3 and (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize('steps', [1, 2, 4, 8])
def test_labels_make_our_images(runs, exported, steps):
    lib = diffusers()
    unet = lib.UNet2DModel.from_pretrained(str(exported / 'diffusers_True/unet'))
    scheduler = lib.DDIMScheduler.from_pretrained(str(exported / 'diffusers_True/scheduler'),
                                                  steps_offset=N // steps)
    scheduler.set_timesteps(steps)
    x_T, y = torch.randn(3, 3, SIZE, SIZE), torch.arange(3)
    z = x_T
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(unet(z, t, y).sample, t, z,
                               use_clipped_model_output=True).prev_sample
    wanted, other = ours(runs / 'True', x_T, y, steps), ours(runs / 'True', x_T, (y + 1) % 3, steps)
    assert (z.clamp(-1, 1) - wanted).abs().max() < 1e-4 < (other - wanted).abs().max()


@pytest.mark.parametrize('conditional', [False, True])
def test_card_of_diffusers_runs(runs, exported, monkeypatch, conditional):
    diffusers()
    images = run_card(exported / f'diffusers_{conditional}', monkeypatch)['images']
    x_T = torch.randn(3 if conditional else 8, 3, SIZE, SIZE,
                      generator=torch.Generator().manual_seed(0))
    wanted = ours(runs / str(conditional), x_T, torch.arange(3) if conditional else None)
    if conditional:
        assert (images - wanted).abs().max() < 1e-4
    else:
        pixel = torch.tensor(images[5].getpixel((2, 3))) / 127.5 - 1
        assert (pixel - wanted[5, :, 3, 2]).abs().max() < 1.5 / 127.5     # 8-bit


def google_kind(folder, **changes):
    """A folder as google/ddpm-cifar10-32, small: other padding, epsilon of norms, and sinusoids."""
    lib = diffusers()
    torch.manual_seed(2)
    unet = lib.UNet2DModel(**dict(dict(
        sample_size=SIZE, freq_shift=1, flip_sin_to_cos=False, norm_eps=1e-6, downsample_padding=0,
        attention_head_dim=None, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'UpBlock2D')), **changes))
    unet.save_pretrained(str(folder / 'unet'))
    lib.DDPMScheduler(num_train_timesteps=1000).save_pretrained(str(folder / 'scheduler'))
    return unet.eval()


@pytest.fixture(scope='module')
def imported(exported, tmp_path_factory):
    """{name: checkpoint} of --from_diffusers, and the error for a folder without a network."""
    diffusers()
    folder = tmp_path_factory.mktemp('imported')
    google_kind(folder / 'ddpm')
    sources = dict(ours=exported / 'diffusers_False', ddpm=folder / 'ddpm', none=folder / 'none')
    results = export_all({name: [f'--from_diffusers={source}', f'--output={folder}/{name}_back']
                          for name, source in sources.items()})
    assert not (folder / 'none_back').exists()
    return dict(ours=checkpoint.read(folder / 'ours_back'), none=results['none'],
                ddpm=checkpoint.read(folder / 'ddpm_back'))


def test_there_and_back_is_equal_bit_by_bit(runs, imported):
    first, back = checkpoint.read(runs / 'False'), imported['ours']
    for key in ('T', 'time_scale', 'mean_type', 'method', 'step', 'flags', 'img_size'):
        assert first[key] == back[key], key
    assert set(first['net_model']) == set(back['net_model'])
    for key, value in first['net_model'].items():
        assert torch.equal(value, back['net_model'][key]), key


def test_network_of_ddpm_is_imported(imported, tmp_path):
    unet, state = google_kind(tmp_path), imported['ddpm']
    network, name = models.build_unet(state)
    T_, time_scale, schedule, mean_type = models.grid(state, dict(T=1000))
    assert (name, T_, time_scale, mean_type) == ('net_model', 1000, 1, 'epsilon')
    x, t = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 500, 999])
    with torch.no_grad():       # index 0 of our grid is the clean end
        assert (network.eval()(x, t + 1) - unet(x, t).sample).abs().max() < 1e-4
    scheduler = diffusers().DDPMScheduler(num_train_timesteps=1000)
    alpha_bar = Diffusion(1000, schedule=schedule).alpha ** 2
    torch.testing.assert_close(alpha_bar[1:], scheduler.alphas_cumprod.double(), rtol=1e-6, atol=0)
    assert alpha_bar[0] == 1 and schedule['name'] == 'linear'


def test_other_networks_are_told_apart(imported, tmp_path):
    unet = google_kind(tmp_path, attention_head_dim=8)
    with pytest.raises(UserError, match='attention_head_dim .* is 8, expected None'):
        diffusers_unet.check_family(unet.config, tmp_path)
    code, _, error = imported['none']
    assert code == 2 and 'config.json' in error and len(error.strip().splitlines()) == 1, error


# safetensors and ONNX

@pytest.mark.parametrize('conditional', [False, True])
def test_safetensors_rebuild_the_network(runs, exported, monkeypatch, conditional):
    pytest.importorskip('safetensors', reason=EXTRA)
    variables = run_card(exported / f'safetensors_{conditional}', monkeypatch)
    for key, value in checkpoint.read(runs / str(conditional))['net_model'].items():
        assert torch.equal(variables['network'].state_dict()[key], value), key
    assert variables['config']['diffusion'] == dict(T=T, time_scale=N // T, mean_type='xstart',
                                                    schedule='cosine')
    assert variables['images'].shape == (8, 3, SIZE, SIZE)


@pytest.mark.parametrize('conditional', [False, True])
def test_onnx_makes_our_images(runs, exported, monkeypatch, conditional):
    pytest.importorskip('onnx', reason=EXTRA)
    pytest.importorskip('onnxruntime', reason=EXTRA)
    said = (exported / f'onnx_{conditional}.txt').read_text()
    assert 'ONNX Runtime' in said and 'ms, PyTorch' in said
    # 8 images; traced with 4
    variables = run_card(exported / f'onnx_{conditional}', monkeypatch)
    y = torch.arange(8) % 3 if conditional else None
    wanted = ours(runs / str(conditional), torch.from_numpy(variables['x_T']), y, steps=2)
    assert (torch.from_numpy(variables['images']) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize('precision, largest', [('float16', 0.02), ('int8', 0.5)])
def test_smaller_graphs_are_near(exported, precision, largest):
    onnx = pytest.importorskip('onnx', reason=EXTRA)
    pytest.importorskip('onnxruntime', reason=EXTRA)
    said = (exported / f'{precision}.txt').read_text()
    difference = float(said.split('float32 by ')[1].split()[0])
    assert 1e-5 < difference < largest
    kinds = {tensor.data_type for tensor in onnx.load(
        str(exported / precision / 'model.onnx')).graph.initializer}
    assert getattr(onnx.TensorProto, dict(float16='FLOAT16', int8='UINT8')[precision]) in kinds
