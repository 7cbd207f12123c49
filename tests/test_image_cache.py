"""Decoded folders: once per machine, again when a file changes, also where nothing can be kept."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest

from helpers import picture
from runtime import image_cache, image_files
from runtime.cli import UserError
from runtime.data import make_dataset

REDS = [0, 40, 80, 20, 60, 100]     # the classes a and b


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six pictures in two classes; a cache of its own."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    for i in range(6):
        picture(tmp_path / f'photos/{"ab"[i % 2]}/{i}.bmp', 20 * i)
    return tmp_path / 'photos'


@pytest.fixture
def decode(monkeypatch):
    """The function that decodes an image in this process; it counts its calls."""
    counting = Mock(wraps=image_files.decode)
    monkeypatch.setattr(image_files, 'decode', counting)
    return counting


def read(folder, img_size=8):
    return make_dataset('folder', folder, img_size, True)


def reds(folder):
    return read(folder).images[:, 0, 0, 0].tolist()


def kept(folder):
    return sorted((folder.parent / 'cache/rdd').iterdir())


def test_decoded_once_and_again_after_a_change(folder, decode, monkeypatch):
    found = set()

    def check(*expected):
        """The folder is new, and every image of it is decoded, but only once."""
        decode.reset_mock()
        one, maps = read(folder), Path('/proc/self/maps')
        assert reds(folder) == list(expected) and decode.call_count == len(expected)
        file, = kept(folder)        # what is out of date is removed
        assert not maps.exists() or str(file) in maps.read_text()       # mapped into memory
        found.add(one.fingerprint)

    changed = folder / 'a/0.bmp'
    check(*REDS)
    picture(changed, 254)
    os.utime(changed, (1, 1))
    check(254, 40, 80, 20, 60, 100)
    picture(changed, 253)
    os.utime(changed, (1, 1))       # as it was, and the size is as well
    check(253, 40, 80, 20, 60, 100)
    (folder / 'b/1.bmp').rename(folder / 'a/1.bmp')
    check(253, 20, 40, 80, 60, 100)
    monkeypatch.setattr(image_cache, 'VERSION', image_cache.VERSION + 1)
    check(253, 20, 40, 80, 60, 100)
    changed.unlink()
    check(20, 40, 80, 60, 100)
    assert len(found) == 6 and read(folder).fingerprint in found
    read(folder, 4)     # another size is another file
    assert decode.call_count == 10 and len(kept(folder)) == 2


def test_records_of_any_length(folder):
    """Of 308 bytes, no multiple of the 8 of a label."""
    found = read(folder, 10)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1] and found.images.shape == (6, 3, 10, 10)


@pytest.mark.parametrize('size', [0, 5, 100, -1])
def test_a_kept_array_that_is_cut(folder, decode, size):
    reds(folder)
    file, = kept(folder)
    os.truncate(file, size % file.stat().st_size)
    assert reds(folder) == REDS and decode.call_count == 12 and kept(folder) == [file]


def test_another_spelling_of_the_folder_is_the_same(folder, decode, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / 'link').symlink_to(folder)
    assert len({read(name).fingerprint for name in ('photos', './photos/', folder, 'link')}) == 1
    assert decode.call_count == 6 and len(kept(folder)) == 1


def test_several_processes_decode_once(folder, decode, capsys):
    decode.side_effect = lambda *_: time.sleep(.05) or DEFAULT      # then what it wraps
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reds, [folder] * 4)) == [REDS] * 4
    assert decode.call_count == 6 and len(kept(folder)) == 1
    assert 'waiting for another process that makes' in capsys.readouterr().out


def test_one_holds_a_lock_at_a_time(tmp_path):
    """Though its file goes with every holder, and others wait for it."""
    inside, most = [], []

    def hold(number):
        with image_cache._locked(tmp_path, 'x'):
            inside.append(number)
            most.append(len(inside))
            time.sleep(.001)
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, range(120)))
    assert most == [1] * 120 and not list(tmp_path.iterdir())


def test_leftovers_of_killed_decodings(folder):
    """They go, but not while another process writes them, nor a user's own files."""
    reds(folder)
    file, = kept(folder)
    left = file.with_name(f'{file.name}.abcd_123.tmp')
    left.mkdir()
    (left / file.name).write_text('half')
    mine = file.with_name('x.npy.tmp')
    mine.write_text('')
    with image_cache._locked(left.parent, file.name.rsplit('.', 2)[0]):
        reds(folder)
        assert left.exists()
    reds(folder)
    assert kept(folder) == sorted([file, mine])
    (folder / 'a/2.bmp').write_bytes(b'no image')
    with pytest.raises(UserError, match='2.bmp cannot be read'):
        reds(folder)
    assert kept(folder) == [mine]       # nothing of a refused folder


def test_cache_that_cannot_be_written(folder, monkeypatch, capsys):
    """Another place is taken, and said; without any there is one sentence."""
    file, other = folder.parent / 'file', folder.parent / 'other'
    file.write_text('')
    other.mkdir()
    monkeypatch.setenv('XDG_CACHE_HOME', str(file))
    monkeypatch.setattr('tempfile.tempdir', str(other))
    assert reds(folder) == REDS and len(list(other.rglob('*.npy'))) == 1
    assert f'decoded images cannot be kept in {file}/rdd' in capsys.readouterr().out
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr(Path, 'home', Mock(side_effect=RuntimeError('no home directory')))
    assert reds(folder) == REDS
    assert 'cannot be kept in a home folder' in capsys.readouterr().out
    monkeypatch.setattr('tempfile.tempdir', str(file))
    with pytest.raises(UserError, match='cannot be kept in .*/file.* XDG_CACHE_HOME') as caught:
        reds(folder)
    assert caught.value.code == 1
