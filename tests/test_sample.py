"""sample.py: the images that ddim_eval.py scores, in every form, and mistakes."""

import numpy as np
import pytest
from PIL import Image

from helpers import EVAL, assert_ran, assert_refused, command, fork_all, make_scorer
from wiring import random_unet, save_model

# the flags of a mistake, and a regular expression for the sentence
MISTAKES = {
    '--stride=1': '--output is missing',
    '--output=new.npz --label=3': '--label is 3 and the model in labels has 3 classes',
    '--logdir=plain --output=new.npz --label=0': '--label is 0 and the .* has 0 classes',
    '--output=text.png': '--output text.png cannot take the result'}


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """(folder, {name: results}) of models with 3 classes and without labels."""
    folder = tmp_path_factory.mktemp('sample')
    for name in ('labels', 'plain'):
        net = random_unet(conditional=name == 'labels', class_num=3)
        save_model(folder / name, net, T=4, time_scale=2)
    (folder / 'text.png').write_text('my notes')

    def sample(*words, script=('sample.py', '--num_images=20', '--batch_size=8'), **how):
        return command([*script, '--logdir=labels'], *words, cwd=str(folder), **how)

    jobs = {words: [sample(*words.split())] for words in MISTAKES}
    jobs['good'] = [
        sample('--output=all.npz'), sample('--output=new/all.png'),
        sample('--output=single', '--label=1', '--stride=2'),
        sample('--output=one.png', '--label=1'),
        sample('--output=plain.npz', '--logdir=plain'), sample('--output=two.npz', ranks=2),
        sample('--save_images=scored.npz', *make_scorer(folder), script=EVAL)]
    return folder, fork_all(jobs)


def arrays(file):
    with np.load(str(file)) as found:
        return [found[key] for key in found.files]


def test_images_and_labels_are_those_that_are_scored(ran):
    folder, results = ran
    assert_ran(results['good'])
    images, labels = arrays(folder / 'all.npz')
    assert images.shape == (20, 8, 8, 3) and set(labels.tolist()) == {0, 1, 2}
    for name in ('scored', 'two'):
        others, other_labels = arrays(folder / f'{name}.npz')
        assert np.array_equal(labels, other_labels)
        assert np.abs(images.astype(int) - others).max() <= 1       # rounding of other batches
    assert len(arrays(folder / 'plain.npz')) == 1
    assert (folder / 'single/labels.txt').read_text().split() == ['1'] * 20


@pytest.mark.parametrize('name, rows, columns', [('new/all', 3, 7), ('one', 4, 4)])
def test_grid(ran, name, rows, columns):
    """A row per class, or a square of one class; at least so many tiles."""
    width, height = Image.open(ran[0] / f'{name}.png').size
    assert rows * 66 < height < (rows + 2) * 66 and width > columns * 66


@pytest.mark.parametrize('words', list(MISTAKES))
def test_mistakes(ran, words):
    folder, results = ran
    assert_refused(results[words][0], MISTAKES[words])
    assert (folder / 'text.png').read_text() == 'my notes' and not (folder / 'new.npz').exists()
