"""Loading checkpoints: shapes tell the network, every entry is checked, mistakes are a sentence."""

import time

import pytest
import torch

import training
from diffusion import Diffusion, clean_linear
from formats import load
from formats.entries import Model
from formats.load import load_model
from model import UNet
from helpers import parsing
from runtime import checkpoint
from runtime.cli import UserError

TINY = dict(T=8, ch=32, ch_mult=[1, 1], attn=[1], num_res_blocks=1, conditional=False,
            class_num=10)
ARCHITECTURES = dict(
    tiny=TINY, no_attn=dict(TINY, attn=[]), first_attn=dict(TINY, attn=[0]),
    one_level=dict(TINY, ch_mult=[2], attn=[0]),
    conditional=dict(TINY, conditional=True, class_num=7, ch_mult=[1, 2, 3], attn=[0, 2],
                     num_res_blocks=3))


@pytest.mark.parametrize('name', list(ARCHITECTURES))
def test_architecture_is_read_off_the_shapes(name):
    with torch.device('meta'):
        state_dict = UNet(**ARCHITECTURES[name]).state_dict()
    assert load.architecture(state_dict) == ARCHITECTURES[name]


def filled(value=.5, **changes):
    network = UNet(**dict(TINY, **changes))
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(value)
    return network.state_dict()


@pytest.fixture
def loaded(tmp_path):
    """loaded(net_model=.., T=8, ..., how=dict(steps=4)): the model of a file with these entries."""
    def loaded(how=None, **state):
        torch.save(state, str(tmp_path / 'FILE.pt'))
        return load_model(tmp_path / 'FILE.pt', **dict(dict(img_size=8), **how or {}))
    return loaded


def bias(model):
    return model.network.tail[2].bias[0].item()


@pytest.mark.parametrize('extra, wanted, expected', [
    (dict(T=8), 'auto', 'ema_model'),
    (dict(T=4, time_scale=2), 'auto', 'net_model'),                         # published student
    (dict(T=4, time_scale=2, use='ema_model'), 'auto', 'ema_model'),    # a base on a coarse grid
    (dict(T=8, time_scale=1), 'net', 'net_model'), (dict(T=4, time_scale=2), 'ema', 'ema_model')])
def test_which_weights(loaded, extra, wanted, expected):
    model = loaded(net_model=filled(1.), ema_model=filled(2.), **extra, how=dict(weights=wanted))
    assert model.weights_name == expected
    assert bias(model) == dict(net_model=1, ema_model=2)[expected]


def test_other_forms_of_weights(loaded):
    """Without an average, of wrapped networks, in half precision."""
    wrapped = {f'module.ema_model.{key}': value.half() for key, value in filled(.5).items()}
    model = loaded(net_model=wrapped, T=8, time_scale=1)
    assert model.weights_name == 'net_model' and bias(model) == .5 and not model.network.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in model.network.parameters())


def test_what_a_file_does_not_state(loaded):
    """The size is that of x_T."""
    x_T, how = torch.zeros(1, 3, 16, 16), dict(mean_type='epsilon')
    model = loaded(net_model=filled(), T=2, x_T=x_T, step=7, how=how)
    assert model.diffusion.arguments() == dict(T=2, time_scale=4, mean_type='epsilon',
                                               schedule='cosine')
    assert (model.img_size, model.provenance()) == (16, dict(step=7, origin=model.file.stem))
    stated = loaded(net_model=filled(), T=8, mean_type='v', img_size=4, x_T=x_T, how=how)
    assert (stated.diffusion.mean_type, stated.img_size) == ('v', 4)
    uneven = loaded(net_model=filled(T=10), T=4, time_scale=2, N=10)
    assert uneven.diffusion.times() == [10, 8, 5, 2, 0]


def test_a_file_of_pytorch_ddpm(loaded, capsys):
    """Its times 0..N become 1..N + 1, after a clean end; its weights: test_published.py."""
    model = loaded(ema_model=filled(T=999), how=dict(steps=128))
    assert 'linear schedule' in capsys.readouterr().out
    assert model.diffusion.arguments() == dict(T=128, time_scale=7, mean_type='epsilon',
                                               schedule=clean_linear(), N=1000)


# Files that are refused

WEIGHTS = filled()


def state(**changes):
    return dict(dict(T=8, time_scale=1, net_model=WEIGHTS), **changes)


def betas(*changes, N=8, mean_type='v'):
    """A checkpoint whose schedule has these (index, beta) changed."""
    values = [.1] * N
    for index, value in changes:
        values[index] = value
    return state(schedule=dict(name='mine', betas=values), mean_type=mean_type)


def weights(name, value=None):
    """A checkpoint with another value of a parameter, or without it."""
    changed = {key: found for key, found in WEIGHTS.items() if key != name}
    return state(net_model=changed if value is None else dict(changed, **{name: value}))


REFUSED = {
    'T in .*FILE.pt is 0, expected a whole number': state(T=0),
    'T in .* is True, expected': state(T=True), 'T in .* is 1000000000, expected': state(T=10 ** 9),
    r'T in .* is a tensor of shape \(3,\), expected': state(T=torch.zeros(3)),
    'time_scale in .* is nan, expected': state(time_scale=float('nan')),
    'T 3, time_scale 3 and N 9 .* do not fit': state(T=3, time_scale=3),
    'T 16, time_scale 1 and N 16 .* do not fit': state(T=16),
    'N 12 in .* do not fit': state(N=12),
    'schedule in .* is .quadratic., expected cosine': state(schedule='quadratic'),
    r'schedule in .*\(0, 1\)': betas((3, 1.5)), 'schedule in .* is .*nan': betas((1, float('nan'))),
    'schedule in .* is .*-0.1': betas((1, -.1)), r'schedule in .*\[0': betas((0, 0.)),
    'schedule in .* is .*text': betas((1, 'text')), 'schedule .*betas': betas((5, 1.)),
    'do not fit each other, 7 betas': betas(N=7),
    'ends with alpha 0': betas((7, 1.), mean_type='epsilon'),
    'mean_type in .* is .score., expected xstart or epsilon or v': state(mean_type='score'),
    '9 steps are more than the 8 of .*FILE.pt; lower': state(how=dict(steps=9)),
    '3 steps do not divide the 4': state(T=4, time_scale=2, how=dict(steps=3)),
    'no ema_model, only net_model; leave out --w': state(how=dict(weights='ema')),
    'use in .* is 3, expected net_model or ema_model': state(use=3),
    'img_size in .* is -8, expected': state(img_size=-8),
    'expected a multiple of 2': state(img_size=15), 'x_T in .* is 3, expected noise': state(x_T=3),
    'unet_config in .* is 1, expected': state(unet_config=1),
    'is a file with T, time_scale, net_model, not a diffusion': state(net_model=torch.zeros(3)),
    'fit no U-Net .* expected head.weight.* found weight': state(
        net_model=dict(weight=torch.zeros(3))),
    # weights
    r'tail.2.bias is \(4,\), expected \(3,\)': weights('tail.2.bias', torch.zeros(4)),
    r'attn.proj.bias is absent, expected \(32,\)': weights('middleblocks.0.attn.proj.bias'),
    r'extra.bias is \(4,\), expected absent': weights('extra.bias', torch.zeros(4)),
    'fit no U-Net': weights('head.weight'),
    'tail.2.bias of the net_model .* is .text., expected': weights('tail.2.bias', 'text'),
    'tail.2.bias of .* finite': weights('tail.2.bias', torch.tensor([0., float('nan'), 0.])),
    'head.bias of .* floating-point': weights('head.bias', torch.zeros(32, dtype=torch.int64)),
    r'\(1000000, 1000000\)': weights('downblocks.0.block1.2.weight',
                                     torch.zeros(1).expand(10 ** 6, 10 ** 6)),
    'downblocks.999999999.main.weight is': weights('downblocks.999999999.main.weight',
                                                   torch.zeros(1)),
    r'weight is \(1000000, 1\)': weights('downblocks.0.block1.2.weight', torch.zeros(10 ** 6, 1)),
    # other kinds of files
    'is a classifier.*PD.py': dict(model={'fc.weight': torch.zeros(2, 2)}, name='resnet18'),
    'denoising-diffusion-pytorch, whose network.*PD.py': dict(step=1, model={}, opt={}, ema={}),
    'guided-diffusion, which convert.py reads.*PD.py': {'input_blocks.0.0.weight': torch.zeros(2)},
    'a file with step, nets, not.*PD.py': dict(step=1, nets={})}


@pytest.mark.parametrize('sentence', list(REFUSED))
def test_refusals(loaded, sentence):
    """One sentence, and before anything of an absurd size is built."""
    since = time.time()
    with pytest.raises(UserError, match=sentence) as caught:
        loaded(**REFUSED[sentence])
    assert '\n' not in str(caught.value) and 'FILE.pt' in str(caught.value)
    assert time.time() - since < 5


def test_names_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='hf download google/ddpm-cifar10-32 --local-dir DIR'):
        load_model('google/ddpm-cifar10-32')
    with pytest.raises(UserError, match='there is no checkpoint .*/none/ckpt.pt.*; give') as caught:
        load_model(tmp_path / 'none')
    assert 'hf download' not in str(caught.value)


# Flags and students

@pytest.fixture
def parse():
    with parsing(training.define_distillation_flags) as parse:
        yield parse


def model_of(**changes):
    arch = dict(TINY, **changes)
    return Model(UNet(**arch).requires_grad_(False).eval(), Diffusion(8), 'file.pt', 'net_model',
                 arch, 8, {})


@pytest.mark.parametrize('words, changes, sentence', [
    ([], dict(ch=64), None), (['--ch=32', '--attn=1'], {}, None),       # defaults do not count
    (['--ch=64'], {}, '--ch is 64 and the network in file.pt has 32'),
    (['--ch_mult=1', '--ch_mult=2'], {}, r'--ch_mult is \[1, 2\]'),
    (['--attn=1', '--attn=0', '--attn=1'], dict(attn=[0, 1]), None),    # in any order
    (['--attn=1', '--attn=2'], {}, '--attn is'), (['--num_res_blocks=2'], {}, '--num_res_blocks'),
    (['--conditional'], {}, '--conditional is True'),
    (['--class_num=5'], {}, None), (['--class_num=5'], dict(conditional=True), '--class_num is 5'),
    (['--mean_type=v'], {}, '--mean_type is v and file.pt was trained with xstart'),
    (['--img_size=16'], {}, '--img_size is 16 and file.pt was trained with 8')])
def test_flags_that_contradict_a_model(parse, words, changes, sentence):
    parse(*words)
    if sentence is None:
        return load.check_flags(model_of(**changes))
    with pytest.raises(UserError, match=sentence):
        load.check_flags(model_of(**changes))


def test_teachers(parse, tmp_path):
    """A teacher may predict something else than --mean_type, which is about its students."""
    def teacher(*words, path=tmp_path):
        parse('--img_size=8', f'--base_ckpt={tmp_path}', *words)
        return load.load_teacher(str(path), torch.device('cpu'))

    checkpoint.save(tmp_path / 'ckpt.pt', state(img_size=8, mean_type='v'))
    words = ['--mean_type=xstart', '--teacher_steps=2', '--dropout=0.25']
    found = teacher(*words)
    assert (found.diffusion.T, found.diffusion.mean_type) == (2, 'v')
    assert found.network.downblocks[0].block2[2].p == 0.25
    # a later stage is not the model that --teacher_steps is about
    assert teacher(*words, path=tmp_path / 'ckpt.pt').diffusion.T == 8
    for word, sentence in [('--teacher_steps=1', 'has 1 sampling steps, which cannot be halved'),
                           ('--img_size=16', '--img_size is 16'), ('--ch=64', '--ch is 64')]:
        with pytest.raises(UserError, match=sentence):
            teacher(word)
