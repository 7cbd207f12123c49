"""Images as files and pictures: what other tools and the eye get."""

import os
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from runtime import pictures
from runtime.cli import UserError

IMAGES = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 2, 2, 0])


def test_eight_bits():
    """uint8 / 127.5 - 1 comes back; values outside are clamped."""
    images = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pictures.to_uint8(images.float() / 127.5 - 1), images)
    assert pictures.to_uint8(torch.tensor([-3., 3., -.001, .001])).tolist() == [0, 255, 127, 128]


def test_npz_for_guided_diffusion_and_folder_for_pytorch_fid(tmp_path):
    for name in ('new/all.npz', 'new/all'):
        pictures.save_images(tmp_path / name, IMAGES, LABELS)
    with np.load(tmp_path / 'new/all.npz') as file:
        assert file['arr_0'].dtype == np.uint8
        assert np.array_equal(file['arr_0'], IMAGES.permute(0, 2, 3, 1))
        assert np.array_equal(file['arr_1'], LABELS)
    files = [tmp_path / f'new/all/00000{i}.png' for i in range(5)]
    found = [np.asarray(Image.open(file)) for file in files]
    assert np.array_equal(found, IMAGES.permute(0, 2, 3, 1))
    assert (tmp_path / 'new/all/labels.txt').read_text().split() == ['2', '0', '2', '2', '0']


def test_places_that_hold_something_else_are_refused(tmp_path, monkeypatch):
    pictures.save_labelled(tmp_path / 'here/grid.png', 'x', [IMAGES])
    pictures.save_images(tmp_path / 'here/samples.npz', IMAGES)
    np.savez(str(tmp_path / 'here/mine.npz'), a=np.zeros(2))
    (tmp_path / 'here/text.png').write_text('')
    (tmp_path / 'empty').mkdir()
    npz, both = ['.npz'], ['.npz', '.png']
    for name, suffixes in [('new', npz), ('empty', both), ('deep/er/new.npz', npz),
                           ('here/samples.npz', both), ('here/grid.png', both)]:
        pictures.check_place(tmp_path / name, '--flag', suffixes)
    for name, suffixes in [('here', both), ('here/mine.npz', both), ('new.png', npz),
                           ('here/text.png', both), ('new.jpg', both), ('.npz', both),
                           ('/dev/null', both)]:
        with pytest.raises(UserError, match='--flag .* cannot take the result'):
            pictures.check_place(tmp_path / name, '--flag', suffixes)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / 'empty')
        with pytest.raises(UserError, match='[.] cannot take .* no mount point or working dir'):
            pictures.check_place('.', '--flag', both)
    monkeypatch.setattr(os.path, 'ismount', lambda path: True)      # it cannot be replaced
    with pytest.raises(UserError, match='empty cannot take .* no mount point'):
        pictures.check_place(tmp_path / 'empty', '--flag', both)
    with pytest.raises(OSError):
        pictures.check_place(tmp_path / 'here/text.png/new.npz', '--flag')


@pytest.mark.parametrize('name', ['all.npz', 'all'])
def test_a_kill_while_samples_are_written_leaves_what_was_there(tmp_path, monkeypatch, name):
    killed = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(np, 'savez', killed)
    monkeypatch.setattr(Image.Image, 'save', killed)
    (tmp_path / 'all.npz').write_text('before')
    with pytest.raises(KeyboardInterrupt):
        pictures.save_images(tmp_path / name, IMAGES, LABELS)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('all.npz', 'before')]


def test_rows_by_class():
    rows, labels = pictures.rows_by_class(IMAGES, LABELS, 3)
    assert [len(row) for row in rows] == [2, 0, 3] and labels == ['0', '1', '2']
    assert torch.equal(rows[2], IMAGES[[0, 2, 3]])
    for square in (pictures.rows_by_class(IMAGES, LABELS, 1000),
                   pictures.rows_by_class(IMAGES, None, 3)):
        assert [len(row) for row in square[0]] == [2, 2, 1] and square[1] is None


def test_labelled_grid_shows_every_image_and_the_title(tmp_path):
    """Images of 4 px, 16 times as large, with 2 px between them and 12 px to the lower right."""
    for name, title in (('a', 'x'), ('b', 'NFE 4')):
        pictures.save_labelled(tmp_path / f'{name}.png', title, [IMAGES[:2], IMAGES[2:]], 'AB')
    one, two = (np.asarray(Image.open(tmp_path / f'{name}.png')) for name in 'ab')
    assert one.shape == two.shape and not np.array_equal(one, two)
    for number, (row, column) in enumerate([(2, 3), (2, 2), (1, 3), (1, 2), (1, 1)]):
        top, left = -12 - 66 * row, -12 - 66 * column
        tile = IMAGES[number].permute(1, 2, 0).numpy().repeat(16, 0).repeat(16, 1)
        assert np.array_equal(one[top:top + 64, left:left + 64], tile), number
