"""Decoded folders: once per machine, again when a file changes, also where nothing can be kept."""

import fcntl
import os
import pathlib

import pytest
from PIL import Image

from runtime import image_cache, image_files
from runtime.cli import UserError
from runtime.data import make_dataset

REDS = [0, 20, 40, 60, 80, 100]


def picture(path, red):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8), (red, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six pictures in two classes; a cache of its own."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    for i in range(6):
        picture(tmp_path / f'photos/{"ab"[i % 2]}/{i}.bmp', 20 * i)
    return tmp_path / 'photos'


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows with every image that is decoded in this process."""
    seen, decode = [], image_files.decode
    monkeypatch.setattr(image_files, 'decode', lambda path, img_size: (
        seen.append(path), decode(path, img_size))[1])
    return seen


def reds(folder, img_size=8, workers=0):
    images = make_dataset('folder', folder, img_size, True, workers).images
    return sorted(images[:, 0, 0, 0].tolist())


def kept(folder):
    return sorted((folder.parent / 'cache/rdd').iterdir())


def test_decoded_once_and_again_after_a_change(folder, decoded, monkeypatch):
    for _ in range(2):
        assert reds(folder) == REDS
    assert len(decoded) == 6
    picture(folder / 'a/0.bmp', 255)
    assert reds(folder) == [20, 40, 60, 80, 100, 255] and len(decoded) == 12
    os.utime(folder / 'a/0.bmp', (1, 1))        # only the time of change
    reds(folder)
    assert len(decoded) == 18
    picture(folder / 'a/0.bmp', 254)       # a file of the same size and time
    os.utime(folder / 'a/0.bmp', (1, 1))
    assert reds(folder) == [20, 40, 60, 80, 100, 254] and len(decoded) == 24
    (folder / 'b/1.bmp').unlink()
    assert reds(folder) == [40, 60, 80, 100, 254] and len(decoded) == 29
    monkeypatch.setattr(image_cache, 'VERSION', image_cache.VERSION + 1)
    reds(folder)
    assert len(decoded) == 34 and len(kept(folder)) == 1       # what is out of date is removed
    reds(folder, 4)     # another size is another file
    assert len(decoded) == 39 and reds(folder) and len(decoded) == 39


def test_fingerprint(folder):
    """That of decoded images changes with a file or a label, not with the start."""
    def fingerprint():
        return make_dataset('folder', folder, 8, True).fingerprint

    found = [fingerprint(), fingerprint()]
    assert found[0] == found[1]
    picture(folder / 'a/0.bmp', 255)
    found.append(fingerprint())
    (folder / 'b/1.bmp').rename(folder / 'a/1.bmp')
    found.append(fingerprint())
    assert len(set(found)) == 3


@pytest.mark.parametrize('size', [0, 5, 100, -1])
def test_a_kept_array_that_is_cut(folder, decoded, size):
    reds(folder)
    file, = kept(folder)
    os.truncate(file, size % file.stat().st_size)
    assert reds(folder) == REDS and len(decoded) == 12 and kept(folder) == [file]


def test_leftovers_of_killed_decodings(folder):
    reds(folder)
    file, = kept(folder)
    left = [file.with_name(name) for name in (
        '0123456789abcdef.0123456789abcdef.npy.abcd_123.tmp', '0123456789abcdef.pixelsabcd_123',
        'train_64.123.tmp')]
    mine = [file.with_name(name) for name in ('notes.txt', 'x.npy.tmp', 'train_64.pixels')]
    for path in left + mine:
        path.write_text('')
    with open(left[0]) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)      # another process is writing it
        reds(folder)
        assert kept(folder) == sorted([file, left[0], *mine])
    reds(folder)
    assert kept(folder) == sorted([file, *mine])


def test_a_refused_folder_leaves_nothing(folder):
    (folder / 'a/2.bmp').write_bytes(b'no image')
    with pytest.raises(UserError, match='2.bmp cannot be read'):
        reds(folder)
    assert kept(folder) == []


def test_cache_that_cannot_be_written(folder, monkeypatch, capsys):
    file, other = folder.parent / 'file', folder.parent / 'other'
    file.write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(file))
    monkeypatch.setattr('tempfile.tempdir', str(other))
    other.mkdir()
    assert reds(folder, workers=2) == REDS and len(list(other.rglob('*.npy'))) == 1
    assert f'note: decoded images cannot be kept in {file}/rdd (Not a' in capsys.readouterr().out
    monkeypatch.setattr('tempfile.tempdir', str(file))
    with pytest.raises(UserError, match='cannot be kept in .*/file.* XDG_CACHE_HOME') as caught:
        reds(folder)
    assert caught.value.code == 1


def test_a_user_without_a_home_folder(folder, monkeypatch, capsys):
    def home():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr('tempfile.tempdir', str(folder.parent))
    monkeypatch.setattr(pathlib.Path, 'home', home)
    assert reds(folder) == REDS
    assert 'note: decoded images cannot be kept in a home folder' in capsys.readouterr().out


@pytest.mark.parametrize('workers', [0, 2])
def test_images_are_a_tensor_over_the_file(folder, workers):
    images = make_dataset('folder', folder, 8, True, workers).images
    assert images.shape == (6, 3, 8, 8) and images[:, 0, 0, 0].tolist() == [0, 40, 80, 20, 60, 100]
    maps = pathlib.Path('/proc/self/maps')
    assert not maps.exists() or str(kept(folder)[0]) in maps.read_text()
