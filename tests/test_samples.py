"""tools/samples.py: a row per file, a column per starting noise."""

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT, launch, start


@pytest.fixture
def files(tmp_path):
    """40 images of 8 px whose grey is 5 times their index, of the classes 0, 0, .., 1, 1, .."""
    grey = 5 * np.arange(40, dtype=np.uint8)
    images = np.zeros((40, 8, 8, 3), np.uint8) + grey[:, None, None, None]
    np.savez(tmp_path / 'one.npz', images, np.arange(40) // 20)
    np.savez(tmp_path / 'other.npz', 255 - images)
    np.savez(tmp_path / 'large.npz', np.zeros((40, 16, 16, 3), np.uint8))
    np.savez(tmp_path / 'few.npz', images[:3])
    (tmp_path / 'text.npz').write_text('no samples')
    return tmp_path


def test_picture(files):
    """Columns go through the classes of the first file: images 0, 20, 1, 21 of both files."""
    launch([ROOT / 'tools/samples.py', 'A=one.npz', 'B, 1 step=other.npz', 'other.npz',
            '--columns=4', '--output=new/rows.png'], cwd=files)
    picture = np.asarray(Image.open(files / 'new/rows.png').convert('L')).astype(int)
    height, width = picture.shape
    assert height > 3 * 64 and width > 4 * 64
    for grey in (0, 100, 5, 105):       # a column has the grey of its image and its opposite
        columns = (picture == grey).sum(0) >= 64
        assert columns.sum() >= 64
        assert ((picture[:, columns] == 255 - grey).sum(0) >= 2 * 64).sum() >= 64


@pytest.mark.parametrize('words, sentence', [
    ([], 'expected NAME=FILE'),
    (['A=one.npz', 'text.npz'], 'text.npz is not an npz of samples'),
    (['missing.npz'], 'missing.npz is not an npz of samples'),
    (['one.npz', 'large.npz'], 'large.npz has samples of shape (40, 16, 16, 3)'),
    (['one.npz', 'few.npz'], 'few.npz has samples of shape (3, 8, 8, 3)'),
    (['one.npz', '--output=one.txt'], '--output one.txt cannot be written')])
def test_mistakes(files, words, sentence):
    done = start([ROOT / 'tools/samples.py', *words], files)
    assert done.returncode not in (0, -9) and 'Traceback' not in done.stderr
    assert sentence in done.stderr
