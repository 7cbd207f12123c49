"""Statistics of a data set, in an npz file with a description of what was measured."""

import collections

import numpy as np

from runtime import cli, files
from runtime.cli import UserError

# entries of a file: kind of numpy's dtype, number of dimensions; older ones have mu and sigma alone
SCHEMA = dict(
    mu=('f', 1), sigma=('f', 2),    # (D,) and (D, D) of the features
    dataset=('U', 0), split=('U', 0),
    half=('i', 0),                  # 0: all images, 1 or 2: every second one
    num_images=('i', 0), img_size=('i', 0),
    network=('U', 0),               # name of the feature network
    fingerprint=('U', 0),           # of the content of the data set
    class_counts=('i', 1),          # (K,) images of each class that were measured
    features=('f', 2),              # (n, D) of at most 10,000 images, for precision and recall
    inception_mean=('f', 0), inception_std=('f', 0))        # Inception score of the set itself
KINDS = dict(f='floating-point numbers', i='whole numbers', U='text')
# what is in a file, None for what is not, and its path
Statistics = collections.namedtuple('Statistics', [*SCHEMA, 'path'], defaults=[None] * 12)


def save_statistics(path, statistics):
    fields = {key: value for key, value in statistics._asdict().items()
              if value is not None and key != 'path'}
    with files.replacing(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **fields)


def load_statistics(path):
    """The `Statistics` in an npz of ours, or in an older one that holds mu and sigma alone."""
    path = cli.find(path)
    if not path.is_file():
        raise UserError(f'there are no statistics {path}; make them with: {command_for(path)}')
    try:
        with np.load(str(path), allow_pickle=False) as file:
            fields = {key: file[key] for key in file.files}
        problem = problem_of(fields)
    except PermissionError:
        raise
    except Exception:       # what numpy raises depends on the bytes of the file
        problem = 'no readable arrays, it is damaged or not an npz file of mu and sigma'
    if problem:
        raise UserError(f'{path} holds {problem}; make it again with: {command_for(path)}')
    known = {key: value if value.ndim else value.item()
             for key, value in fields.items() if key in SCHEMA}
    known.update(mu=fields['mu'].astype(np.float64), sigma=fields['sigma'].astype(np.float64))
    return Statistics(**known, path=str(path))


def problem_of(fields):
    """What does not fit in a file of statistics, in words; None: all fits."""
    if 'mu' not in fields or 'sigma' not in fields:
        return f'{", ".join(fields) or "nothing"}, expected mu and sigma'
    for key in [key for key in SCHEMA if key in fields]:
        value, (kind, dimensions) = fields[key], SCHEMA[key]
        if value.dtype.kind != kind or value.ndim != dimensions:
            return (f'{key} of type {value.dtype} with {value.ndim} dimensions, expected '
                    f'{KINDS[kind]} with {dimensions}')
        if kind == 'f' and not np.isfinite(value).all():
            return f'values that are not finite in {key}'
        if kind == 'i' and (value < 0).any():
            return f'negative numbers in {key}'
    mu, sigma = fields['mu'].shape, fields['sigma'].shape
    if sigma != 2 * mu:
        return f'mu {mu} and sigma {sigma}, expected (D,) and (D, D)'
    sigma = fields['sigma'].astype(np.float64)
    near = 1e-3 * abs(sigma).max()      # some tools write float32
    if (sigma.diagonal() < 0).any() or not np.allclose(sigma, sigma.T, rtol=0, atol=near):
        return 'a sigma that is not symmetric or has a negative variance, and so is no covariance'
    width = fields['features'].shape[1:] if 'features' in fields else mu
    return None if width == mu else f'features of width {width[0]} and mu of {mu[0]}'


def command_for(path, statistics=None):
    """The command that writes statistics to `path`, of the same images as `statistics`."""
    images = dict(dataset='DATASET')
    if statistics and statistics.dataset:
        images = dict(dataset=statistics.dataset, split=statistics.split, half=statistics.half,
                      max_images=statistics.num_images)
    words = ' '.join(f'--{name} {value}' for name, value in images.items() if value is not None)
    return f'python score/get_npz.py {words} --output {path}'


def check_reference(statistics, network, img_size):
    """Refuse statistics with which images of this size, measured with `network`, do not compare.

    Older files name neither network nor size; then only the width of the features is compared.
    """
    for what, found, expected in (('the feature network', statistics.network, network.name),
                                  ('features of width', len(statistics.mu), network.dim),
                                  ('images of size', statistics.img_size, img_size)):
        if found not in (None, expected):
            raise UserError(f'{statistics.path} was made with {what} {found}, and is compared with '
                            f'{expected}; make it again with: '
                            f'{command_for(statistics.path, statistics)} --feature_network '
                            f'{network.spec} --img_size {img_size}')
