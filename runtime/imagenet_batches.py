"""The official batch files of the downsampled ImageNet, pickled or npz, rewritten as one array."""

import pickle
import re
from pathlib import Path

import numpy as np

from runtime.cli import UserError, first_line
from runtime.image_cache import kept, new_array

NAMES = dict(train=r'train_data_batch_(\d+)(\.npz)?', test=r'val_data()(\.npz)?')


def find_batches(root, split):
    """{number: file} of the batch files of split 'train' or 'test' in `root`, in their order."""
    found = {}
    for file in sorted(Path(root).glob('*')):
        match = re.fullmatch(NAMES[split], file.name)
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
                        f'({first_line(error)}), expected data, uint8 (n, {3 * img_size ** 2}), '
                        f'and labels 1..1000 of downsampled ImageNet (--img_size {img_size}); '
                        f'fetch it again')
    return pixels, labels - 1       # the official files count from 1
