"""Frechet distance between two files of statistics, such as the two halves of a data set.

  python score/compare.py stats/cifar10.train.half1.npz stats/cifar10.train.half2.npz
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

from runtime import cli     # noqa: E402
from runtime.cli import UserError       # noqa: E402
from score.metrics import frechet_distance      # noqa: E402
from score.reference import load_statistics     # noqa: E402


def compare(path1, path2):
    """(Frechet distance between two files of statistics, the `Statistics` in them).

    Raises:
        UserError: a file cannot be read, or they differ in feature network or size of the images.
    """
    first, second = load_statistics(path1), load_statistics(path2)
    for name in ('network', 'img_size'):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            raise UserError(f'{path1} was made with {name} {one} and {path2} with {other}; make '
                            f'both with the same')
    return frechet_distance(first.mu, first.sigma, second.mu, second.sigma), first, second


def main(paths):
    if len(paths) != 2:
        raise UserError(f'expected two files of statistics, found {len(paths)}; '
                        f'as in: compare.py A.npz B.npz')
    distance, *both = compare(*paths)
    for stats in both:
        print(f'{stats.path}: {stats.dataset}, {stats.split}, {stats.num_images} images')
    print(f'Frechet distance {distance:.4f}')


if __name__ == '__main__':
    cli.run(main, words=True)
