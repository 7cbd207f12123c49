"""The data sets with files of their own, which are not folders of images.

`digits`, `cifar10` and `fashion_mnist` are read whole: images (N, 1 or 3, H, W) with values in
0..255 and labels (N,) in 0..9. The batch files of ImageNet are rewritten once as one array.
"""

import contextlib
import gzip
import pickle
import re
from pathlib import Path

import numpy as np
import torch

from runtime import distributed
from runtime.cli import UserError, first_line
from runtime.image_cache import kept, new_array, one_at_a_time
from runtime.torchvision_cpu import torchvision

BATCHES = dict(train=r'train_data_batch_(\d+)(\.npz)?', test=r'val_data()(\.npz)?')


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
    """Data set `name` of torchvision, downloaded if it is not in `root`, by one process at a time.

    Its archives are `files`, which the user may put into `root`; it unpacks them into `folder`.
    """
    try:
        with contextlib.suppress(OSError):
            Path(root).mkdir(parents=True, exist_ok=True)
        with distributed.main_first(), one_at_a_time(Path(root), name):
            return getattr(torchvision().datasets, name)(root, train=split == 'train',
                                                         download=True)
    except Exception as error:      # also whatever damaged files raise
        reason = first_line(error).rstrip(':')
    there = [path for path in files + [folder] if (Path(root) / path).exists()]
    problem = f'in --data_root {root} is incomplete or damaged: {there[0]}' if there else (
        f'is not in --data_root {root}')
    raise UserError(f'{name} {problem}; nor could it be downloaded ({reason}); put '
                    f'{", ".join(files)} there', code=1)


# The official batch files of downsampled ImageNet, pickled or npz

def find_batches(root, split):
    """{number: file} of the batch files of split 'train' or 'test' in `root`, in their order."""
    found = {}
    for file in sorted(Path(root).glob('*')):
        match = re.fullmatch(BATCHES[split], file.name)
        if match and file.is_file():
            number = int(match[1] or 1)
            if number in found:
                raise UserError(f'{found[number]} and {file.name} are the same batch; keep one')
            found[number] = file
    return dict(sorted(found.items()))


def read_batches(root, split, img_size):
    """The images of the batch files in `root`, as arguments of `Images`; None without any."""
    files = find_batches(root, split)
    if not files:
        if find_batches(root, 'test' if split == 'train' else 'train'):
            raise UserError(f'--data_root {root} has batch files, but none of the {split} split; '
                            f'class folders would order the classes differently')
        return None

    def fill(file):     # one batch in memory at a time; all are checked before the array is made
        sizes = [len(_read_batch(path, img_size)[1]) for path in files.values()]
        array = new_array(file, sum(sizes), img_size)
        for path, part in zip(files.values(), np.split(array, np.cumsum(sizes))):
            pixels, part['label'] = _read_batch(path, img_size)
            part['pixels'] = pixels.reshape(-1, 3, img_size, img_size)

    images, labels, key = kept(root, split, img_size, files.values(), fill, beside=True)
    summary = f'{root}, {split}: {len(images)} images from {len(files)} batch files'
    missing = [str(i) for i in range(1, 11) if split == 'train' and i not in files]
    if missing:
        summary += f'; missing are those with the numbers {", ".join(missing)}'
    return dict(images=images, labels=labels, num_classes=1000, summary=summary, key=key)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, lists and plain values; refuses everything that could run code."""

    def find_class(self, module, name):
        if module.split('.')[0] == 'numpy' and name in ('_reconstruct', 'ndarray', 'dtype',
                                                        'scalar', '_frombuffer'):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'{module}.{name} is not allowed')


def _read_batch(path, img_size):
    """Pixels uint8 (n, 3 * H * W) and labels 0..999 (n,) of one official batch file."""
    try:
        with open(path, 'rb') as stream:
            batch = np.load(stream) if path.suffix == '.npz' else (
                _ArraysOnly(stream, encoding='latin1').load())
            pixels = np.asarray(batch['data'])
            labels = np.ravel(batch['labels']).astype(np.int64, casting='safe')
        fits = pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3 * img_size ** 2)
        if not fits or labels.min() < 1 or labels.max() > 1000:
            raise ValueError(f'data {pixels.dtype} {pixels.shape}, {len(labels)} labels from '
                             f'{labels.min()} to {labels.max()}')
    except Exception as error:      # a damaged pickle or zip file may raise anything
        raise UserError(f'{path} with {path.stat().st_size} bytes is no whole batch '
                        f'({first_line(error)}), expected data, uint8 (n, {3 * img_size ** 2}) by '
                        f'--img_size {img_size}, and labels 1..1000; fetch it again')
    return pixels, labels - 1       # the official files count from 1
