"""tools/samples.py: a row per file, a column per starting noise."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT, launch
from runtime import pictures
from runtime.cli import UserError
from tools import samples


@pytest.fixture
def files(tmp_path):
    """40 images of 8 px whose grey is 10 + 5 times their index, of classes 0, 0, .., 1, 1, .."""
    grey = 10 + 5 * np.arange(40, dtype=np.uint8)
    images, labels = np.zeros((40, 8, 8, 3), np.uint8) + grey[:, None, None, None], [0, 1]
    np.savez(tmp_path / 'one.npz', images, np.repeat(labels, 20))
    np.savez(tmp_path / 'other.npz', 255 - images)
    np.savez(tmp_path / 'seed1.npz', images[:30], np.repeat(labels[::-1], 15))
    np.savez(tmp_path / 'large.npz', np.zeros((40, 16, 16, 3), np.uint8))
    np.savez(tmp_path / 'few.npz', images[:3])
    np.savez(tmp_path / 'float.npz', images / 255)
    np.savez(tmp_path / 'none.npz', images[:0])
    (tmp_path / 'text.npz').write_text('no samples')
    return tmp_path


def greys(path, rows, columns):
    """Grey values of a picture's tiles of 64 px with 2 px between them, from its lower right."""
    picture = np.asarray(Image.open(path).convert('L')).astype(int)
    at = [[-(i * 66 + 32 + 2 + pictures.MARGIN // 2) for i in reversed(range(count))]
          for count in (rows, columns)]
    return picture[np.ix_(*at)].tolist()


@pytest.mark.parametrize('first, second, columns', [
    ('one.npz', 'other.npz', [10, 110, 15, 115]),       # images 0, 20, 1, 21: the classes in turn
    ('other.npz', 'one.npz', [245, 240, 235, 230])])    # no labels: the first images
def test_picture(files, first, second, columns):
    launch([ROOT / 'tools/samples.py', f'A={first}', f'B, 1 step={second}', '--columns=4',
            '--output=new/rows.png'], cwd=files)
    assert greys(files / 'new/rows.png', 2, 4) == [columns, [255 - grey for grey in columns]]


@pytest.mark.parametrize('words, sentence', [
    ([], 'expected NAME=FILE'),
    (['A=one.npz', 'text.npz'], 'text.npz is not an npz of samples'),
    (['missing.npz'], 'missing.npz is not an npz of samples'),
    (['float.npz'], 'float.npz is not an npz of samples'),
    (['none.npz'], 'none.npz is not an npz of samples'),
    (['one.npz', 'large.npz'], 'large.npz has samples of shape (40, 16, 16, 3)'),
    (['one.npz', 'few.npz'], 'few.npz has samples of shape (3, 8, 8, 3)'),
    (['one.npz', 'seed1.npz'], 'seed1.npz has other labels than the first file'),
    (['one.npz', '--output=one.txt'], '--output one.txt cannot be written')])
def test_mistakes(files, monkeypatch, words, sentence):
    output = next((word[9:] for word in words if word.startswith('--output=')), 'rows.png')
    monkeypatch.setattr(samples, 'FLAGS', SimpleNamespace(output=output, title='', columns=16))
    monkeypatch.chdir(files)
    with pytest.raises(UserError, match=re.escape(sentence)):
        samples.main([word for word in words if not word.startswith('--')])
