"""Teachers of others: converted networks against plain computations, students, hostile pickles."""

import io
import json
import math
import os
import pickle
import resource
import sys
import time
import types

import numpy as np
import pytest
import torch
from torch import nn

import convert
import export
from diffusion import Diffusion
from formats import guided_diffusion
from formats.load import load_model
from formats.songunet import SongUNet
from runtime.cli import UserError
from runtime.precision import prepare
import by_hand
from helpers import ROOT, assert_ran, command, fork_all, start
from inprocess import parsing

SIZE = 16
SONG = dict(img_resolution=SIZE, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
            attn_resolutions=[8], embedding_type='positional', encoder_type='standard',
            channel_mult_noise=1, resample_filter=[1, 1], augment_dim=9)
NCSNPP = dict(SONG, embedding_type='fourier', encoder_type='residual', channel_mult_noise=2,
              resample_filter=[1, 3, 3, 1])
SOURCE = 'import os\nos.system("touch executed")\n'
TRAINING = ['--dataset=digits', '--batch_size=4', '--num_workers=0', '--sample_size=2',
            '--sample_step=0', '--total_steps=1', '--lr=1e-4']


# Files as they are published

class Whole(nn.Module):
    """A module that is pickled as EDM's are: a function and one dictionary, with source text."""

    def __init__(self, tensors, name='Conv2d', version=6, **kwargs):
        """tensors: {name: tensor}, those of the modules in it with their names before a dot."""
        super().__init__()
        self.meta = dict(type='class', version=version, module_src=SOURCE, class_name=name)
        self._init_args, self._init_kwargs, self.scale = (), kwargs, np.float64(.5)
        add_tensors(self, tensors)

    def __reduce__(self):
        function = sys.modules['torch_utils.persistence']._reconstruct_persistent_obj
        state = {key: value for key, value in self.__dict__.items() if key != 'meta'}
        return function, (dict(self.meta, state=state),)


class EasyDict(dict):
    """As in snapshots of EDM2, saved by an earlier version of Python."""

    __module__ = 'dnnlib.util'

    def __reduce__(self):
        return EasyDict, (), {}, None, iter(self.items())


def add_tensors(module, tensors):
    """Parameters, buffers and modules of a `Whole`, in the order of their names."""
    for key, value in tensors.items():
        first, _, rest = key.partition('.')
        if not rest and first in ('freqs', 'u', 'resample_filter'):
            module.register_buffer(first, value)
        elif not rest:
            module.register_parameter(first, nn.Parameter(value.clone()))
        elif first not in module._modules:
            inner = {name[len(first) + 1:]: tensor for name, tensor in tensors.items()
                     if name.startswith(f'{first}.')}
            module._modules[first] = nn.ModuleDict() if first in ('enc', 'dec') else Whole(inner)
            if first in ('enc', 'dec'):
                add_tensors(module._modules[first], inner)


@pytest.fixture(autouse=True)
def published_code(monkeypatch):
    stub(monkeypatch)


def stub(monkeypatch):
    """A module in place of the one that pickles of EDM refer to."""
    module = types.ModuleType('torch_utils.persistence')

    def _reconstruct_persistent_obj(meta):
        raise AssertionError('something in the pickle was run')

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = _reconstruct_persistent_obj.__name__
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, 'dnnlib', types.ModuleType('dnnlib'))
    monkeypatch.setitem(sys.modules, 'dnnlib.util', types.ModuleType('dnnlib.util'))
    sys.modules['dnnlib.util'].EasyDict = EasyDict
    monkeypatch.setitem(sys.modules, 'torch_utils', types.ModuleType('torch_utils'))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def song_weights(arguments=SONG):
    """Random weights; norms near 1, filters as they are."""
    generator, weights = torch.Generator().manual_seed(0), SongUNet(**arguments).state_dict()
    for key, value in weights.items():
        if 'resample_filter' not in key:
            value.copy_(torch.randn(value.shape, generator=generator))
            value /= value[0].numel() ** .5 if value.ndim > 1 else 4.
            value += float('norm' in key and key.endswith('weight'))
    return weights


def write(file, weights, name='EDMPrecond', version=6, u=None, **arguments):
    """Write a snapshot of EDM, by default of a SongUNet with the arguments `SONG`."""
    arguments = arguments or dict(SONG, model_type='SongUNet', img_channels=3, use_fp16=False)
    tensors = {f'model.{key}': value for key, value in weights.items()}
    outer = Whole(tensors if u is None else dict(u=u, **tensors), name, version, **arguments)
    found = EasyDict(ema=outer, loss_fn=None, augment_pipe=None, dataset_kwargs=dict(path='x.zip'))
    file.write_bytes(pickle.dumps(found, protocol=4))
    return file


@pytest.fixture
def convert_file():
    """convert_file(file, folder, '--flag=value', ..) -> the `Model` of a converted teacher."""
    with parsing(convert.define_flags) as parse:
        def run(file, folder, *words):
            parse(f'--teacher={file}', f'--output={folder}', *words)
            convert.main()
            return load_model(folder)
        yield run


# Networks

@pytest.mark.parametrize('arguments', [SONG, NCSNPP], ids=['ddpmpp', 'ncsnpp'])
@pytest.mark.parametrize('kind', ['EDMPrecond', 'VPPrecond', 'VEPrecond', 'iDDPMPrecond'])
def test_songunet(tmp_path, convert_file, kind, arguments):
    """D(x; sigma) of a converted snapshot; it depends on the labels."""
    s, c_skip, c_out, c_in, c_noise, u = by_hand.noise_levels(kind)
    w = song_weights(arguments)
    file = write(tmp_path / 'x.pkl', w, kind, u=u, model_type='SongUNet', **arguments)
    network = convert_file(file, tmp_path / 'out').network
    x, y = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 2, 1, 2])
    with torch.no_grad():
        wanted = c_skip * x + c_out * by_hand.song(w, arguments, c_in * x, c_noise, y)
        found = network.denoise(x, s, y)
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert (found - network.denoise(x, s)).abs().max() > 1e-3       # without labels


@pytest.mark.parametrize('kind', ['EDMPrecond', 'iDDPMPrecond', 'consistency_models'])
def test_adm_in_the_preconditioning_of_edm(tmp_path, convert_file, kind):
    pytest.importorskip('diffusers')
    s, c_skip, c_out, c_in, c_noise, u = by_hand.noise_levels(kind)
    outputs, words, order = 6 if u is not None else 3, [], 'edm'
    w = by_hand.adm_weights(outputs=outputs, edm=True)
    if kind == 'consistency_models':
        order, words = 'new', ['--img_size=16', '--num_head_channels=16', '--new_attention_order']
        torch.save(by_hand.adm_weights(outputs=outputs), tmp_path / 'edm_x.pt')
        file = tmp_path / 'edm_x.pt'
    else:
        file = write(tmp_path / 'x.pkl', w, kind, u=u, img_resolution=SIZE,
                     model_type='DhariwalUNet', img_channels=3, channels_per_head=16)
    model = convert_file(file, tmp_path / 'out', *words)
    x, y = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 3, 1, 2])
    groups = 32 if kind == 'consistency_models' else None
    with torch.no_grad():
        out = by_hand.adm(w, order, 16, c_in * x, c_noise, y, groups)[:, :3]
        wanted, found = c_skip * x + c_out * out, model.network.denoise(x, s, y)
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert (found - model.network.denoise(x, s)).abs().max() > 1e-3
    assert (model.arch['conditional'], model.arch['class_num'], model.diffusion.mean_type) == (
        True, 4, 'xstart')


@pytest.mark.parametrize('order, updown, scale_shift, outputs', [
    ('legacy', False, True, 6), ('new', True, True, 6), ('legacy', True, False, 3)])
def test_guided_diffusion(tmp_path, convert_file, order, updown, scale_shift, outputs):
    """Its timesteps are our times less one; a learned variance is left out."""
    pytest.importorskip('diffusers')
    shape = dict(updown=updown, scale_shift=scale_shift, outputs=outputs)
    torch.save(by_hand.adm_weights(**shape), tmp_path / 'ema_0.9999_100.pt')
    words = ['--new_attention_order'] if order == 'new' else []
    model = convert_file(tmp_path / 'ema_0.9999_100.pt', tmp_path / 'out', '--img_size=16',
                         '--num_heads=4', '--beta_schedule=cosine', *words)
    x, t, y = torch.randn(3, 3, SIZE, SIZE), torch.tensor([0, 400, 999]), torch.tensor([3, 0, 1])
    with torch.no_grad():
        wanted = by_hand.adm(by_hand.adm_weights(edm=True, **shape), order, 16, x, t, y)[:, :3]
        assert (model.network(x, t + 1, y) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (model.diffusion.mean_type, model.diffusion.T, model.img_size) == ('epsilon', 1000, 16)


def test_bfloat16(tmp_path, convert_file):
    """The coefficients stay in float32 under autocast, with frozen weights in bfloat16 as well."""
    model = convert_file(write(tmp_path / 'x.pkl', song_weights()), tmp_path / 'out')
    x, t, y = torch.randn(2, 3, SIZE, SIZE), torch.tensor([1, 900]), torch.tensor([0, 2])
    with torch.no_grad():
        wanted = model.network(x, t, y)
        prepare('bf16', False, torch.device('cpu'), model.network)
        with torch.autocast('cpu', torch.bfloat16):
            found = model.network(x, t, y)
    assert found.dtype == torch.float32
    assert (found[0] - wanted[0]).abs().max() < 1e-3        # c_out is about the noise level
    assert (found[1] - wanted[1]).abs().max() < .05 * wanted[1].abs().max()


def test_times_and_steps(tmp_path, convert_file):
    """Noise levels of Karras et al. (rho 7); DDIM is Euler's step in sigma; labels change it."""
    file = write(tmp_path / 'x.pkl', song_weights())
    model = convert_file(file, tmp_path / 'out', '--steps=64')
    d, network = model.diffusion, model.network
    sigma = d.sigma / d.alpha
    low, high = .002 ** (1 / 7), 80 ** (1 / 7)
    wanted = [(low + i / 63 * (high - low)) ** 7 for i in range(64)]
    assert sigma[0] == 0 and torch.allclose(sigma[1:], torch.tensor(wanted).double(), rtol=1e-2)
    assert (d.T, d.mean_type, model.img_size, network.class_num) == (64, 'xstart', SIZE, 3)
    t, y, z_t = torch.tensor([64, 30, 1]), torch.tensor([0, 1, 2]), torch.randn(3, 3, SIZE, SIZE)
    alpha_t, sigma_t = (part.float() for part in d.at(t))
    s = (sigma_t / alpha_t).flatten()
    with torch.no_grad():
        D = network.denoise(z_t / alpha_t, s, y)
        assert (network(z_t, t, y) - D).abs().max() < 1e-4
        z_s = d.ddim_step(network, z_t, t, t - 1, clip=False, y=y)
    alpha_s, sigma_s = (part.float() for part in d.at(t - 1))
    x = z_t / alpha_t
    euler = x + (sigma_s / alpha_s - sigma_t / alpha_t) * (x - D) / (sigma_t / alpha_t)
    assert (z_s / alpha_s - euler).abs().max() < 1e-4




def test_schedules_of_guided_diffusion():
    """Of 4000 rescaled cosine steps, every fourth; linear betas grow with 1000 / steps."""
    d = Diffusion(1000, schedule=guided_diffusion.schedule('cosine', 4000, True))
    f = [math.cos((i / 4000 + .008) / 1.008 * math.pi / 2) ** 2 for i in range(4001)]
    wanted = torch.tensor([f[4 * k + 1] / f[0] for k in range(990)]).sqrt()
    assert torch.allclose(d.alpha[1:991].float(), wanted, rtol=1e-4)
    assert d.alpha[-1] == pytest.approx(.00117, rel=.01)
    assert d.sigma[1] == pytest.approx(.00314, rel=.01)
    d = Diffusion(500, schedule=guided_diffusion.schedule('linear', 500, False))
    assert 1 - d.alpha[1] ** 2 == pytest.approx(2e-4, rel=.01)
    assert 1 - (d.alpha[500] / d.alpha[499]) ** 2 == pytest.approx(.04, rel=.01)


# Students

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """A converted folder, of ten classes, and a student of two steps."""
    folder = tmp_path_factory.mktemp('teacher')
    arguments = dict(SONG, label_dim=10, augment_dim=0)
    with pytest.MonkeyPatch.context() as patch:
        stub(patch)
        write(folder / 'edm-cifar10-x.pkl', song_weights(arguments), model_type='SongUNet',
              **arguments)
    words = [f'--base_ckpt={folder}/edm', '--teacher_steps=4', f'--logdir={folder}/pd', *TRAINING]
    results = fork_all(dict(run=[
        command(['convert.py'], f'--teacher={folder}/edm-cifar10-x.pkl', f'--output={folder}/edm'),
        command(['PD.py'], *words), command(['PD.py'], *words, '--total_steps=2'),
        command(['sample.py'], f'--logdir={folder}/pd', f'--output={folder}/x.npz',
                '--num_images=4')]))['run']
    assert_ran(results)
    return folder, results


def test_students_are_the_same_wrapper(teacher):
    folder, results = teacher
    for words in ('SongUNet', 'EDMPrecond', '16 x 16', '10 classes', 'cc-by-nc-sa-4.0',
                  f'PD.py --flagfile ./config/TEACHER_PD.txt --base_ckpt {folder}/edm'):
        assert words in results[0][1], words
    assert 'resuming at step 1' in results[2][1]
    first, student = load_model(folder / 'edm', steps=4), load_model(folder / 'pd')
    assert (student.diffusion.T, student.diffusion.N, student.entries['step']) == (2, 1024, 2)
    assert student.diffusion.mean_type == 'xstart'
    assert student.entries['origin'] == 'edm-cifar10-x'
    assert student.network.entries['license'] == 'cc-by-nc-sa-4.0'
    x, t, y = torch.randn(2, 3, SIZE, SIZE), torch.tensor([1024, 512]), torch.tensor([0, 9])
    with torch.no_grad():
        wanted = first.network(x, t, y)
        assert torch.equal(first.student('xstart')[0].eval()(x, t, y), wanted)
        assert not torch.equal(student.network(x, t, y), wanted)
    line = (folder / 'pd/metrics.jsonl').read_text().splitlines()[-1]
    assert np.isfinite(json.loads(line)['loss'])


def test_exports(teacher, tmp_path, monkeypatch):
    for package in ('diffusers', 'safetensors', 'onnx', 'onnxruntime'):
        pytest.importorskip(package)
    folder, _ = teacher
    with parsing(export.define_flags) as parse:
        for form in ('safetensors', 'onnx'):
            parse(f'--logdir={folder}/pd', f'--format={form}', f'--output={tmp_path}/{form}')
            export.main()       # compares the images of a graph with those of PyTorch
            card = (tmp_path / form / 'README.md').read_text()
            assert 'license: cc-by-nc-sa-4.0' in card
        parse(f'--logdir={folder}/pd', '--format=diffusers', f'--output={tmp_path}/diffusers')
        with pytest.raises(UserError, match='is one of EDM'):
            export.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['onnx', 'safetensors']
    card = (tmp_path / 'safetensors/README.md').read_text()
    monkeypatch.chdir(tmp_path / 'safetensors')
    found = {}
    exec(card.split('```python\n')[1].split('```')[0], found)
    x, t, y = torch.randn(2, 3, SIZE, SIZE), torch.tensor([1024, 512]), torch.tensor([0, 9])
    with torch.no_grad():
        assert torch.equal(found['network'](x, t, y), load_model(folder / 'pd').network(x, t, y))
    assert found['images'].shape == (8, 3, SIZE, SIZE)


# Hostile and damaged files

class Call:
    """An object whose pickle is a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def tensor_of(storage, *place):
    """A tensor in a pickle, by the bytes of its storage, and offset, size and stride."""
    return Call(torch._utils._rebuild_tensor_v2, Call(torch.storage._load_from_bytes, storage),
                *place, False, {})


def saved(value, **how):
    content = io.BytesIO()
    torch.save(value, content, **how)
    return content.getvalue()


def with_parameter(value):
    outer = Whole({})
    outer._parameters['x'] = value
    return pickle.dumps(dict(ema=outer, dataset_kwargs={}), protocol=4)


def hostile_files():
    """{name: (content, words of the sentence)}."""
    evil, old = Call(os.system, 'touch executed'), dict(_use_new_zipfile_serialization=False)
    four = saved(torch.ones(4).storage(), **old)
    around = Whole({'enc.x': torch.ones(1)})
    around._modules['enc']._modules['again'] = around._modules['enc']
    return dict(
        code=(pickle.dumps(dict(ema=Whole({}), more=evil)), 'posix.system'),
        nested=(with_parameter(tensor_of(saved(evil), 0, (4,), (1,))), 'damaged'),
        nested_old=(with_parameter(tensor_of(saved(evil, **old), 0, (4,), (1,))), 'damaged'),
        version=(pickle.dumps(dict(ema=Whole({}, version=5))), 'version 5'),
        loop=(pickle.dumps(dict(ema=around)), 'inside itself'),
        memo=(b'\x80\x04Nr\xff\xff\xff\x7f.', 'larger'),
        tuples=(b'\x80\x04})' + 300000 * b'\x85' + b'Ns.', 'larger'),
        expanded=(with_parameter(tensor_of(four, 0, (10 ** 12,), (0,))), 'more tensors than'),
        outside=(with_parameter(tensor_of(four, 1, (4,), (1,))), 'damaged'),
        list=(pickle.dumps([1]), 'ema'), lacking=(pickle.dumps(dict(net=Whole({}))), 'ema'),
        text=(b'hello', 'damaged'), empty=(b'', 'damaged'))


READ = """
import sys
from formats import edm_pickle
from runtime.cli import UserError
from runtime.precision import prepare
def hook(event, arguments):
    writes = event == 'open' and any(mode in str(arguments[1]) for mode in 'wax+')
    reads = event in ('os.listdir', 'os.scandir')      # of torch's own folders, by its imports
    if writes or not reads and event.startswith(('os.', 'subprocess.', 'socket.', 'shutil.')):
        print('AUDIT', event, arguments)
sys.addaudithook(hook)
for file in sys.argv[1:]:
    try:
        edm_pickle.read(file)
    except UserError as error:
        print(error)
"""


def test_nothing_in_a_pickle_is_run(tmp_path):
    """No file is written and no process or socket opened; each file gets a sentence."""
    files = hostile_files()
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    done = start(['-c', READ, *(tmp_path / name for name in files)])
    assert done.returncode == 0 and 'AUDIT' not in done.stdout, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(files)
    for line, (name, (_, words)) in zip(lines, files.items()):
        assert line.startswith(f'{tmp_path / name} ') and words in line, line
    assert not (ROOT / 'executed').exists()


def test_mistakes_leave_nothing(tmp_path, convert_file):
    """One sentence that names what is wrong; --output does not appear."""
    pytest.importorskip('diffusers')
    song, adm = song_weights(), by_hand.adm_weights()
    lacking = dict(list(song.items())[:-1])
    for name, content in dict(
            edm_x=by_hand.adm_weights(outputs=6), cd_x=adm, adm=adm,
            short=dict(list(adm.items())[9:]), surplus=dict(adm, more=torch.ones(1)),
            rgba=by_hand.adm_weights(outputs=5),
            nan=dict(adm, **{'out.2.bias': torch.full((6,), float('nan'))}),
            lucid=dict(model={}, ema={}, opt={}, step=1), words=dict(a='b')).items():
        torch.save(content, tmp_path / f'{name}.pt')
    for name, how in dict(edm2=dict(name='Precond'), other=dict(name='Mine'),
                          grey=dict(SONG, model_type='SongUNet', img_channels=1),
                          odd=dict(SONG, model_type='SongUNet', num_blocks=10 ** 9),
                          skip=dict(SONG, model_type='SongUNet', encoder_type='skip')).items():
        write(tmp_path / f'{name}.pkl', song, **how)
    write(tmp_path / 'good.pkl', song)
    write(tmp_path / 'lacking.pkl', lacking)
    write(tmp_path / 'surplus.pkl', dict(song, more=torch.ones(1)))
    guided = ['--img_size=16', '--num_heads=4']
    for file, words, *given in [
            ('none.pt', 'is no file'), ('edm2.pkl', 'EDM2'), ('other.pkl', 'Mine'),
            ('grey.pkl', 'img_channels'), ('odd.pkl', 'num_blocks'), ('skip.pkl', 'encoder_type'),
            ('lacking.pkl', 'aux_conv.bias'), ('surplus.pkl', 'more'),
            ('good.pkl', '--num_heads', '--num_heads=4'), ('good.pkl', '--steps', '--steps=90000'),
            ('edm_x.pt', 'conv_out', *guided), ('cd_x.pt', 'no teacher'),
            ('adm.pt', '--num_heads', '--num_heads=5'), ('short.pt', 'short.pt', *guided),
            ('surplus.pt', 'more', *guided), ('rgba.pt', 'conv_out', *guided),
            ('nan.pt', 'out.2.bias', *guided), ('words.pt', 'words.pt'),
            ('adm.pt', '--steps', *guided, '--steps=1500', '--rescale_timesteps'),
            ('adm.pt', '--steps', *guided, '--steps=10'),
            ('lucid.pt', 'denoising-diffusion-pytorch')]:
        with pytest.raises(UserError) as caught:
            convert_file(tmp_path / file, tmp_path / 'out', *given)
        assert words in str(caught.value) and '\n' not in str(caught.value), (file, caught.value)
        assert not (tmp_path / 'out').exists() and not list(tmp_path.glob('out*')), file
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/mine').touch()
    with pytest.raises(UserError, match='not an empty folder'):
        convert_file(tmp_path / 'good.pkl', tmp_path / 'out')




# Full size

SIZES = dict(       # arguments, parameters as published (without those of augmentation)
    cifar10=(dict(img_resolution=32, label_dim=0, model_channels=128, channel_mult=[2, 2, 2],
                  num_blocks=4, attn_resolutions=[16], embedding_type='positional',
                  encoder_type='standard', channel_mult_noise=1, resample_filter=[1, 1],
                  augment_dim=9), 55733891 - 9 * 128),
    ffhq=(dict(img_resolution=64, label_dim=0, model_channels=128, channel_mult=[1, 2, 2, 2],
               num_blocks=4, attn_resolutions=[16], embedding_type='fourier',
               encoder_type='residual', channel_mult_noise=2, resample_filter=[1, 3, 3, 1],
               augment_dim=9), 62761091 - 9 * 256))


@pytest.mark.slow
@pytest.mark.parametrize('name', [*SIZES, 'imagenet64'])
def test_full_size(tmp_path, convert_file, name):
    """Random weights: the published number of parameters, a step of sampling, one of PD."""
    if name == 'imagenet64':
        pytest.importorskip('diffusers')
        weights = by_hand.adm_weights((192, 384, 576, 768), 3, (1, 2, 3), outputs=3, labels=1000)
        parameters = 295899267 + 768        # a row of zeros for "no label"
        torch.save(weights, tmp_path / 'edm_x.pt')
        file, words = tmp_path / 'edm_x.pt', [
            '--img_size=64', '--num_head_channels=64', '--new_attention_order', '--steps=128']
    else:
        arguments, parameters = SIZES[name]
        file, words = write(tmp_path / 'x.pkl', SongUNet(**arguments).state_dict(),
                            model_type='SongUNet', **arguments), ['--steps=128']
    model = convert_file(file, tmp_path / 'out', *words)
    assert sum(value.numel() for value in model.network.parameters()) == parameters
    began = time.time()
    x_T, y = torch.randn(2, 3, model.img_size, model.img_size), torch.tensor([0, 1])
    with torch.no_grad():
        images = model.diffusion.sample(model.network, x_T, stride=128, y=y)
    sampled = time.time()
    student, diffusion = model.student('xstart')
    t = diffusion.visited[torch.tensor([1, 64])]
    with torch.no_grad():
        x_target = model.diffusion.two_step_target(model.network, x_T, t, y)
    x_pred, _ = diffusion.predict(student, x_T, t, y)
    (x_pred - x_target).square().mean().backward()
    torch.optim.Adam(student.parameters()).step()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    print(f'{name}, 2 images: sampling {sampled - began:.1f} s, PD {time.time() - sampled:.1f} s, '
          f'{memory:.1f} GiB at most')
    assert images.isfinite().all() and x_pred.isfinite().all()
