"""Arrays of images that are made once, kept in npy files, and mapped into memory."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from runtime import distributed
from runtime.cli import UserError
from runtime.files import replacing

VERSION = 3     # count up when the same files become other pixels
UNFINISHED = f'*.{"[0-9a-f]" * 16}.{"[0-9a-f]" * 16}.npy.????????.tmp'


def kept(root, split, img_size, paths, fill, beside=False):
    """The images that `fill` makes of files, from an array that is kept until a file changes.

    Args:
        root, split, img_size: what the array holds; it takes the place of an older one. Another
            spelling of the same root, such as an absolute path, is the same array.
        fill: function that makes a `new_array` in the file that it is given.
        beside: keep it in `root` if possible.
    Returns:
        images uint8 (N, 3, H, W), read-only, labels int64 (N,), and the key of the files: it
        changes with the name, size or times of any of them, with `img_size` and VERSION.
    """
    digest = hashlib.sha256(f'{VERSION} {img_size}'.encode())
    for path in paths:
        digest.update(os.fsencode(os.path.relpath(path, root)))
        with contextlib.suppress(OSError):      # reported when the file is read
            stat = os.stat(path)
            digest.update(f'\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n'.encode())
    key = digest.hexdigest()[:16]
    place = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
    name = f'{split}_{img_size}.{place}'
    folders = [Path(root)] if beside else []
    try:
        folders.append(Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'rdd'))
    except RuntimeError:
        distributed.print0('note: decoded images cannot be kept in a home folder: there is none.')
    folders.append(Path(tempfile.gettempdir(), f'rdd-{os.getuid()}'))
    with distributed.main_first(of_machine=True):
        for folder in folders:
            try:
                return (*_open(folder, name, key, fill), key)
            except OSError as error:
                problem = f'decoded images cannot be kept in {folder} ({error.strerror})'
                distributed.print0(f'note: {problem}.')
    raise UserError(f'{problem}; set XDG_CACHE_HOME to a folder with room', code=1)


def _open(folder, name, key, fill):
    """(images, labels) of the array in `folder`, which is made if it is missing or cut."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(UNFINISHED):        # of processes that were killed
        with contextlib.suppress(OSError), _locked(folder, left.name.rsplit('.', 4)[0], wait=False):
            shutil.rmtree(left)
    file = folder / f'{name}.{key}.npy'
    records = _load(file)
    if records is None:
        with one_at_a_time(folder, name):
            records = _load(file)       # another process may have made it meanwhile
            if records is None:
                for old in folder.glob(f'{name}.*.npy'):        # of files that have changed
                    old.unlink(missing_ok=True)
                with replacing(file) as temporary:
                    fill(temporary)
                records = np.load(file, mmap_mode='r')
    with warnings.catch_warnings():     # torch warns of memory that is read-only
        warnings.simplefilter('ignore', UserWarning)
        # labels are copied: torch takes no array whose rows are no multiple of 8 bytes apart
        return torch.from_numpy(records['pixels']), torch.from_numpy(np.array(records['label']))


def _load(file):
    """The records of a file, mapped into memory; None if it is missing or cut."""
    try:
        return np.load(file, mmap_mode='r')
    except (OSError, EOFError, ValueError):
        return None


@contextlib.contextmanager
def one_at_a_time(folder, name):
    """Let one process at a time make `name` in a folder, unless its file system has no locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(_locked(folder, name))
        yield


@contextlib.contextmanager
def _locked(folder, name, wait=True):
    """Hold the lock of an array that is made; OSError if another process does and not `wait`."""
    path, held = folder / f'.{name}.lock', False
    while not held:
        with open(path, 'a') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                print(f'waiting for another process that makes {folder / name}', flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            # the process that had it removes the file, which another one may have made again
            with contextlib.suppress(FileNotFoundError):
                held = os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
            if held:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)


def new_array(file, length, img_size):
    """An array of records in `file`, to be filled: pixels, uint8 (3, H, W), and label, int64."""
    record = np.dtype([('pixels', np.uint8, (3, img_size, img_size)), ('label', np.int64)])
    array = np.lib.format.open_memmap(file, 'w+', record, (length,))
    if hasattr(os, 'posix_fallocate'):
        # a full disk must fail here: later, writing to the map would end the process
        with open(file, 'rb+') as stream:
            os.posix_fallocate(stream.fileno(), 0, os.path.getsize(file))
    return array
