"""Checkpoints: shapes tell the network, writing is atomic, broken files give one sentence."""

import os
from types import SimpleNamespace

import pytest
import torch

from model import UNet
from runtime import checkpoint, models
from runtime.cli import UserError

TINY = dict(T=8, ch=32, ch_mult=[1, 1], attn=[1], num_res_blocks=1, conditional=False,
            class_num=10)
ARCHITECTURES = dict(
    tiny=TINY,
    no_attn=dict(TINY, attn=[]), first_attn=dict(TINY, attn=[0]), one_level=dict(
        TINY, ch_mult=[2], attn=[0]),
    conditional=dict(TINY, conditional=True, class_num=7, ch_mult=[1, 2, 3], attn=[0, 2],
                     num_res_blocks=3),
    cifar10=dict(T=1024, ch=128, ch_mult=[1, 2, 2, 2], attn=[1], num_res_blocks=2,
                 conditional=False, class_num=10),
    imagenet64=dict(T=1024, ch=128, ch_mult=[1, 2, 3, 4], attn=[2, 3], num_res_blocks=3,
                    conditional=True, class_num=1000))


@pytest.mark.parametrize('name', list(ARCHITECTURES))
def test_architecture_is_read_off_the_shapes(name):
    with torch.device('meta'):
        state_dict = UNet(**ARCHITECTURES[name]).state_dict()
    assert models.architecture(state_dict) == ARCHITECTURES[name]


def filled(value, **changes):
    network = UNet(**dict(TINY, **changes))
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(value)
    return network.state_dict()


def biases(network):
    return network.tail[2].bias[0].item()


def test_round_trip(tmp_path):
    state = dict(net_model=filled(.5), T=8, time_scale=1, step=3, note='words',
                 flags=[1, 2.5, None])
    checkpoint.save(tmp_path / 'ckpt.pt', state)
    assert os.listdir(str(tmp_path)) == ['ckpt.pt']
    for path in (tmp_path, tmp_path / 'ckpt.pt', str(tmp_path)):
        loaded = checkpoint.read(path)
    assert list(loaded) == list(state) and loaded['flags'] == state['flags']
    network, name = models.build_unet(loaded)
    assert name == 'net_model' and biases(network) == .5


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(path, dict(step=1))
    before = path.read_bytes()

    def half(state, file):
        file.write(b'half a file')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(UserError, match='ckpt.pt could not be written .No space left') as caught:
        checkpoint.save(path, dict(step=2))
    assert caught.value.code == 1 and os.listdir(str(tmp_path)) == ['ckpt.pt']
    assert path.read_bytes() == before and checkpoint.read(path) == dict(step=1)


def names(folder):
    return sorted(os.listdir(str(folder)))


def test_earlier_checkpoints(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.save_run(tmp_path, 2, step=step)
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_10.pt', 'ckpt_2.pt', 'ckpt_3.pt']
    for name in ('ckpt.pt', 'ckpt_10.pt'):
        assert checkpoint.read(tmp_path / name)['step'] == 10
    assert os.path.samefile(str(tmp_path / 'ckpt.pt'), str(tmp_path / 'ckpt_10.pt'))
    checkpoint.save_run(tmp_path, 2, step=5)        # ckpt_10.pt was damaged: it does not stay
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_2.pt', 'ckpt_3.pt', 'ckpt_5.pt']
    checkpoint.save_run(tmp_path, 2, step=10)
    checkpoint.save_run(tmp_path, 0, step=11)
    assert checkpoint.read(tmp_path / 'ckpt_10.pt')['step'] == 10       # not written through


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(1, 'Operation not permitted')
    monkeypatch.setattr(os, 'link', refuse)
    for step in (1, 2, 3):
        checkpoint.save_run(tmp_path, 1, step=step)
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_2.pt', 'ckpt_3.pt']
    assert checkpoint.read(tmp_path)['step'] == 3


def test_truncated_newest(tmp_path, capsys):
    assert checkpoint.read_newest(tmp_path) is None
    for step in (1, 2, 3):
        checkpoint.save_run(tmp_path, 2, step=step)
    os.truncate(str(tmp_path / 'ckpt.pt'), 100)
    assert checkpoint.read_newest(tmp_path)['step'] == 2
    said = capsys.readouterr().out
    assert 'ckpt.pt is truncated' in said and 'ckpt_2.pt instead' in said
    (tmp_path / 'ckpt.pt').unlink()
    (tmp_path / 'ckpt_3.pt').unlink()
    assert checkpoint.read_newest(tmp_path)['step'] == 2
    for step in (1, 2):
        os.truncate(str(tmp_path / f'ckpt_{step}.pt'), 100)
    with pytest.raises(UserError, match='ckpt_2.pt is truncated'):
        checkpoint.read_newest(tmp_path)


def refused(path, *words):
    with pytest.raises(UserError) as caught:
        checkpoint.read(path)
    message = str(caught.value)
    assert '\n' not in message and str(path) in message and caught.value.code == 2
    assert all(word in message for word in words), message


def test_broken_files(tmp_path):
    checkpoint.save(tmp_path / 'good.pt', dict(net_model=filled(.5)))
    good = (tmp_path / 'good.pt').read_bytes()
    random = torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    for name, content in [('empty', b''), ('random', bytes(random)), ('text', b'hello world\n'),
                          ('cut1', good[:100]), ('cut2', good[:len(good) // 2]),
                          ('cut3', good[:-1]), ('zeros', bytes(1000)),
                          ('tail', good[:len(good) // 2] + bytes(len(good) // 2))]:
        (tmp_path / f'{name}.pt').write_bytes(content)
        refused(tmp_path / f'{name}.pt')
    refused(tmp_path / 'none.pt', 'there is no checkpoint')
    (tmp_path / 'folder').mkdir()
    with pytest.raises(UserError, match='there is no checkpoint .*folder/ckpt.pt'):
        checkpoint.read(tmp_path / 'folder')
    torch.save([1, 2], str(tmp_path / 'list.pt'))
    refused(tmp_path / 'list.pt', 'list')


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('zipped', [True, False])
def test_code_in_a_file_does_not_run(tmp_path, zipped):
    target, path = tmp_path / 'ran', tmp_path / 'evil.pt'
    torch.save(dict(net_model=Payload(str(target))), str(path),
               _use_new_zipfile_serialization=zipped)
    refused(path, 'refused')
    assert not target.exists()
    torch.load(str(path), weights_only=False)
    assert target.exists()      # the payload is real


def test_prefixes_of_wrapped_networks():
    state = dict(net_model={'module.' + key: value for key, value in filled(.5).items()})
    network, _ = models.build_unet(state)
    assert biases(network) == .5


@pytest.mark.parametrize('extra, wanted, expected', [
    (dict(time_scale=1), 'auto', 'ema_model'), (dict(), 'auto', 'ema_model'),   # published base
    (dict(time_scale=2), 'auto', 'net_model'),                          # published student
    (dict(time_scale=2, use='ema_model'), 'auto', 'ema_model'),         # a base on a coarse grid
    (dict(time_scale=1), 'net', 'net_model'), (dict(time_scale=2), 'ema', 'ema_model')])
def test_which_weights(extra, wanted, expected):
    state = dict(net_model=filled(1.), ema_model=filled(2.), T=8, **extra)
    network, name = models.build_unet(state, weights_of=wanted)
    assert name == expected and biases(network) == dict(net_model=1, ema_model=2)[expected]


def test_without_average():
    assert models.build_unet(dict(net_model=filled(1.), time_scale=1))[1] == 'net_model'
    with pytest.raises(UserError, match='ema_model'):
        models.build_unet(dict(net_model=filled(1.)), weights_of='ema')


def test_other_kinds_of_files():
    def fits_not(*words, **state):
        with pytest.raises(UserError, match='FILE') as caught:
            models.build_unet(state, 'FILE')
        assert all(word in str(caught.value) for word in words), caught.value

    fits_not('is a classifier, not a diffusion checkpoint with net_model', 'PD.py', model={})
    fits_not('a file with weights, epoch,', 'not a diffusion', weights={}, epoch=3)
    fits_not('a file with net_model,', net_model=torch.zeros(3))
    fits_not('fit no U-Net', 'expected head.weight', 'found weight', net_model=dict(
        weight=torch.zeros(3)))
    for key, value, words in [
            ('tail.2.bias', torch.zeros(4), 'tail.2.bias is (4,), expected (3,)'),
            ('tail.2.bias', 'text', 'tail.2.bias is str, expected (3,)'),
            ('middleblocks.0.attn.proj.bias', None, 'attn.proj.bias is absent, expected (32,)'),
            ('extra.bias', torch.zeros(4), 'extra.bias is (4,), expected absent'),
            ('head.weight', 3, 'found time_embedding.'), ('head.weight', None, 'expected head.')]:
        broken = dict(filled(1.), **{key: value})
        if value is None:
            del broken[key]
        fits_not('fit no U-Net', words, net_model=broken)


def test_grid():
    assert models.grid(dict(T=4, time_scale=2), TINY)[:2] == (4, 2)
    assert models.grid({}, TINY)[:2] == (8, 1)
    assert models.grid(dict(T=2), TINY)[:2] == (2, 4)


def check(changes, given, arch=TINY):
    flags = SimpleNamespace(**dict(TINY, **changes))
    models.check_flags(arch, 'file.pt', flags, lambda name: name in given)


def test_flags_are_checked_against_the_network():
    check({}, list(TINY))
    check(dict(ch=64, attn=[0, 1]), [])     # defaults that nobody wrote
    for name, value in [('ch', 64), ('ch_mult', [1, 2]), ('attn', [1, 2]), ('num_res_blocks', 2),
                        ('conditional', True)]:
        with pytest.raises(UserError, match=f'--{name} is .* the network in file.pt has'):
            check({name: value}, [name])
    check(dict(attn=[1, 0]), ['attn'], dict(TINY, attn=[0, 1]))     # order does not matter
    check(dict(class_num=5), ['class_num'])     # without labels it means nothing
    with pytest.raises(UserError, match='--class_num'):
        check(dict(class_num=5), ['class_num'], dict(TINY, conditional=True))


def test_resume(tmp_path):
    network = UNet(**TINY)
    assert checkpoint.resume(tmp_path, network, 'pd', 8, 1) is None
    state = dict(net_model=network.state_dict(), optim={}, step=2, T=8, time_scale=1,
                 method='pd')
    checkpoint.save(tmp_path / 'ckpt.pt', state)
    with pytest.raises(UserError, match='makes a rdd model'):
        checkpoint.resume(tmp_path, network, 'rdd', 8, 1)
    assert checkpoint.resume(tmp_path, network, 'pd', 8, 1, tmp_path / 'teacher')['step'] == 2
    for teacher in (tmp_path, tmp_path / 'ckpt.pt', str(tmp_path) + '/.'):
        with pytest.raises(UserError, match='folder of the teacher'):
            checkpoint.resume(tmp_path, network, 'pd', 8, 1, teacher)
    with pytest.raises(UserError, match='8 steps of 1 .* 4 of 2'):
        checkpoint.resume(tmp_path, network, 'pd', 4, 2)
    with pytest.raises(UserError, match='another network'):
        checkpoint.resume(tmp_path, UNet(**dict(TINY, num_res_blocks=2)), 'pd', 8, 1)
    checkpoint.save(tmp_path / 'ckpt.pt', dict(net_model=network.state_dict()))
    with pytest.raises(UserError, match='cannot be continued'):
        checkpoint.resume(tmp_path, network, 'pd', 8, 1)
