"""Decoded folders: once per machine, again when a file changes, also where nothing can be kept."""

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
    file, fingerprints = folder / 'a/0.bmp', set()

    def touched():
        os.utime(file, (1, 1))

    def replaced():     # by a file of the same size and time
        picture(file, 254)
        os.utime(file, (1, 1))

    def moved():
        (folder / 'b/1.bmp').rename(folder / 'a/1.bmp')

    def decoded_otherwise():
        monkeypatch.setattr(image_cache, 'VERSION', image_cache.VERSION + 1)

    for change, expected in [(list, REDS), (touched, REDS), (replaced, [*REDS[1:], 254]),
                             (moved, [*REDS[1:], 254]), (decoded_otherwise, [*REDS[1:], 254]),
                             ((folder / 'a/1.bmp').unlink, [*REDS[2:], 254])]:
        change()
        decoded.clear()
        for _ in range(2):
            assert reds(folder) == expected and len(decoded) == len(expected)
            fingerprints.add(make_dataset('folder', folder, 8, True).fingerprint)
        assert len(kept(folder)) == 1       # what is out of date is removed
    assert len(fingerprints) == 6
    reds(folder, 4)     # another size is another file
    assert len(decoded) == 10 and reds(folder) and len(decoded) == 10


@pytest.mark.parametrize('size', [0, 5, 100, -1])
def test_a_kept_array_that_is_cut(folder, decoded, size):
    reds(folder)
    file, = kept(folder)
    os.truncate(file, size % file.stat().st_size)
    assert reds(folder) == REDS and len(decoded) == 12 and kept(folder) == [file]


def test_leftovers_of_killed_decodings(folder):
    """They go after a day; a user's own files stay."""
    reds(folder)
    file, = kept(folder)
    old, new = [file.with_name(f'{file.name}.abcd_{i}.tmp') for i in (1, 2)]
    mine = [file.with_name(name) for name in ('notes.txt', 'x.npy.tmp')]
    for path in (old, new):
        path.mkdir()
        (path / file.name).write_text('')
    for path in mine:
        path.write_text('')
    os.utime(old, (1, 1))
    reds(folder)
    assert kept(folder) == sorted([file, new, *mine])
    (folder / 'a/2.bmp').write_bytes(b'no image')
    with pytest.raises(UserError, match='2.bmp cannot be read'):
        reds(folder)
    assert kept(folder) == sorted([new, *mine])     # nothing of a refused folder


def test_cache_that_cannot_be_written(folder, monkeypatch, capsys):
    def no_home():
        raise RuntimeError('Could not determine home directory.')

    file, other = folder.parent / 'file', folder.parent / 'other'
    file.write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(file))
    monkeypatch.setattr('tempfile.tempdir', str(other))
    other.mkdir()
    assert reds(folder, workers=2) == REDS and len(list(other.rglob('*.npy'))) == 1
    assert f'note: decoded images cannot be kept in {file}/rdd (Not a' in capsys.readouterr().out
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr(pathlib.Path, 'home', no_home)
    assert reds(folder) == REDS
    assert 'note: decoded images cannot be kept in a home folder' in capsys.readouterr().out
    monkeypatch.setattr('tempfile.tempdir', str(file))
    with pytest.raises(UserError, match='cannot be kept in .*/file.* XDG_CACHE_HOME') as caught:
        reds(folder)
    assert caught.value.code == 1


@pytest.mark.parametrize('workers', [0, 2])
def test_images_are_a_tensor_over_the_file(folder, workers):
    images = make_dataset('folder', folder, 8, True, workers).images
    assert images.shape == (6, 3, 8, 8) and images[:, 0, 0, 0].tolist() == [0, 40, 80, 20, 60, 100]
    maps = pathlib.Path('/proc/self/maps')
    assert not maps.exists() or str(kept(folder)[0]) in maps.read_text()
