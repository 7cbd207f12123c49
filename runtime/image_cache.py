"""Decoded images of a folder, kept in a file that all processes of a machine map into memory."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from runtime import distributed
from runtime.loader import load
from runtime.log import progress


def cache_folder():
    """Where decoded images are kept: $XDG_CACHE_HOME/rdd or ~/.cache/rdd; may be deleted."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'rdd'


def decoded(dataset, num_workers):
    """All images of a set of image files, uint8 (N, 3, H, W), decoded once per machine.

    The first process of a machine decodes into a file, the others map it. The file is used again
    as long as paths, sizes and times of change of all images are the same. If it cannot be
    written, every process decodes for itself.
    """
    paths, shape = dataset.decode.paths, (len(dataset), 3, dataset.img_size, dataset.img_size)
    name = hashlib.sha256(f'{os.path.commonpath(paths)} {shape}'.encode()).hexdigest()[:16]
    file = cache_folder() / f'{name}.pixels'
    key = fingerprint(paths, dataset.img_size)
    with distributed.main_of_machine_first():
        try:
            if not is_current(file, key):
                write(file, key, dataset, shape, num_workers)
            return torch.from_numpy(np.memmap(file, np.uint8, 'c', shape=shape))
        except OSError as error:
            distributed.print0(f'note: decoded images cannot be kept in {file.parent} '
                               f'({error.strerror}); every process decodes them for itself.')
    images = torch.empty(shape, dtype=torch.uint8)
    decode_into(images.numpy(), dataset, num_workers)
    return images


def fingerprint(paths, img_size):
    """Changes with any path, size or time of change of the files, and with `img_size`."""
    digest = hashlib.sha256(str(img_size).encode())
    for path in paths:
        stat = os.stat(path)
        digest.update(f'{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n'.encode())
    return digest.hexdigest()


def is_current(file, key):
    """Whether `file` is complete and of these images."""
    try:
        said = json.loads(file.with_suffix('.json').read_text())
        return said == dict(key=key, bytes=file.stat().st_size)
    except (OSError, ValueError):
        return False


def write(file, key, dataset, shape, num_workers):
    """Decode into a temporary file, then rename; the key, written last, makes it valid."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        file.with_suffix('.json').unlink()      # of other images
    handle, temporary = tempfile.mkstemp(dir=str(file.parent), prefix=file.name)
    try:
        # a full disk must fail here: later, writing to the map would end the process
        with os.fdopen(handle, 'wb') as space:
            reserve = getattr(os, 'posix_fallocate', lambda file, _, size: os.truncate(file, size))
            reserve(space.fileno(), 0, int(np.prod(shape)))
        pixels = np.memmap(temporary, np.uint8, 'r+', shape=shape)
        decode_into(pixels, dataset, num_workers)
        pixels.flush()
        os.replace(temporary, file)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    description = file.with_suffix(f'.{os.getpid()}')
    description.write_text(json.dumps(dict(key=key, bytes=int(np.prod(shape)))))
    description.replace(file.with_suffix('.json'))


def decode_into(pixels, dataset, num_workers):
    """Fill `pixels`, a uint8 array (N, 3, H, W), from the files."""
    with progress(len(dataset), f'decode {dataset.name}', unit='img') as bar:
        first = 0
        for images, _ in load(dataset, num_workers, batch_size=256):
            pixels[first:first + len(images)] = images.numpy()
            first += len(images)
            bar.update(len(images))
