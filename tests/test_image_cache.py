"""Decoded folders: once per machine, again when a file changes, also where nothing can be kept."""

import os
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

from runtime import image_cache, image_files
from runtime.cli import UserError
from runtime.data import make_dataset

REDS = [0, 40, 80, 20, 60, 100]     # the classes a and b


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
        assert one.images.shape == (len(expected), 3, 8, 8)
        assert one.fingerprint == read(folder).fingerprint
        found.add(one.fingerprint)

    changed, moved = folder / 'a/0.bmp', folder / 'a/1.bmp'
    check(*REDS)
    os.utime(changed, (1, 1))
    check(*REDS)
    picture(changed, 254)
    os.utime(changed, (1, 1))       # as it was, and the size is as well
    check(254, 40, 80, 20, 60, 100)
    (folder / 'b/1.bmp').rename(moved)
    check(254, 20, 40, 80, 60, 100)
    monkeypatch.setattr(image_cache, 'VERSION', image_cache.VERSION + 1)
    check(254, 20, 40, 80, 60, 100)
    moved.unlink()
    check(254, 40, 80, 60, 100)
    assert len(found) == 6
    read(folder, 4)     # another size is another file
    read(folder)
    assert decode.call_count == 10 and len(kept(folder)) == 2


@pytest.mark.parametrize('size', [0, 5, 100, -1])
def test_a_kept_array_that_is_cut(folder, decode, size):
    reds(folder)
    file, = kept(folder)
    os.truncate(file, size % file.stat().st_size)
    assert reds(folder) == REDS and decode.call_count == 12 and kept(folder) == [file]


def test_another_spelling_of_the_folder_is_the_same(folder, decode, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / 'link').symlink_to(folder)
    names = ['photos', './photos', 'photos/', folder, str(folder), './link']
    assert len({read(name).fingerprint for name in names}) == 1
    assert decode.call_count == 6 and len(kept(folder)) == 1


def test_two_processes_decode_once(folder, decode, monkeypatch):
    """The second one starts while the finished array of the first is put in its place."""
    fsync, results = os.fsync, []

    def slow(number):
        if not results:
            results.append(threading.Thread(target=lambda: results.append(reds(folder))))
            results[0].start()
            time.sleep(.3)
        fsync(number)

    monkeypatch.setattr(os, 'fsync', slow)
    assert reds(folder) == REDS
    results[0].join()
    assert results[1:] == [REDS] and decode.call_count == 6 and len(kept(folder)) == 1


def test_one_holds_a_lock_at_a_time(tmp_path, capsys):
    """Though its file goes with every holder, and others wait for it."""
    inside, most = [], []

    def hold():
        for _ in range(30):
            with image_cache._locked(tmp_path, 'x'):
                inside.append(1)
                most.append(len(inside))
                time.sleep(.001)
                inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 120 and not list(tmp_path.iterdir())
    assert f'waiting for another process that makes {tmp_path}/x' in capsys.readouterr().out


def test_leftovers_of_killed_decodings(folder):
    """They go, but not while another process writes them, nor a user's own files."""
    reds(folder)
    file, = kept(folder)
    left = file.with_name(f'{file.name}.abcd_123.tmp')
    mine = [file.with_name(name) for name in ('notes.txt', 'x.npy.tmp')]
    for path in mine:
        path.write_text('')
    left.mkdir()
    (left / file.name).write_text('half')
    name = file.name.rsplit('.', 2)[0]
    with image_cache._locked(left.parent, name):
        reds(folder)
        assert kept(folder) == sorted([file, left, *mine, left.with_name(f'.{name}.lock')])
    reds(folder)
    assert kept(folder) == sorted([file, *mine])
    (folder / 'a/2.bmp').write_bytes(b'no image')
    with pytest.raises(UserError, match='2.bmp cannot be read'):
        reds(folder)
    assert kept(folder) == sorted(mine)     # nothing of a refused folder


def test_cache_that_cannot_be_written(folder, monkeypatch, capsys):
    file, other = folder.parent / 'file', folder.parent / 'other'
    file.write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(file))
    monkeypatch.setattr('tempfile.tempdir', str(other))
    other.mkdir()
    assert reds(folder) == REDS and len(list(other.rglob('*.npy'))) == 1
    assert f'note: decoded images cannot be kept in {file}/rdd (Not a' in capsys.readouterr().out
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr(Path, 'home', Mock(side_effect=RuntimeError('no home directory')))
    assert reds(folder) == REDS
    assert 'note: decoded images cannot be kept in a home folder' in capsys.readouterr().out
    monkeypatch.setattr('tempfile.tempdir', str(file))
    with pytest.raises(UserError, match='cannot be kept in .*/file.* XDG_CACHE_HOME') as caught:
        reds(folder)
    assert caught.value.code == 1
