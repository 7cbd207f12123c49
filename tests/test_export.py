"""Exported models, loaded by the libraries they are for, generate the same images as ours."""

import importlib.util
import json
import os

import pytest
import torch

import export
from diffusion import Diffusion, clean_linear
from formats import card, diffusers_write, onnx_graph
from formats.diffusers_read import DiffusersUNet
from formats.load import TABLE, load_model
from helpers import ROOT
from inprocess import parsing
from model import UNet
from runtime import checkpoint
from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision

N, T, SIZE = 1024, 8, 8
KINDS = ['plain', 'labels', 'clean', 'theirs']


def diffusers():
    torchvision()       # diffusers imports it if it is installed
    return pytest.importorskip('diffusers', reason='optional, see requirements-export.txt')


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
    """A student with 8 steps per kind, with results beside it: without and with labels, on the
    schedule of a model of diffusers, and with a network of diffusers."""
    folder = tmp_path_factory.mktemp('runs')
    state = dict(
        T=T, time_scale=N // T, method='rdd', step=7, mean_type='xstart', img_size=SIZE,
        dataset='digits', batch_size=5, flags='--base_ckpt=./logs/8\n--lr=0.5')
    clean = dict(state, time_scale=125, mean_type='epsilon', schedule=clean_linear(),
                 origin='me/mine')
    shifted = small_unet(False, T=1000).state_dict()
    shifted[TABLE] = torch.cat([shifted[TABLE][:1], shifted[TABLE][:-1]])
    states = dict(plain=dict(state, net_model=small_unet(False).state_dict()),
                  labels=dict(state, net_model=small_unet(True).state_dict()),
                  clean=dict(clean, use='ema_model', ema_model=shifted,
                             net_model=small_unet(False, T=1000).state_dict()))
    if importlib.util.find_spec('diffusers'):
        unet = diffusers().UNet2DModel(
            layers_per_block=1, block_out_channels=(32, 64), num_class_embeds=3,
            down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
            up_block_types=('AttnUpBlock2D', 'UpBlock2D'))
        network = DiffusersUNet(unet, clean_end=True)
        states['theirs'] = dict(clean, net_model=network.state_dict(), **network.entries)
    result = dict(nfe=8, fid=1.25, inception_score=2., inception_std=0.5, num_images=9, seed=3,
                  reference='r.npz', reference_images=11, feature_network='inception',
                  pixels='8-bit', weights='net_model', step=7)
    lines = [json.dumps(result), json.dumps(dict(result, step=6, fid=77.)), '{"nfe": 8, "fi']
    for name, state in states.items():
        (folder / name).mkdir()
        checkpoint.save(folder / name / 'ckpt.pt', state)
        (folder / name / 'results.jsonl').write_text('\n'.join(lines))
    return folder


@pytest.fixture(scope='module')
def exporting():
    """exporting('--logdir=..', ..): export.py with these flags."""
    with parsing(export.define_flags) as parse:
        yield lambda *words: (parse(*words), export.main())


@pytest.fixture(scope='module')
def exported(runs, exporting, tmp_path_factory):
    """exported(format, kind): the folder of an export, made once; graphs have 2 steps."""
    folder = tmp_path_factory.mktemp('exported')

    def exported(form, kind):
        for package in export.PACKAGES[form]:
            pytest.importorskip(package, reason='optional, see requirements-export.txt')
        place = folder / f'{form}_{kind}'
        if not place.exists():
            exporting(f'--logdir={runs}/{kind}', f'--format={form}', f'--output={place}',
                      f'--stride={4 if form == "onnx" else 1}')
        return place
    return exported


def ours(run, x_T, y=None, stride=1):
    model = load_model(run)
    with torch.no_grad():
        return model.diffusion.sample(model.network, x_T, stride, y=y)


def run_card(folder, monkeypatch):
    """Execute the Python lines of a model card inside its folder; returns their variables."""
    text = (folder / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT))
    variables = {}
    exec(text, variables)
    return variables


@pytest.mark.parametrize('steps', [1, 2, 8])
@pytest.mark.parametrize('kind', KINDS)
def test_diffusers_makes_our_images(runs, exported, kind, steps):
    lib, folder = diffusers(), exported('diffusers', kind)
    offset = dict(steps_offset=N // steps) if kind in ('plain', 'labels') and steps < T else {}
    x_T = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    y = torch.arange(3) if kind in ('labels', 'theirs') else None
    wanted = ours(runs / kind, x_T, y, T // steps)
    if y is None:
        pipe = lib.DDIMPipeline.from_pretrained(str(folder))
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = lib.DDIMScheduler.from_config(pipe.scheduler.config, **offset)
        images = pipe(batch_size=3, num_inference_steps=steps, use_clipped_model_output=True,
                      generator=torch.Generator().manual_seed(0), output_type='np').images
        found = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    else:
        unet = lib.UNet2DModel.from_pretrained(str(folder / 'unet'))
        scheduler = lib.DDIMScheduler.from_pretrained(str(folder / 'scheduler'), **offset)
        scheduler.set_timesteps(steps)
        found = x_T
        for t in scheduler.timesteps:
            with torch.no_grad():
                found = scheduler.step(unet(found, t, y).sample, t, found,
                                       use_clipped_model_output=True).prev_sample
    assert wanted.std() > 0.3 and (found.clamp(-1, 1) - wanted).abs().max() < 1e-3


@pytest.mark.parametrize('kind, form', [
    *((kind, form) for kind in KINDS for form in ('diffusers', 'safetensors')),
    ('labels', 'onnx'), ('theirs', 'onnx')])
def test_cards_make_our_images(runs, exported, monkeypatch, kind, form):
    """As their Python lines; 8 images from a graph that was traced with 4."""
    labels = kind in ('labels', 'theirs')
    if kind == 'theirs':
        diffusers()
    found, y = run_card(exported(form, kind), monkeypatch), torch.arange(8) % 3 if labels else None
    x_T = torch.randn(3 if labels else 8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    if form == 'onnx':
        wanted = ours(runs / kind, torch.from_numpy(found['x_T']), y, stride=4)
        assert (torch.from_numpy(found['images']) - wanted).abs().max() < 1e-3
    elif form == 'safetensors':
        model, x, t = load_model(runs / kind), torch.randn(8, 3, SIZE, SIZE), torch.full((8,), 500)
        assert found['config']['diffusion'] == model.diffusion.arguments()
        assert found['config']['training']['weights'] == model.weights_name
        with torch.no_grad():
            assert torch.equal(found['network'](x, t, y), model.network(x, t, y))
        assert found['images'].shape == (8, 3, SIZE, SIZE)
    elif labels:
        assert (found['images'] - ours(runs / kind, x_T, torch.arange(3))).abs().max() < 1e-3
    else:       # 8-bit
        pixel = torch.tensor(found['images'][5].getpixel((2, 3))) / 127.5 - 1
        assert (pixel - ours(runs / kind, x_T)[5, :, 3, 2]).abs().max() < 1.5 / 127.5


@pytest.mark.parametrize('kind', KINDS)
def test_there_and_back(runs, exported, kind):
    """An export is read as a folder of diffusers, with its schedule and how it was trained."""
    diffusers()
    first, back = load_model(runs / kind), load_model(exported('diffusers', kind))
    x, t = torch.randn(3, 3, SIZE, SIZE), torch.tensor([1, 500, first.diffusion.N])
    with torch.no_grad():
        wanted, found = (model.network(x, t, torch.arange(3)) for model in (first, back))
    assert (found - wanted).abs().max() < 1e-4 and back.img_size == SIZE
    assert first.diffusion.arguments() == back.diffusion.arguments()
    for key in ('method', 'step', 'flags', 'dataset'):
        assert first.entries[key] == back.entries[key], key


def test_networks_that_diffusers_does_not_have(runs):
    diffusers()
    model = load_model(runs / 'plain')
    model.network.time_embedding.timembedding[0].weight.data *= 1.01
    with pytest.raises(UserError, match='time embedding in .*/plain/ckpt.pt differs'):
        diffusers_write.convert(model)
    model.arch['ch_mult'] = [2, 2]
    with pytest.raises(UserError, match='--ch_mult 2 at its first resolution'):
        diffusers_write.convert(model)


def test_steps_that_are_not_equally_far_apart():
    with pytest.raises(UserError, match='FILE has 3 steps .* divides 1000; export with --format'):
        diffusers_write.scheduler_config(Diffusion(3, N=1000), 1, 'FILE')


def test_card(runs, tmp_path, capsys):
    card.write(tmp_path, load_model(runs / 'labels'), 2, 'diffusers', 'cc0-1.0')
    text = (tmp_path / 'README.md').read_text()
    for words in ('license: cc0-1.0', '# 4-step', 'spans 2 of them', 'Steps: 7.', 'digits',
                  '--lr=0.5', './logs/8', '| 8 | 1.250 | 2.000 +- 0.500 | 9 | r.npz (11) |',
                  'class-conditional, 3 classes', 'train_rdd.py', 'steps_offset=1024 // n'):
        assert words in text, words
    assert '77.' not in text        # the result of an older step
    assert 'line 3 of' in capsys.readouterr().out
    card.write(tmp_path, load_model(runs / 'clean'), 1, 'onnx', 'mit', 'differ by 3')
    text = (tmp_path / 'README.md').read_text()
    assert '`me/mine`' in text and 'differ by 3' in text and 'schedule is linear' in text


def test_a_graph_that_does_not_make_our_images_is_refused(runs, tmp_path):
    for package in export.PACKAGES['onnx']:
        pytest.importorskip(package, reason='optional, see requirements-export.txt')
    model = load_model(runs / 'plain')
    model.network.head.bias.data.fill_(torch.nan)
    with pytest.raises(UserError, match='differ from those of PyTorch by nan'):
        onnx_graph.write(model, 4, tmp_path)


def test_mistakes_leave_nothing(runs, exporting, tmp_path, monkeypatch):
    """Also a full disk; what exists beside --output is left alone, whatever its name."""
    for name in ('full', 'new.tmp'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'file').write_text('')
    run, new = f'--logdir={runs}/labels', f'--output={tmp_path}/new'

    def no_space(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(export, 'write_safetensors', no_space)
    cases = {'not an empty folder': [run, f'--output={tmp_path}/full'],
             'there is no checkpoint': [f'--logdir={tmp_path}/none', new],
             '--stride 3 does not divide the 8': [run, new, '--stride=3'],
             '--output is missing': [run]}
    if importlib.util.find_spec('safetensors'):
        cases['new cannot be written .*No space'] = [run, new, '--format=safetensors']
    if importlib.util.find_spec('diffusers') is None:
        cases['pip install -r requirements-export.txt'] = [run, new]
    for sentence, words in cases.items():
        with pytest.raises(UserError, match=sentence):
            exporting(*words)
    assert sorted(os.listdir(tmp_path)) == ['full', 'new.tmp']
    assert (tmp_path / 'new.tmp/file').exists()
