"""The official batch files of the downsampled ImageNet, rewritten once and memory-mapped.

The files (train_data_batch_1 to 10, val_data; pickled or npz) hold planes of red, green and blue
and labels from 1. They become one raw file of pixels and one npy file of labels in the same folder;
the pixels are memory-mapped, so that no process holds all images.
"""

import os
import pickle
from pathlib import Path

import numpy as np
import torch

from runtime import distributed
from runtime.cli import UserError


def find_batches(root, split):
    """The batch files of split 'train' or 'test' in the folder `root`, in their order, or []."""
    pattern = 'train_data_batch_*' if split == 'train' else 'val_data*'
    files = (f for f in Path(root).expanduser().glob(pattern) if f.suffix in ('', '.npz'))
    return sorted(files, key=lambda f: (len(f.stem), f.stem))


def open_batches(files, split, img_size):
    """The images of batch files; the first call rewrites them, on the first process.

    Args:
        files: as `find_batches` returns them. split: 'train' or 'test', part of the new names.
        img_size: height and width of the images.
    Returns:
        labels: (N,) int64 in 0..999, numpy.
        images: `MappedImages`; `images(i)` is image i.
    Raises:
        UserError: a file is damaged, or holds something else than images of this size.
    """
    pixels_file = files[0].with_name(f'{split}_{img_size}.pixels')
    labels_file = files[0].with_name(f'{split}_{img_size}.labels.npy')
    with distributed.main_first():
        if not labels_file.exists():
            _rewrite(files, pixels_file, labels_file, img_size)
    labels = np.load(labels_file)
    return labels, MappedImages(pixels_file, (len(labels), 3, img_size, img_size))


class MappedImages:
    """Images (N, 3, H, W) in a raw uint8 file, which each process maps for itself."""

    def __init__(self, file, shape):
        self.file, self.shape, self.map = file, shape, None

    def __getstate__(self):
        return dict(self.__dict__, map=None)

    def all(self):
        """All images, a uint8 tensor (N, 3, H, W)."""
        return torch.from_numpy(np.fromfile(self.file, np.uint8).reshape(self.shape))

    def __call__(self, i):
        """Image `i`, a uint8 tensor (3, H, W)."""
        if self.map is None:
            self.map = np.memmap(self.file, np.uint8, 'r', shape=self.shape)
        return torch.from_numpy(self.map[i].copy())


def _rewrite(files, pixels_file, labels_file, img_size):
    """Batch files to one raw file of pixels and an npy of labels, one batch in memory at a time."""
    # Two runs may do this at the same time: each writes its own file.
    all_labels, temporary = [], pixels_file.with_suffix(f'.{os.getpid()}.tmp')
    with open(temporary, 'wb') as out:
        for file in files:
            pixels, labels = _read_batch(file, img_size)
            np.ascontiguousarray(pixels).tofile(out)
            all_labels.append(labels)
    temporary.replace(pixels_file)
    with open(temporary, 'wb') as out:
        np.save(out, np.concatenate(all_labels))
    temporary.replace(labels_file)      # last: its presence says that the pixels are complete


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, lists and plain values; refuses everything that could run code."""

    def find_class(self, module, name):
        if module.split('.')[0] == 'numpy' and name in ('_reconstruct', 'ndarray', 'dtype',
                                                       'scalar', '_frombuffer'):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'{module}.{name} is not allowed')


def _read_batch(file, img_size):
    """(pixels uint8 (n, 3 * H * W), labels 0..999 (n,)) of one official batch file."""
    expected = (f'expected data, uint8 (n, {3 * img_size ** 2}), and labels 1..1000 of '
                f'downsampled ImageNet (--img_size {img_size})')
    try:
        batch = _load_batch(file)
    except Exception as error:      # a damaged pickle or zip file may raise anything
        raise UserError(f'{file} is truncated or not a batch ({file.stat().st_size} bytes, '
                        f'{type(error).__name__}): {expected}; fetch it again')
    if not {'data', 'labels'} <= set(batch):
        raise UserError(f'{file} holds {", ".join(map(str, batch)) or "nothing"}, {expected}')
    pixels, labels = np.asarray(batch['data']), np.ravel(batch['labels'])
    fits = pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3 * img_size ** 2)
    if not fits or labels.dtype.kind not in 'iu' or not (
            1 <= labels.min(initial=1) and labels.max(initial=1) <= 1000):
        raise UserError(f'{file} holds data, {pixels.dtype} {pixels.shape}, and {len(labels)} '
                        f'labels from {min(labels, default="none")} to '
                        f'{max(labels, default="none")}, {expected}')
    return pixels, labels.astype(np.int64) - 1      # the official files count from 1


def _load_batch(file):
    """The dict of arrays in a batch file, pickled or npz; runs no code from it."""
    if file.suffix == '.npz':
        with np.load(file) as batch:
            return {key: batch[key] for key in batch.files}
    with open(file, 'rb') as stream:
        return dict(_ArraysOnly(stream, encoding='latin1').load())
