"""Decoded folders: once per machine, again when a file changes, also without a cache."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import BASE, command, fork_all
from runtime import image_cache
from runtime.data import make_dataset


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six pictures in two classes; a cache of its own."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    for i in range(6):
        path = tmp_path / f'photos/{"ab"[i % 2]}/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (20 * i, 0, 0)).save(path)
    return tmp_path / 'photos'


def reds(folder):
    return sorted(make_dataset('folder', folder, 8, True).images[:, 0, 0, 0].tolist())


def counted(monkeypatch):
    """A list that grows with every image that is decoded in this process."""
    decoded, decode = [], image_cache.decode_into
    monkeypatch.setattr(image_cache, 'decode_into', lambda pixels, dataset, workers: (
        decoded.extend(dataset.decode.paths), decode(pixels, dataset, workers)))
    return decoded


def test_decoded_once_and_again_after_a_change(folder, monkeypatch):
    decoded = counted(monkeypatch)
    for _ in range(2):
        assert reds(folder) == [0, 20, 40, 60, 80, 100]
    assert len(decoded) == 6
    Image.new('RGB', (8, 8), (255, 0, 0)).save(folder / 'a/0.png')
    assert reds(folder) == [20, 40, 60, 80, 100, 255] and len(decoded) == 12
    os.utime(folder / 'a/0.png', (1, 1))        # only the time of change
    reds(folder)
    assert len(decoded) == 18
    (folder / 'b/1.png').unlink()
    assert reds(folder) == [40, 60, 80, 100, 255] and len(decoded) == 23
    make_dataset('folder', folder, 4, True)     # another size is another file
    assert len(decoded) == 28 and reds(folder) and len(decoded) == 28


def test_damaged_or_missing_cache(folder, monkeypatch):
    reds(folder)
    (file,), decoded = image_cache.cache_folder().glob('*.pixels'), counted(monkeypatch)
    os.truncate(file, 10)
    assert reds(folder) == [0, 20, 40, 60, 80, 100] and len(decoded) == 6
    file.unlink()
    assert reds(folder) == [0, 20, 40, 60, 80, 100] and len(decoded) == 12
    assert sorted(f.suffix for f in image_cache.cache_folder().iterdir()) == ['.json', '.pixels']


def test_cache_that_cannot_be_written(folder, monkeypatch, capsys):
    (folder.parent / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder.parent / 'file'))
    assert reds(folder) == [0, 20, 40, 60, 80, 100]
    assert 'note: decoded images cannot be kept in' in capsys.readouterr().out


def test_training_does_not_write_into_the_cache(folder):
    images = make_dataset('folder', folder, 8, True).images
    images[0] = 7       # copy on write
    (file,) = image_cache.cache_folder().glob('*.pixels')
    assert 7 not in np.fromfile(file, np.uint8) and isinstance(images, torch.Tensor)


def test_two_processes_decode_once(folder, tmp_path):
    words = [*BASE, '--dataset=folder', f'--data_root={folder}', '--batch_size=2',
             '--total_steps=1']
    env = dict(XDG_CACHE_HOME=str(tmp_path / 'common'))
    (code, _, error), = fork_all(dict(it=[command(words, f'--logdir={tmp_path}/run', ranks=2,
                                                  env=env)]))['it']
    assert code == 0, error
    assert len(list((tmp_path / 'common/rdd').glob('*.pixels'))) == 1
