"""Exported models, loaded by the libraries they are for, generate the same images as ours."""

import importlib.util
import json
import os
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import export
from diffusion import Diffusion, clean_linear
from formats import card, diffusers_write, edm, onnx_graph
from formats.diffusers_read import DiffusersUNet
from formats.load import TABLE, load_model
from formats.songunet import SongUNet
from helpers import (RESULT, ROOT, SMALL, diffusers, noise, our_images, parsing,
                     their_images)
from runtime import checkpoint
from runtime.cli import UserError
from wiring import random_unet

N, T, SIZE = 1024, 8, 8
KINDS = ['plain', 'labels', 'clean', 'theirs']      # that diffusers has networks for


def small_unet(conditional=False, T=N):
    return random_unet(1, T, ch_mult=[1, 2], conditional=conditional, class_num=3).state_dict()


def edm_state():
    """Checkpoint of a SongUNet with labels."""
    song = dict(img_resolution=SIZE, label_dim=3, model_channels=16, channel_mult=[1, 2],
                num_blocks=1, attn_resolutions=[4])
    network = {f'model.{key}': value for key, value in SongUNet(**song).state_dict().items()}
    return dict(edm=dict(preconditioning='EDMPrecond', song=song), net_model=network,
                schedule=edm.entries('EDMPrecond', N)['schedule'], license='cc-by-nc-sa-4.0')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A student with 8 steps per kind: without and with labels, on the schedule of a model of
    diffusers, with a network of diffusers, and with one of EDM."""
    folder = tmp_path_factory.mktemp('runs')
    state = dict(
        T=T, time_scale=N // T, method='rdd', step=7, mean_type='xstart', img_size=SIZE,
        dataset='digits', batch_size=5, flags='--base_ckpt=./logs/8\n--lr=0.5')
    clean = dict(state, time_scale=125, mean_type='epsilon', schedule=clean_linear(),
                 origin='me/mine')
    shifted = small_unet(T=1000)
    shifted[TABLE] = torch.cat([shifted[TABLE][:1], shifted[TABLE][:-1]])
    states = dict(plain=dict(state, net_model=small_unet()),
                  labels=dict(state, net_model=small_unet(conditional=True)),
                  clean=dict(clean, use='ema_model', ema_model=shifted,
                             net_model=small_unet(T=1000)), edm=dict(state, **edm_state()))
    if importlib.util.find_spec('diffusers'):
        unet = diffusers().UNet2DModel(**dict(SMALL, sample_size=None), num_class_embeds=3)
        network = DiffusersUNet(unet, clean_end=True)
        states['theirs'] = dict(clean, mean_type='v', net_model=network.state_dict(),
                                **network.entries)
    for name, state in states.items():
        (folder / name).mkdir()
        checkpoint.save(folder / name / 'ckpt.pt', state)
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
        if kind == 'theirs':
            diffusers()
        for package in export.PACKAGES[form]:
            pytest.importorskip(package, reason='optional, see requirements-export.txt')
        place = folder / f'{form}_{kind}'
        if not place.exists():
            exporting(f'--logdir={runs}/{kind}', f'--format={form}', f'--output={place}',
                      f'--stride={4 if form == "onnx" else 1}')
        return place
    return exported


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
    lib, folder, model = diffusers(), exported('diffusers', kind), load_model(runs / kind)
    y = torch.arange(3) if model.network.conditional else None
    offset = {} if model.diffusion.clean_end or steps == T else dict(steps_offset=N // steps)
    unet = lib.UNet2DModel.from_pretrained(str(folder / 'unet'))
    scheduler = lib.DDIMScheduler.from_pretrained(str(folder / 'scheduler'), **offset)
    scheduler.set_timesteps(steps)
    wanted = our_images(model, noise(), y, T // steps)
    assert wanted.std() > 0.25
    assert (their_images(unet, scheduler, noise(), y) - wanted).abs().max() < 1e-3


@pytest.mark.parametrize('kind', KINDS)
def test_cards_of_diffusers(runs, exported, monkeypatch, kind):
    """Their lines make our images: by a pipeline in 8 bits, or by a loop if there are labels."""
    folder, model = exported('diffusers', kind), load_model(runs / kind)
    images = run_card(folder, monkeypatch)['images']
    if model.network.conditional:
        assert (images - our_images(model, noise(3), torch.arange(3))).abs().max() < 1e-3
    else:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        assert (pixels - our_images(model, noise(8))).abs().max() < 1.5 / 127.5


@pytest.mark.parametrize('kind', ['labels', 'theirs', 'edm'])
def test_cards_of_graphs(runs, exported, monkeypatch, kind):
    """8 images from a graph that was traced with 4."""
    found, model = run_card(exported('onnx', kind), monkeypatch), load_model(runs / kind)
    wanted = our_images(model, torch.from_numpy(found['x_T']), torch.arange(8) % 3, stride=4)
    assert (torch.from_numpy(found['images']) - wanted).abs().max() < 1e-3


@pytest.mark.parametrize('kind', [*KINDS, 'edm'])
def test_cards_of_safetensors(runs, exported, monkeypatch, kind):
    folder, model = exported('safetensors', kind), load_model(runs / kind)
    licence = dict(plain='mit', labels='mit', edm='cc-by-nc-sa-4.0').get(kind, 'unknown')
    assert f'license: {licence}\n' in (folder / 'README.md').read_text()
    found = run_card(folder, monkeypatch)
    assert found['config']['diffusion'] == model.diffusion.arguments()
    assert found['config']['training']['weights'] == model.weights_name
    y = torch.arange(8) % 3 if model.network.conditional else None
    with torch.no_grad():
        x, t = noise(8), torch.full((8,), 500)
        assert torch.equal(found['network'](x, t, y), model.network(x, t, y))
    assert found['images'].shape == (8, 3, SIZE, SIZE)


@pytest.mark.parametrize('kind', KINDS)
def test_there_and_back(runs, exported, kind):
    """An export is read as a folder of diffusers, with its schedule and how it was trained."""
    folder, first = exported('diffusers', kind), load_model(runs / kind)
    back, t = load_model(folder), torch.tensor([1, 500, first.diffusion.N])
    with torch.no_grad():
        wanted, found = (model.network(noise(), t, torch.arange(3)) for model in (first, back))
    assert (found - wanted).abs().max() < 1e-4 and back.img_size == SIZE
    assert first.diffusion.arguments() == back.diffusion.arguments()
    for key in ('method', 'step', 'flags', 'dataset'):
        assert first.entries[key] == back.entries[key], key


def test_networks_that_diffusers_does_not_have(runs):
    diffusers()
    with pytest.raises(UserError, match='is one of EDM'):
        diffusers_write.convert(load_model(runs / 'edm'))
    model = load_model(runs / 'plain')
    model.network.time_embedding.timembedding[0].weight.data *= 1.01
    with pytest.raises(UserError, match='time embedding in .*/plain/ckpt.pt differs'):
        diffusers_write.convert(model)
    model.arch['ch_mult'] = [2, 2]
    with pytest.raises(UserError, match='--ch_mult 2 at its first resolution'):
        diffusers_write.convert(model)
    with pytest.raises(UserError, match='FILE has 3 steps .* divides 1000; export with --format'):
        diffusers_write.scheduler_config(Diffusion(3, N=1000), 1, 'FILE')


def test_card(runs, tmp_path, capsys):
    result = dict(RESULT, step=7, weights='net_model', reference_images=11)
    others = [dict(result, step=6, fid=77.), dict(result, weights='ema_model', fid=77.),
              dict(result, ckpt='labels/other.pt', fid=77.)]
    lines = [*map(json.dumps, [result, *others]), '{"nfe": 8, "fi']
    (runs / 'labels/results.jsonl').write_text('\n'.join(lines))
    card.write(tmp_path, load_model(runs / 'labels'), 2, 'diffusers', 'cc0-1.0')
    text = (tmp_path / 'README.md').read_text()
    for words in ('license: cc0-1.0', '# 4-step', 'spans 2 of them', 'Steps: 7.', 'digits',
                  '--lr=0.5', './logs/8', '| 4 | 1.000 | 2.000 +- 0.100 | 9 | r (11) |',
                  'class-conditional, 3 classes', 'distillation, class-conditional-image',
                  '| 8-bit | none | 0 |', 'train_rdd.py', 'steps_offset=1024 // n'):
        assert words in text, words
    assert '77.' not in text        # results of an older step, of the average and of another file
    assert 'line 5 of' in capsys.readouterr().out
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
    monkeypatch.setitem(sys.modules, 'diffusers', None)     # as if it were not installed
    for sentence, words in {
            'full cannot take the result': [run, f'--output={tmp_path}/full'],
            'there is no checkpoint': [f'--logdir={tmp_path}/none', new],
            '--stride 3 does not divide the 8': [run, new, '--stride=3'],
            '--output is missing': [run],
            'diffusers is missing; run pip install -r requirements-export.txt': [run, new]}.items():
        with pytest.raises(UserError, match=sentence):
            exporting(*words)
    (tmp_path / 'empty').mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match='empty cannot'):
        patch.setattr(os.path, 'ismount', Mock(return_value=True))
        exporting(run, f'--output={tmp_path}/empty')
    monkeypatch.setattr(export, 'check_packages', Mock())
    monkeypatch.setattr(export, 'write', Mock(side_effect=OSError(28, 'No space left on device')))
    with pytest.raises(UserError, match='new cannot be written .*No space'):
        exporting(run, new)
    assert sorted(os.listdir(tmp_path)) == ['empty', 'full', 'new.tmp']
    assert (tmp_path / 'new.tmp/file').exists()
