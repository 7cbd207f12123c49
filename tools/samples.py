"""Samples of several models as the rows of one picture.

  python tools/samples.py teacher=./logs/digits/64/samples_1.npz \\
      "PD, 1 step=./logs/digits/pd/1/samples_1.npz" --output ./samples.png
Words are NAME=FILE, files as `ddim_eval.py --save_images FILE` or study.py writes them. Samples of
one seed start from the same noise and label, so that a column shows what each model makes of it.
With labels in the files, the columns go through the classes in turn.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

import numpy as np      # noqa: E402
import torch    # noqa: E402
from absl import flags      # noqa: E402

from runtime import cli, pictures       # noqa: E402
from runtime.cli import UserError       # noqa: E402

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string('output', './samples.png', 'the picture')
    flags.DEFINE_string('title', '', 'words above the rows')
    flags.DEFINE_integer('columns', 16, 'images per row', lower_bound=1, upper_bound=256)


def main(words):
    if not words:
        raise UserError('expected NAME=FILE for every row, found none; as in: tools/samples.py '
                        'teacher=./samples.npz')
    names, rows, chosen = [], [], None
    for word in words:
        name, _, path = word.rpartition('=')
        images, labels = read(path)
        if chosen is None:
            chosen, shape, first = columns(len(images), labels), images.shape[1:], labels
        elif images.shape[1:] != shape or len(images) <= max(chosen):
            raise UserError(f'{path} has samples of shape {images.shape}, expected more than '
                            f'{max(chosen)} of shape {shape} as in the first file')
        given = labels is not None and first is not None
        if given and (labels[chosen] != first[chosen]).any():
            raise UserError(f'{path} has other labels than the first file; give samples of the '
                            f'same --seed')
        names.append(name or path)
        rows.append(torch.from_numpy(images[chosen]).permute(0, 3, 1, 2))
    try:
        pictures.save_labelled(FLAGS.output, FLAGS.title, rows, names)
    except (KeyError, OSError, ValueError) as error:
        raise UserError(f'--output {FLAGS.output} cannot be written ({error}); give a png')
    print(f'{FLAGS.output} shows them.')


def read(path):
    """(images uint8 (N, H, W, 3), labels (N,) or None) of a file of samples."""
    try:
        with np.load(str(Path(path).expanduser())) as file:
            images = file['arr_0']
            labels = file['arr_1'] if 'arr_1' in file.files else None
        if (images.dtype, images.shape[3:]) == (np.uint8, (3,)) and len(images):
            if labels is None or labels.shape == (len(images),):
                return images, labels
    except (KeyError, *pictures.UNREADABLE):
        pass
    raise UserError(f'{path} is not an npz of samples; give a file that ddim_eval.py --save_images '
                    f'wrote')


def columns(count, labels):
    """Indices of the images to show: the first ones, or those of class 0, 1, .. in turn."""
    order = np.arange(count) if labels is None else pictures.classes_in_turn(labels)
    return order[:FLAGS.columns]


if __name__ == '__main__':
    define_flags()
    cli.run(main, words=True)
