"""Checkpoints: writing is atomic, broken files give one sentence, moments must fit."""

import os
import stat
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from helpers import Call
from runtime import checkpoint
from runtime.cli import UserError
from runtime.files import replacing
from runtime.optim import adam


def names(folder):
    return sorted(os.listdir(str(folder)))


# Files

def test_replacing(tmp_path):
    """A link is replaced, its target stays; two at a time, of which the last one counts."""
    path, theirs = tmp_path / 'file', tmp_path / 'theirs'
    theirs.write_text('theirs')
    path.symlink_to(theirs)
    before = os.umask(0o027)
    with replacing(path) as one, replacing(path) as other:
        assert len({one, other, path}) == 3
        other.write_text('second')
        one.write_text('first')
        assert path.read_text() == 'theirs'
    os.umask(before)
    assert path.read_text() == 'first' and not path.is_symlink() and theirs.read_text() == 'theirs'
    assert names(tmp_path) == ['file', 'theirs']
    assert stat.S_IMODE(path.stat().st_mode) == 0o640       # as any new file


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(path, dict(step=1))

    def half(state, file):
        file.write_bytes(b'half a file')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(UserError, match='ckpt.pt could not be written .No space left') as caught:
        checkpoint.save(path, dict(step=2))
    assert caught.value.code == 1 and names(tmp_path) == ['ckpt.pt']
    assert checkpoint.read(path) == dict(step=1)


@pytest.mark.parametrize('links', [True, False])
def test_earlier_checkpoints(tmp_path, monkeypatch, links):
    """As many as asked for, and the newest under two names, also without hard links."""
    if not links:
        monkeypatch.setattr(os, 'link', Mock(side_effect=OSError(1, 'Operation not permitted')))
    for step in (1, 2, 3, 10):
        checkpoint.save_run(tmp_path, 2, step=step)
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_10.pt', 'ckpt_2.pt', 'ckpt_3.pt']
    for name in ('ckpt.pt', 'ckpt_10.pt'):
        assert checkpoint.read(tmp_path / name)['step'] == 10
    assert os.path.samefile(tmp_path / 'ckpt.pt', tmp_path / 'ckpt_10.pt') == links
    checkpoint.save_run(tmp_path, 2, step=5)        # ckpt_10.pt was damaged: it does not stay
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_2.pt', 'ckpt_3.pt', 'ckpt_5.pt']
    checkpoint.save_run(tmp_path, 2, step=10)
    checkpoint.save_run(tmp_path, 0, step=11)
    assert checkpoint.read(tmp_path / 'ckpt_10.pt')['step'] == 10       # not written through


def test_a_run_that_ends_between_the_two_names(tmp_path, monkeypatch):
    """ckpt.pt, which others read, is the first."""
    monkeypatch.setattr(os, 'link', Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_run(tmp_path, 1, step=3)
    assert names(tmp_path) == ['ckpt.pt'] and checkpoint.read(tmp_path)['step'] == 3


def test_truncated_newest(tmp_path, capsys):
    assert checkpoint.read_newest(tmp_path) is None
    for step in (1, 2, 3):
        checkpoint.save_run(tmp_path, 2, step=step)
    os.truncate(str(tmp_path / 'ckpt.pt'), 100)     # and so ckpt_3.pt, the same file
    assert checkpoint.read_newest(tmp_path)['step'] == 2
    out = capsys.readouterr().out
    assert 'ckpt.pt is truncated' in out and 'ckpt_2.pt instead' in out
    (tmp_path / 'ckpt.pt').unlink()
    (tmp_path / 'ckpt_3.pt').unlink()
    assert checkpoint.read_newest(tmp_path)['step'] == 2
    for step in (1, 2):
        os.truncate(str(tmp_path / f'ckpt_{step}.pt'), 100)
    with pytest.raises(UserError, match='ckpt_2.pt is truncated'):
        checkpoint.read_newest(tmp_path)


def test_broken_files(tmp_path):
    """One sentence, whatever their content makes torch raise."""
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(path, dict(net_model=dict(w=torch.ones(2000))))
    good = path.read_bytes()
    for content, sentence in (
            (b'', 'truncated'), (good[:100], 'truncated'), (good[:-1], 'truncated'),
            (b'hello world\n', ''), (bytes(1000), ''),
            (good[:len(good) // 2] + bytes(len(good) // 2), ''),
            (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n',
             'a pointer of Git LFS.*: git lfs pull')):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f'^[^\n]*ckpt.pt is {sentence}[^\n]*$') as caught:
            checkpoint.read(tmp_path)
        assert caught.value.code == 2


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / 'ckpt.pt').mkdir()
    torch.save([1, 2], str(tmp_path / 'list.pt'))
    for name, sentence in (('', 'ckpt.pt .it is no regular file'), ('none', 'it does not exist'),
                           ('list.pt', 'list.pt holds a list, expected a checkpoint')):
        with pytest.raises(UserError, match=sentence):
            checkpoint.read(tmp_path / name)


@pytest.mark.parametrize('zipped', [True, False])
def test_code_in_a_file_does_not_run(tmp_path, zipped):
    target, path = tmp_path / 'ran', tmp_path / 'evil.pt'
    torch.save(dict(net_model=Call(os.mkdir, str(target))), str(path),
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match='refused'):
        checkpoint.read(path)
    assert not target.exists()
    torch.load(str(path), weights_only=False)
    assert target.exists()      # the payload is real


# State dicts

def test_digest():
    """Of names and values; their layout and order do not count."""
    state = dict(a=torch.arange(16.).view(1, 2, 2, 4), b=torch.ones(2))
    last = dict(b=state['b'], a=state['a'].to(memory_format=torch.channels_last))
    assert checkpoint.digest(state) == checkpoint.digest(last)
    for change in (dict(a=state['a'] + 1e-6), dict(c=torch.ones(2)), dict(b=torch.zeros(2))):
        assert checkpoint.digest(dict(state, **change)) != checkpoint.digest(state)


# What a run takes from its file

def trained():
    """The state of an optimiser of a matrix and a vector after a step."""
    layer = nn.Linear(3, 2)
    optim = adam(list(layer.parameters()), 1e-3, 0.)
    layer(torch.ones(1, 3)).sum().backward()
    optim.step()
    return optim.state_dict()


def restored(state):
    optim = adam(list(nn.Linear(3, 2).parameters()), 5e-3, 0.1)
    checkpoint.restore(dict(optim=state), dict(optim=optim), 'folder')
    return optim


def test_moments_of_other_strides_are_taken():
    """Fused kernels walk through memory: a moment must lie there as its parameter does."""
    state = trained()
    exp_avg = torch.arange(6.).view(3, 2).t()       # (2, 3), columns first
    state['state'][0]['exp_avg'] = exp_avg
    found = restored(state).state_dict()['state'][0]['exp_avg']
    assert torch.equal(found, exp_avg) and found.is_contiguous()


def moments(**values):
    """A change of the first parameter's moments in the state of an optimiser."""
    return lambda state: state['state'][0].update(values)


@pytest.mark.parametrize('change, reason', [
    (moments(exp_avg=torch.zeros(3)), r'exp_avg of parameter 0 is not float32 \(2, 3\)'),
    (moments(exp_avg=torch.zeros(2, 3).double()), 'exp_avg of parameter 0'),
    (moments(exp_avg_sq=torch.zeros(2, 3).to_sparse()), 'exp_avg_sq of parameter 0'),
    (moments(exp_avg='text'), 'exp_avg of parameter 0'),
    (moments(step=torch.ones(2)), r'step of parameter 0 is not float32 \(\)'),
    (moments(extra=torch.zeros(2, 3)), 'parameter 0'),
    (lambda state: state['state'][0].pop('exp_avg'), 'parameter 0 of 2 has the moments step'),
    (lambda state: state['state'].update({7: state['state'][0]}), 'parameter 7 of 2'),
    (lambda state: state['state'].update({0: 3}), ''), (lambda state: state.pop('state'), ''),
    (lambda state: state.update(state=3), ''), (lambda state: state.update(param_groups=[]), ''),
    (lambda state: state['param_groups'][0].update(params=[0]), '')])
def test_optimisers_that_do_not_fit(change, reason):
    state = trained()
    change(state)
    sentence = f'^optim of the checkpoint in folder does not fit this run .*{reason}'
    with pytest.raises(UserError, match=sentence):
        restored(state)


@pytest.mark.parametrize('network, reason', [
    (dict(weight=torch.zeros(2, 4), bias=torch.zeros(2)), r'weight is \(2, 4\), expected \(2, 3\)'),
    (dict(weight=torch.zeros(2, 3)), r'bias is absent, expected \(2,\)'),
    (dict(nn.Linear(3, 2).state_dict(), more='text'), 'more is str, expected absent'),
    (dict(weight='text', bias=1), r'weight is str, expected \(2, 3\)'), (3, '')])
def test_networks_that_do_not_fit(network, reason):
    sentence = f'net of the checkpoint in folder does not fit this run .{reason}'
    with pytest.raises(UserError, match=sentence):
        checkpoint.restore(dict(net=network), dict(net=nn.Linear(3, 2)), 'folder')
