"""The small data sets, which are read whole.

Each function returns images (N, 1 or 3, H, W) with values in 0..255 and labels (N,) in 0..9.
"""

import gzip
from pathlib import Path

import numpy as np
import torch

from runtime import distributed
from runtime.cli import UserError, first_line
from runtime.torchvision_cpu import torchvision


def digits(root, split):
    """scikit-learn's 1797 handwritten digits (8x8, 17 grey levels); every sixth is for testing."""
    from sklearn.datasets import load_digits
    data = load_digits()
    chosen = (torch.arange(len(data.target)) % 6 == 5) == (split == 'test')
    images = torch.from_numpy(data.images)[chosen].float() * (255 / 16)
    return images[:, None], torch.from_numpy(data.target)[chosen]


def cifar10(root, split):
    """CIFAR-10 (Krizhevsky 2009)."""
    files = ['cifar-10-python.tar.gz']
    data = _torchvision_set('CIFAR10', root, split, files, 'cifar-10-batches-py')
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), data.targets


def fashion_mnist(root, split):
    """Fashion-MNIST (Xiao et al. 2017), 28 x 28: its idx.gz files in `root`, or torchvision's."""
    prefix = 'train' if split == 'train' else 't10k'
    names = [f'{prefix}-images-idx3-ubyte.gz', f'{prefix}-labels-idx1-ubyte.gz']
    files = [Path(root) / name for name in names]
    if not all(file.is_file() for file in files):
        data = _torchvision_set('FashionMNIST', root, split, names, 'FashionMNIST/raw')
        return data.data[:, None], data.targets
    return _read_idx(files[0], 3)[:, None], _read_idx(files[1], 1)


def _read_idx(path, dimensions):
    """The uint8 array in an idx.gz file: images (N, H, W), or labels (N,)."""
    try:
        content = gzip.decompress(path.read_bytes())
        # big-endian numbers: 2048 + dimensions, and the lengths
        kind, *shape = np.frombuffer(content, '>u4', 1 + dimensions).tolist()
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
        if kind != 2048 + dimensions or not array.size:
            raise ValueError
    except Exception:       # the bytes of a damaged file decide what is raised
        raise UserError(f'{path} is damaged or not an idx file of bytes; get it again')
    return torch.from_numpy(array.copy())


def _torchvision_set(name, root, split, files, folder):
    """Data set `name` of torchvision, downloaded once, by the first process.

    Its archives are `files`, which the user may put into `root`; it unpacks them into `folder`.
    """
    try:
        with distributed.main_first():
            return getattr(torchvision().datasets, name)(root, train=split == 'train',
                                                         download=distributed.is_main())
    except Exception as error:      # also whatever damaged files raise
        reason = first_line(error).rstrip(':')
    there = [path for path in files + [folder] if (Path(root) / path).exists()]
    problem = f'in --data_root {root} is incomplete or damaged: {there[0]}' if there else (
        f'is not in --data_root {root}')
    raise UserError(f'{name} {problem}; nor could it be downloaded ({reason}); put '
                    f'{", ".join(files)} there', code=1)
