"""Statistics of a data set in an npz file that says what it holds."""

import os
import zipfile
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from runtime import cli
from runtime.cli import UserError


class Statistics(NamedTuple):
    """Mean and covariance of features, and what was measured; None: the file does not say."""
    mu: np.ndarray                          # (D,) float64
    sigma: np.ndarray                       # (D, D) float64
    dataset: Optional[str] = None
    split: Optional[str] = None
    half: Optional[int] = None              # 0: all images, 1 or 2: every second one
    num_images: Optional[int] = None
    img_size: Optional[int] = None
    network: Optional[str] = None           # identity of the feature network
    inception_mean: Optional[float] = None      # Inception score of the set itself
    inception_std: Optional[float] = None
    path: Optional[str] = None

    def origin(self):
        """What was measured, as a dict without the results: equal for equal runs."""
        return dict(dataset=self.dataset, split=self.split, half=self.half,
                    num_images=self.num_images, img_size=self.img_size, network=self.network)


def check_writable(path):
    """Make the folder of `path` and try to write there, before hours are spent on measuring.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    probe = path.with_name(path.name + '.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror}); choose another --output')
    if path.is_dir():
        raise UserError(f'{path} is a folder, expected a file to write; choose another --output')


def save_statistics(path, statistics):
    """Write `Statistics` to `path` (npz): to a temporary file first, which is then renamed."""
    path = Path(path)
    fields = {key: value for key, value in statistics._asdict().items()
              if value is not None and key != 'path'}
    temporary = path.with_name(path.name + '.tmp')
    with open(temporary, 'wb') as file:
        np.savez(file, **fields)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_statistics(path):
    """The `Statistics` in an npz of ours, or in an older one that holds mu and sigma alone.

    Args:
        path: looked up in the working directory, then in the repository root.

    Raises:
        UserError: the file is missing, of another kind, or its arrays cannot be statistics.
    """
    path = cli.find(path)
    if not path.is_file():
        raise UserError(f'there are no statistics {path}; make them with: {command_for(path)}')
    try:
        with np.load(str(path), allow_pickle=False) as file:
            fields = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError,
            zipfile.BadZipFile):
        raise UserError(f'{path} is damaged or not an npz file of mu and sigma; make it again '
                        f'with: {command_for(path)}')
    check_arrays(fields, path)
    known = {key: value.item() if value.ndim == 0 else value.astype(np.float64)
             for key, value in fields.items() if key in Statistics._fields}
    return Statistics(**dict(known, path=str(path)))


def check_arrays(fields, path):
    """Refuse mu and sigma that are missing, of the wrong shape or not finite."""
    again = f'make it again with: {command_for(path)}'
    if 'mu' not in fields or 'sigma' not in fields:
        raise UserError(f'{path} holds {", ".join(fields) or "nothing"}, expected mu and sigma; '
                        f'{again}')
    mu, sigma = fields['mu'], fields['sigma']
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise UserError(f'{path} holds mu {mu.shape} and sigma {sigma.shape}, expected (D,) and '
                        f'(D, D); {again}')
    if mu.dtype.kind != 'f' or sigma.dtype.kind != 'f' or not (
            np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f'{path} holds values that are not finite; {again}')


def command_for(path, network=None):
    """The command that makes the statistics `<dataset>.<split>[.half<n>].npz`."""
    words = Path(path).name.split('.')
    dataset, split = words[:2] if len(words) > 2 and words[1] in ('train', 'test') else (
        'DATASET', 'train')
    command = f'python score/get_npz.py --dataset {dataset}'
    if split == 'test':
        command += ' --split test'
    if words[2:3] in (['half1'], ['half2']):
        command += f' --half {words[2][-1]}'
    return command + (f' --feature_network {network.spec}' if network else '')


def check_network(statistics, network):
    """Refuse to compare with statistics that another feature network made.

    Older files do not name theirs; for these only the width of the features is compared.

    Raises:
        UserError: another network, or another width.
    """
    dim, path = len(statistics.mu), statistics.path or 'the statistics'
    again = f'make them again with: {command_for(path, network)}'
    if statistics.network is not None and statistics.network != network.name:
        raise UserError(f'{path} was made with the feature network {statistics.network}, the '
                        f'samples are scored with {network.name}; {again}')
    if dim != network.dim:
        raise UserError(f'{path} holds features of width {dim}, those of {network.name} have '
                        f'{network.dim}; {again}')
