"""Exported models, loaded by the libraries they are for, generate the same images as ours."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from diffusion import Diffusion, clean_linear
from formats import card, diffusers_scheduler, diffusers_unet, load
from formats.load import load_model
from formats.publish import publish
from model import UNet
from runtime import checkpoint
from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision
from helpers import ROOT, assert_ran, command, fork_all

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
    """A student with 8 steps per kind, with one result beside it: without and with labels, on the
    schedule of a model of diffusers, and with a network of diffusers."""
    folder = tmp_path_factory.mktemp('runs')
    state = dict(
        T=T, time_scale=N // T, method='rdd', step=7, mean_type='xstart', img_size=SIZE,
        dataset='digits', batch_size=5, flags='--base_ckpt=./logs/8\n--lr=0.5')
    clean = dict(state, time_scale=125, mean_type='epsilon', schedule=clean_linear(),
                 origin='me/mine')
    table = diffusers_unet.TABLE
    shifted = small_unet(False, T=1000).state_dict()
    shifted[table] = torch.cat([shifted[table][:1], shifted[table][:-1]])
    states = dict(plain=dict(state, net_model=small_unet(False).state_dict()),
                  labels=dict(state, net_model=small_unet(True).state_dict()),
                  clean=dict(clean, net_model=shifted))
    if importlib.util.find_spec('diffusers'):
        unet = diffusers().UNet2DModel(
            layers_per_block=1, block_out_channels=(32, 64), num_class_embeds=3,
            down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
            up_block_types=('AttnUpBlock2D', 'UpBlock2D'))
        network = load.diffusers_network.DiffusersUNet(unet, clean_end=True)
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


# Without the optional packages

def test_names_and_layouts():
    network = small_unet(True, ch_mult=[1, 2, 2], attn=[0, 1], num_res_blocks=2)
    state_dict = network.state_dict()
    arch = load.architecture(state_dict)
    config = diffusers_unet.unet_config(arch, SIZE)
    theirs = diffusers_unet.to_diffusers(state_dict, arch)
    assert config['down_block_types'] == ['AttnDownBlock2D', 'AttnDownBlock2D', 'DownBlock2D']
    assert config['up_block_types'] == ['UpBlock2D', 'AttnUpBlock2D', 'AttnUpBlock2D']
    assert len(theirs) == len(state_dict) - 2      # no table of times, one table of labels
    assert torch.equal(theirs['down_blocks.1.attentions.1.to_q.weight'],
                       state_dict['downblocks.4.attn.proj_q.weight'][:, :, 0, 0])
    assert torch.equal(theirs['class_embedding.weight'], state_dict['y_embedding.weight'].t()
                       + state_dict['y_embedding.bias'])
    with pytest.raises(UserError, match='--ch_mult 2 at its first resolution'):
        diffusers_unet.unet_config(dict(arch, ch_mult=[2, 2]), SIZE)
    table = state_dict[diffusers_unet.TABLE]
    diffusers_unet.check_times(table, False, 'FILE')
    diffusers_unet.check_times(torch.cat([table[:1], table]), True, 'FILE')
    for other, clean_end in ((table, True), (table * 1.01, False)):
        with pytest.raises(UserError, match='time embedding in FILE differs'):
            diffusers_unet.check_times(other, clean_end, 'FILE')


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
    with pytest.raises(UserError, match='FILE has 3 steps .* divides 1000; export with --format'):
        diffusers_scheduler.scheduler_config(Diffusion(3, N=1000), 1, 'FILE')


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


def test_publishing_is_whole_or_nothing(tmp_path):
    """What exists beside the output is left alone, also under a name like that of a temporary."""
    (tmp_path / 'out.tmp').mkdir()
    (tmp_path / 'out.tmp/mine').write_text('')
    with pytest.raises(UserError, match='out cannot be written .*No space left'):
        with publish(tmp_path / 'out') as folder:
            (folder / 'file').write_text('')
            raise OSError(28, 'No space left on device')
    with pytest.raises(ZeroDivisionError), publish(tmp_path / 'out') as folder:
        (folder / 'file').write_text(f'{1 / 0}')
    assert os.listdir(str(tmp_path)) == ['out.tmp'] and (tmp_path / 'out.tmp/mine').exists()
    with publish(tmp_path / 'new/out') as folder:
        (folder / 'file').touch(mode=0o600)
        assert not (tmp_path / 'new/out').exists()
    (tmp_path / 'new/plain').write_text('')
    assert sorted(os.listdir(str(tmp_path / 'new'))) == ['out', 'plain']
    modes = {path.stat().st_mode for path in (tmp_path / 'new/plain', tmp_path / 'new/out/file')}
    assert len(modes) == 1


def test_mistakes_leave_nothing(runs, tmp_path):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/file').write_text('')
    run, new = f'--logdir={runs}/labels', f'--output={tmp_path}/new'
    cases = {'not an empty folder': [run, f'--output={tmp_path}/full'],
             'there is no checkpoint': [f'--logdir={tmp_path}/none', new],
             'neither model_index.json nor': [f'--from_diffusers={tmp_path}/none', new],
             '--stride 3 does not divide the 8': [run, new, '--stride=3'],
             '--format onnx': [run, new, '--precision=int8'], '--output is missing': [run]}
    if importlib.util.find_spec('diffusers') is None:
        cases['pip install -r requirements-export.txt'] = [run, new]
    results = fork_all({name: [command(['export.py'], *words)] for name, words in cases.items()})
    for sentence, ((code, _, error),) in results.items():
        assert code == (1 if sentence.startswith('pip') else 2), error
        assert sentence in error and len(error.strip().splitlines()) == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ['full']


# With them

@pytest.fixture(scope='module')
def exported(runs, tmp_path_factory):
    """Folder with an export <format>_<kind> for every format whose packages are there."""
    folder, jobs = tmp_path_factory.mktemp('exported'), {}
    packages = dict(diffusers=['diffusers'], safetensors=['safetensors'],
                    onnx=['onnx', 'onnxruntime'])
    forms = [form for form in packages if all(map(importlib.util.find_spec, packages[form]))]
    for run in sorted(runs.iterdir()):
        for form in forms:
            jobs[f'{form}_{run.name}'] = [f'--logdir={run}', f'--format={form}']
    if 'onnx' in forms:
        for precision in ('float16', 'int8'):
            jobs[precision] = [f'--logdir={runs}/labels', '--format=onnx', '--stride=8',
                               f'--precision={precision}']
    commands = {name: [command(['export.py'], *words, f'--output={folder}/{name}')]
                for name, words in jobs.items()}
    for name, results in fork_all(commands).items():
        assert_ran(results)
        (folder / f'{name}.txt').write_text(results[0][1])
    return folder


KINDS = ['plain', 'labels', 'clean', 'theirs']


@pytest.mark.parametrize('steps', [1, 2, 8])
@pytest.mark.parametrize('kind', KINDS)
def test_diffusers_makes_our_images(runs, exported, kind, steps):
    lib, folder = diffusers(), exported / f'diffusers_{kind}'
    offset = dict(steps_offset=N // steps) if kind in ('plain', 'labels') else {}
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


@pytest.mark.parametrize('kind', KINDS)
def test_cards_make_our_images(runs, exported, monkeypatch, kind):
    """As their Python lines; 8 images from a graph that was traced with 4."""
    diffusers()
    images = run_card(exported / f'diffusers_{kind}', monkeypatch)['images']
    labels = kind in ('labels', 'theirs')
    x_T = torch.randn(3 if labels else 8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    wanted = ours(runs / kind, x_T, torch.arange(3) if labels else None)
    if labels:
        assert (images - wanted).abs().max() < 1e-3
    else:       # 8-bit
        pixel = torch.tensor(images[5].getpixel((2, 3))) / 127.5 - 1
        assert (pixel - wanted[5, :, 3, 2]).abs().max() < 1.5 / 127.5
    y = torch.arange(8) % 3 if labels else None
    if (exported / f'onnx_{kind}').exists():
        found = run_card(exported / f'onnx_{kind}', monkeypatch)
        wanted = ours(runs / kind, torch.from_numpy(found['x_T']), y)
        assert (torch.from_numpy(found['images']) - wanted).abs().max() < 1e-3
    found, model = run_card(exported / f'safetensors_{kind}', monkeypatch), load_model(runs / kind)
    assert found['config']['diffusion'] == model.diffusion.arguments()
    x, t = torch.randn(8, 3, SIZE, SIZE), torch.full((8,), 500)
    with torch.no_grad():
        assert torch.equal(found['network'](x, t, y), model.network(x, t, y))
    assert found['images'].shape == (8, 3, SIZE, SIZE)


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


def test_there_and_back(runs, exported, tmp_path):
    """An export read by its folder and by --from_diffusers, which keeps what trained it."""
    diffusers()
    results = fork_all({kind: [command(['export.py'], f'--output={tmp_path}/{kind}',
                                       f'--from_diffusers={exported}/diffusers_{kind}')]
                        for kind in KINDS})
    for kind in KINDS:
        assert_ran(results[kind])
        first, read, back = (load_model(path) for path in (
            runs / kind, exported / f'diffusers_{kind}', tmp_path / kind))
        x, t = torch.randn(3, 3, SIZE, SIZE), torch.tensor([1, 500, first.diffusion.N])
        with torch.no_grad():
            wanted, found = (model.network(x, t, torch.arange(3)) for model in (first, read))
            assert torch.equal(found, back.network(x, t, torch.arange(3)))
        assert (found - wanted).abs().max() < 1e-4 and back.img_size == SIZE
        assert first.diffusion.arguments() == read.diffusion.arguments()
        assert first.diffusion.arguments() == back.diffusion.arguments()
        for key in ('method', 'step', 'flags', 'dataset'):
            assert first.entries[key] == back.entries[key], key
        assert set(checkpoint.read(Path(tmp_path / kind))) >= {'unet_config', 'origin', 'use'}
