"""Fashion-MNIST's own files: idx.gz, arrays of bytes behind a header of big-endian integers."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from runtime.cli import UserError


def names(split):
    """Names of the files with the images and the labels of a split."""
    prefix = 'train' if split == 'train' else 't10k'
    return f'{prefix}-images-idx3-ubyte.gz', f'{prefix}-labels-idx1-ubyte.gz'


def find(root, split):
    """Paths of the two files of a split in `root`, or [] if they are not there.

    Raises:
        UserError: only one of them is there.
    """
    paths = [Path(root).expanduser() / name for name in names(split)]
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == 1:
        raise UserError(f'--data_root {root} lacks {missing[0].name}; put it beside '
                        f'{(set(paths) - set(missing)).pop().name}')
    return [] if missing else paths


def read(path, dimensions):
    """The array of a file: images (N, 28, 28), of 3 dimensions, or labels (N,), of 1; uint8.

    The header: two zero bytes, 8 (unsigned bytes), the number of dimensions, their lengths.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        shape = struct.unpack_from(f'>{dimensions}I', content, 4)
        start = 4 + 4 * dimensions
        if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + math.prod(shape):
            raise ValueError
    except (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error):
        raise UserError(f'{path} is damaged or not an idx file of bytes; get it again')
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())
