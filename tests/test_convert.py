"""Teachers of others: converted networks against plain computations, students, hostile pickles."""

import io
import math
import os
import pickle
import sys
import types
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

import convert
from diffusion import Diffusion
from formats import edm_pickle, guided_diffusion
from formats.load import load_model
from formats.songunet import SongUNet
from runtime.cli import UserError
from runtime.precision import prepare
import by_hand
from helpers import PD, ROOT, Call, assert_ran, command, diffusers, fork_all, parsing

SIZE = 16
SONG = dict(img_resolution=SIZE, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
            attn_resolutions=[8], embedding_type='positional', encoder_type='standard',
            channel_mult_noise=1, resample_filter=[1, 1], augment_dim=9)
NCSNPP = dict(SONG, embedding_type='fourier', encoder_type='residual', channel_mult_noise=2,
              resample_filter=[1, 3, 3, 1])
SOURCE = 'import os\nos.system("touch executed")\n'


# Files as they are published

def _reconstruct_persistent_obj(meta):
    raise AssertionError('something in the pickle was run')


class EasyDict(dict):
    """As in snapshots of EDM2, saved by an earlier version of Python."""

    def __reduce__(self):
        return EasyDict, (), {}, None, iter(self.items())


@pytest.fixture(autouse=True, scope='module')
def published_code():
    """The modules that pickles of EDM refer to."""
    with pytest.MonkeyPatch.context() as patch:
        for name, item in {'torch_utils.persistence': _reconstruct_persistent_obj,
                           'dnnlib.util': EasyDict}.items():
            package = name.split('.')[0]
            patch.setitem(sys.modules, package, types.ModuleType(package))
            patch.setitem(sys.modules, name, types.ModuleType(name))
            patch.setattr(item, '__module__', name)
            setattr(sys.modules[name], item.__name__, item)
        yield


class Whole(nn.Module):
    """A module that is pickled as EDM's are: a function and one dictionary, with source text."""

    def __init__(self, tensors, name='Conv2d', version=6, **kwargs):
        """tensors: {name: tensor}, those of the modules in it with their names before a dot."""
        super().__init__()
        self.meta = dict(type='class', version=version, module_src=SOURCE, class_name=name)
        self._init_args, self._init_kwargs, self.scale = (), kwargs, np.float64(.5)
        inner = {}
        for key, value in tensors.items():
            first, _, rest = key.partition('.')
            if rest:
                inner.setdefault(first, {})[rest] = value
            elif first in ('freqs', 'u', 'resample_filter'):
                self.register_buffer(first, value)
            else:
                self.register_parameter(first, nn.Parameter(value.clone()))
        for first, values in inner.items():
            module = Whole(values)
            self._modules[first] = (
                nn.ModuleDict(module._modules) if first in ('enc', 'dec') else module)

    def __reduce__(self):
        state = {key: value for key, value in self.__dict__.items() if key != 'meta'}
        return _reconstruct_persistent_obj, (dict(self.meta, state=state),)


def song_weights(arguments=SONG):
    """Random weights; norms near 1, filters as they are."""
    generator, weights = torch.Generator().manual_seed(0), SongUNet(**arguments).state_dict()
    for key, value in weights.items():
        if 'resample_filter' not in key:
            value.copy_(torch.randn(value.shape, generator=generator))
            value /= value[0].numel() ** .5 if value.ndim > 1 else 4.
            value += float('norm' in key and key.endswith('weight'))
    return weights


def write(file, weights, name='EDMPrecond', u=None, **changes):
    """Write a snapshot of EDM, by default of a SongUNet with the arguments `SONG`; None: absent."""
    tensors = {f'model.{key}': value for key, value in weights.items()}
    if u is not None:
        tensors['u'] = u
    arguments = dict(SONG, model_type='SongUNet', img_channels=3, use_fp16=False)
    arguments.update(changes)
    arguments = {key: value for key, value in arguments.items() if value is not None}
    found = EasyDict(ema=Whole(tensors, name, **arguments), loss_fn=None, augment_pipe=None,
                     dataset_kwargs=dict(path='x.zip'))
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

def assert_denoises(network, wanted, x, s, y):
    """D(x; s, y) is wanted(y), with and without labels."""
    with torch.no_grad():
        found, unlabelled = network.denoise(x, s, y), network.denoise(x, s)
    assert (found - wanted(y)).abs().max() < 1e-4 * wanted(y).abs().max()
    assert (found - unlabelled).abs().max() > 1e-3
    error = (unlabelled - wanted(None)).abs().amax((1, 2, 3)) / unlabelled.abs().amax((1, 2, 3))
    assert error.max() < 1e-3


@pytest.mark.parametrize('arguments', [SONG, NCSNPP], ids=['ddpmpp', 'ncsnpp'])
@pytest.mark.parametrize('kind', ['EDMPrecond', 'VPPrecond', 'VEPrecond', 'iDDPMPrecond'])
def test_songunet(tmp_path, convert_file, kind, arguments):
    s, c_skip, c_out, c_in, c_noise, u = by_hand.noise_levels(kind)
    w = song_weights(arguments)
    stored = dict(w)
    if kind == 'iDDPMPrecond':      # the last three outputs are the variance, which is left out
        for key in ('dec.16x16_aux_conv.weight', 'dec.16x16_aux_conv.bias'):
            stored[key] = torch.cat([w[key], w[key] + 1])
    file = write(tmp_path / 'x.pkl', stored, kind, u=u, **arguments)
    model = convert_file(file, tmp_path / 'out')
    x, y = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 2, 1, 2])

    def wanted(y):
        return c_skip * x + c_out * by_hand.song(w, arguments, c_in * x, c_noise, y)
    assert_denoises(model.network, wanted, x, s, y)


def test_arguments_that_a_snapshot_leaves_out(tmp_path, convert_file):
    """EDM's options state neither four blocks, attention at 16 pixels, nor 64 channels a head."""
    given = dict(img_resolution=SIZE, label_dim=0, model_channels=16, channel_mult=[1])
    absent = dict.fromkeys(set(SONG) - set(given))
    file = write(tmp_path / 'x.pkl', SongUNet(**given).state_dict(), **absent, **given)
    arch = convert_file(file, tmp_path / 'out').arch
    assert (arch['num_res_blocks'], arch['attn'], arch['conditional']) == (4, [0], False)
    diffusers()
    w = by_hand.adm_weights((64, 64), outputs=3, edm=True)
    file = write(tmp_path / 'adm.pkl', w, model_type='DhariwalUNet')
    network = convert_file(file, tmp_path / 'adm').network
    assert network.entries['unet_config']['attention_head_dim'] == 64


@pytest.mark.parametrize('name, words, kind, wanted', [
    ('cifar10_uncond_50M_500K', '', 'guided_diffusion', dict(
        img_size=32, num_heads=4, beta_schedule='cosine', steps=4000, rescale_timesteps=True)),
    ('mine', '--preset=64x64_diffusion --beta_schedule=linear', 'guided_diffusion', dict(
        img_size=64, num_head_channels=64, new_attention_order=True, beta_schedule='linear')),
    ('mine', '', 'guided_diffusion', dict(num_heads=4, num_head_channels=0, steps=1000)),
    ('edm_mine', '', 'consistency_models', dict(steps=1024)),
    ('mine', '--preset=edm_imagenet64_ema', 'consistency_models', dict(num_head_channels=64)),
    ('edm_mine', '--preset=64x64_diffusion', 'guided_diffusion', dict(beta_schedule='cosine'))])
def test_what_the_weights_do_not_show(tmp_path, convert_file, monkeypatch, name, words, kind,
                                      wanted):
    """By flags, else by the public file of this name, else by a default."""
    asked = Mock(side_effect=UserError('read'))
    monkeypatch.setattr(convert.guided_diffusion, 'teacher', asked)
    file = tmp_path / f'{name}.pt'
    torch.save({}, file)
    with pytest.raises(UserError, match='read'):
        convert_file(file, tmp_path / 'out', *words.split())
    assert asked.call_args[0] == (file, kind)
    found = asked.call_args[1]
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize('name, licence', [
    ('lsun_cat', 'mit'), ('edm-imagenet-64x64-cond-adm', 'cc-by-nc-sa-4.0'),
    ('edm-ffhq-64x64-uncond-ve', 'cc-by-nc-sa-4.0'),
    ('lsun_cat_finetuned', None), ('edm-cifar10-mine', None)])
def test_licences_go_by_the_whole_name(name, licence):
    assert convert.licence_of(name) == licence


@pytest.mark.parametrize('kind', ['EDMPrecond', 'iDDPMPrecond', 'consistency_models'])
def test_adm_in_the_preconditioning_of_edm(tmp_path, convert_file, kind):
    diffusers()
    s, c_skip, c_out, c_in, c_noise, u = by_hand.noise_levels(kind)
    outputs = 6 if kind == 'iDDPMPrecond' else 3
    w = by_hand.adm_weights(outputs=outputs, edm=True)
    if kind == 'consistency_models':
        order, groups, file = 'new', 32, tmp_path / 'edm_x.pt'
        torch.save(by_hand.adm_weights(outputs=outputs), file)
        words = ['--img_size=16', '--num_head_channels=16', '--new_attention_order']
    else:
        order, groups, words = 'edm', None, []
        file = write(tmp_path / 'x.pkl', w, kind, u=u, model_type='DhariwalUNet',
                     channels_per_head=16)
    model = convert_file(file, tmp_path / 'out', *words)
    x, y = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 3, 1, 2])

    def wanted(y):
        out = by_hand.adm(w, order, 16, c_in * x, c_noise, y, groups)
        return c_skip * x + c_out * out[:, :3]
    assert_denoises(model.network, wanted, x, s, y)
    assert (model.arch['conditional'], model.arch['class_num']) == (True, 4)
    assert model.diffusion.mean_type == 'xstart'


@pytest.mark.parametrize('order, updown, scale_shift, outputs', [
    ('legacy', False, True, 6), ('new', True, True, 6), ('legacy', True, False, 3)])
def test_guided_diffusion(tmp_path, convert_file, order, updown, scale_shift, outputs):
    """Its timesteps are our times less one; a learned variance is left out."""
    diffusers()
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
    """The coefficients stay in float32."""
    model = convert_file(write(tmp_path / 'x.pkl', song_weights()), tmp_path / 'out')
    x, t, y = torch.randn(2, 3, SIZE, SIZE), torch.tensor([1, 900]), torch.tensor([0, 2])
    with torch.no_grad():
        wanted = model.network(x, t, y)
        with torch.autocast('cpu', torch.bfloat16):
            found = model.network(x, t, y)
            prepare('bf16', False, torch.device('cpu'), model.network)
            assert torch.equal(model.network(x, t, y), found)       # converted to the same values
    assert found.dtype == torch.float32
    assert (found[0] - wanted[0]).abs().max() < 1e-3        # c_out is about the noise level
    assert (found[1] - wanted[1]).abs().max() < .05 * wanted[1].abs().max()


def test_noise_levels(tmp_path, convert_file):
    """Those of Karras et al. (rho 7); the network at time t is D(z_t / alpha_t; its level)."""
    model = convert_file(write(tmp_path / 'x.pkl', song_weights()), tmp_path / 'out', '--steps=64')
    d, network = model.diffusion, model.network
    low, high = .002 ** (1 / 7), 80 ** (1 / 7)
    wanted = torch.tensor([(low + i / 63 * (high - low)) ** 7 for i in range(64)])
    sigma = d.sigma / d.alpha
    assert sigma[0] == 0 and torch.allclose(sigma[1:].float(), wanted, rtol=1e-2)
    assert (d.T, d.mean_type, model.img_size, network.class_num) == (64, 'xstart', SIZE, 3)
    t, y, z_t = torch.tensor([64, 30, 1]), torch.tensor([0, 1, 2]), torch.randn(3, 3, SIZE, SIZE)
    alpha_t, _ = d.at(t, torch.float32)
    with torch.no_grad():
        D = network.denoise(z_t / alpha_t, sigma[t].float(), y)
        assert (network(z_t, t, y) - D).abs().max() < 1e-4


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


@pytest.mark.parametrize('arguments, parameters', [
    (dict(SONG, img_resolution=32, channel_mult=[2, 2, 2]), 55733891 - 9 * 128),
    (dict(NCSNPP, img_resolution=64, channel_mult=[1, 2, 2, 2]), 62761091 - 9 * 256)],
    ids=['cifar10', 'ffhq'])
def test_published_sizes(arguments, parameters):
    """As published, less the parameters of augmentation."""
    full = dict(label_dim=0, model_channels=128, num_blocks=4, attn_resolutions=[16])
    with torch.device('meta'):
        network = SongUNet(**dict(arguments, **full))
    assert sum(value.numel() for value in network.parameters()) == parameters


def test_more_resolutions_and_blocks(tmp_path, convert_file):
    """Three resolutions of two blocks, two with attention: every tensor has a place."""
    diffusers()
    w = by_hand.adm_weights((32, 64, 96), 2, (1, 2), outputs=3)
    torch.save(w, tmp_path / 'edm_x.pt')
    model = convert_file(tmp_path / 'edm_x.pt', tmp_path / 'out', '--num_head_channels=32')
    found = sum(value.numel() for value in model.network.parameters())
    assert found == sum(value.numel() for value in w.values()) + 128    # "no label": zeros
    assert (model.arch['ch_mult'], model.arch['attn']) == ([1, 2, 3], [1, 2])


# Students

def test_students_are_the_same_wrapper(tmp_path):
    """A file of ten classes, converted, and a student of two steps from it."""
    arguments = dict(SONG, label_dim=10, augment_dim=0)
    file = write(tmp_path / 'edm-cifar10-32x32-cond-vp.pkl', song_weights(arguments), **arguments)
    pd = [*PD, f'--base_ckpt={tmp_path}/edm', '--teacher_steps=4', f'--logdir={tmp_path}/pd']
    results = fork_all(dict(run=[
        command(['convert.py'], f'--teacher={file}', f'--output={tmp_path}/edm'),
        command(pd, '--total_steps=1'), command(pd, '--total_steps=2')]))['run']
    assert_ran(results)
    for words in ('SongUNet', 'EDMPrecond', '16 x 16', '10 classes', 'cc-by-nc-sa-4.0',
                  f'PD.py --flagfile ./config/TEACHER_PD.txt --base_ckpt {tmp_path}/edm'):
        assert words in results[0][1], words
    assert 'resuming at step 1' in results[2][1]
    first, student = load_model(tmp_path / 'edm', steps=4), load_model(tmp_path / 'pd')
    assert (student.diffusion.T, student.diffusion.N, student.entries['step']) == (2, 1024, 2)
    assert (student.diffusion.mean_type, student.arch['attn']) == ('xstart', [1])
    assert student.entries['origin'] == 'edm-cifar10-32x32-cond-vp'
    assert student.network.entries['license'] == 'cc-by-nc-sa-4.0'
    x, t, y = torch.randn(2, 3, SIZE, SIZE), torch.tensor([1024, 512]), torch.tensor([0, 9])
    with torch.no_grad():
        assert not torch.equal(student.network(x, t, y), first.network(x, t, y))


# Hostile and damaged files

def tensor_of(storage, *place):
    """A tensor in a pickle, by the bytes of its storage, and offset, size and stride."""
    return Call(torch._utils._rebuild_tensor_v2, Call(torch.storage._load_from_bytes, storage),
                *place, False, {})


def saved(value, **how):
    content = io.BytesIO()
    torch.save(value, content, **how)
    return content.getvalue()


def with_parameter(value, names='x'):
    outer = Whole({})
    outer._parameters.update(dict.fromkeys(names, value))
    return pickle.dumps(dict(ema=outer, dataset_kwargs={}), protocol=4)


def hostile_files():
    """{name: (content, words of the sentence)}."""
    evil, old = Call(os.system, 'touch executed'), dict(_use_new_zipfile_serialization=False)
    four = saved(torch.ones(4).storage(), **old)
    around = Whole({'enc.block.x': torch.ones(1)})
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
        twice=(with_parameter(tensor_of(four, 0, (4,), (1,)), 'xy'), 'more tensors than'),
        outside=(with_parameter(tensor_of(four, 1, (4,), (1,))), 'damaged'),
        list=(pickle.dumps([1]), 'ema'), lacking=(pickle.dumps(dict(net=Whole({}))), 'ema'),
        text=(b'hello', 'damaged'), empty=(b'', 'damaged'))


def test_nothing_in_a_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (content, words) in hostile_files().items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            edm_pickle.read(file)
        assert str(caught.value).startswith(f'{file} ') and '\n' not in str(caught.value)
    assert not (tmp_path / 'executed').exists()


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    """A folder of files that cannot be converted, or only with the right flags."""
    folder, song, adm = tmp_path_factory.mktemp('odd'), song_weights(), by_hand.adm_weights()
    write(folder / 'good.pkl', song)
    write(folder / 'edm2.pkl', song, name='Precond')
    write(folder / 'other.pkl', song, name='Mine')
    write(folder / 'grey.pkl', song, img_channels=1)
    write(folder / 'deep.pkl', song, num_blocks=10 ** 9)
    write(folder / 'skip.pkl', song, encoder_type='skip')
    for name, content in dict(
            adm=adm, edm_x=adm, cd_x=adm, short=dict(list(adm.items())[9:]),
            surplus=dict(adm, more=torch.ones(1)), rgba=by_hand.adm_weights(outputs=5),
            nan=dict(adm, **{'out.2.bias': torch.full((6,), float('nan'))}),
            lucid=dict(model={}, ema={}, opt={}, step=1), words=dict(a='b')).items():
        torch.save(content, folder / f'{name}.pt')
    return folder


GUIDED = ('--img_size=16', '--num_heads=4')


@pytest.mark.parametrize('file, words, flags', [
    ('good.pkl', 'cannot take the result', [f'--output={ROOT}/tests']),
    ('none.pt', 'is no file', ()), ('edm2.pkl', 'EDM2', ()), ('other.pkl', 'Mine', ()),
    ('grey.pkl', 'img_channels', ()), ('deep.pkl', 'num_blocks', ()),
    ('skip.pkl', 'encoder_type', ()), ('good.pkl', '--num_heads', ['--num_heads=4']),
    ('good.pkl', '--steps', ['--steps=90000']), ('edm_x.pt', 'conv_out', GUIDED),
    ('cd_x.pt', 'no teacher', ()), ('adm.pt', '--num_heads', ['--num_heads=5']),
    ('short.pt', 'short.pt', GUIDED), ('surplus.pt', 'more', GUIDED),
    ('rgba.pt', 'conv_out', GUIDED), ('nan.pt', 'out.2.bias', GUIDED), ('words.pt', 'words.pt', ()),
    ('adm.pt', '--steps', [*GUIDED, '--steps=1500', '--rescale_timesteps']),
    ('adm.pt', '--steps', [*GUIDED, '--steps=10']),
    ('lucid.pt', 'denoising-diffusion-pytorch', ())])
def test_a_mistake_leaves_nothing(odd, tmp_path, convert_file, file, words, flags):
    diffusers()
    with pytest.raises(UserError) as caught:
        convert_file(odd / file, tmp_path / 'out', *flags)
    assert words in str(caught.value) and '\n' not in str(caught.value), caught.value
    assert not list(tmp_path.iterdir())
