"""Images as files and pictures: what other tools and the eye get."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import Diffusion
from runtime import pictures
from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision

IMAGES = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 2, 2, 0])


def test_eight_bits():
    """uint8 / 127.5 - 1 comes back; values outside are clamped."""
    images = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pictures.to_uint8(images.float() / 127.5 - 1), images)
    assert pictures.to_uint8(torch.tensor([-3., 3.])).tolist() == [0, 255]


def test_npz_is_what_the_evaluator_of_guided_diffusion_reads(tmp_path):
    pictures.save_images(tmp_path / 'new/all.npz', IMAGES, LABELS)
    with np.load(tmp_path / 'new/all.npz') as file:
        assert file['arr_0'].dtype == np.uint8 and file['arr_0'].shape == (5, 4, 4, 3)
        assert np.array_equal(file['arr_0'][1, 2, 3], IMAGES[1, :, 2, 3])
        assert np.array_equal(file['arr_1'], LABELS)


def test_folder_is_what_pytorch_fid_reads(tmp_path):
    pictures.save_images(tmp_path / 'new/all', IMAGES, LABELS)
    files = sorted((tmp_path / 'new/all').glob('*.png'))
    assert [file.name for file in files] == [f'00000{i}.png' for i in range(5)]
    assert (tmp_path / 'new/all/labels.txt').read_text().split() == ['2', '0', '2', '2', '0']
    transforms = torchvision().transforms
    from pytorch_fid.fid_score import ImagePathDataset
    read = ImagePathDataset(files, transforms.PILToTensor())
    assert all(torch.equal(read[i], IMAGES[i]) for i in range(5))


def test_places_that_hold_something_else_are_refused(tmp_path):
    def check(name, *suffixes):
        pictures.check_place(tmp_path / name, '--flag', suffixes or ('.npz',))

    pictures.save_labelled(tmp_path / 'here/grid.png', 'x', [IMAGES])
    pictures.save_images(tmp_path / 'here/samples.npz', IMAGES)
    np.savez(str(tmp_path / 'here/mine.npz'), a=np.zeros(2))
    (tmp_path / 'here/text.png').write_text('')
    (tmp_path / 'empty').mkdir()
    for words in (('new',), ('empty',), ('deep/er/new.npz',), ('here/samples.npz',),
                  ('here/grid.png', '.npz', '.png')):
        check(*words)
    for words in (('here',), ('here/mine.npz',), ('new.png',), ('here/grid.png',),
                  ('here/text.png', '.png')):
        with pytest.raises(UserError, match='--flag .* is neither a new or empty folder'):
            check(*words)
    with pytest.raises(OSError):
        check('here/text.png/new.npz')


@pytest.mark.parametrize('name', ['all.npz', 'all'])
def test_a_kill_while_samples_are_written_leaves_what_was_there(tmp_path, monkeypatch, name):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, 'savez', killed)
    monkeypatch.setattr(Image.Image, 'save', killed)
    (tmp_path / 'all.npz').write_text('before')
    with pytest.raises(KeyboardInterrupt):
        pictures.save_images(tmp_path / name, IMAGES, LABELS)
    assert [p.name for p in tmp_path.iterdir()] == ['all.npz']
    assert (tmp_path / 'all.npz').read_text() == 'before'


def test_rows_by_class():
    rows, labels = pictures.rows_by_class(IMAGES, LABELS, 3)
    assert [len(row) for row in rows] == [2, 0, 3] and labels == ['0', '1', '2']
    assert torch.equal(rows[2], IMAGES[[0, 2, 3]])
    rows, labels = pictures.rows_by_class(IMAGES, LABELS, 1000)
    assert [len(row) for row in rows] == [2, 2, 1] and labels is None
    assert torch.equal(torch.cat(pictures.rows_by_class(IMAGES, None, 3)[0]), IMAGES)


def test_labelled_grid_shows_every_image_and_the_title(tmp_path):
    rows, labels = pictures.rows_by_class(IMAGES, LABELS, 3)
    for name, title in (('a', 'x'), ('b', 'NFE 4')):
        pictures.save_labelled(tmp_path / f'{name}.png', title, rows, labels)
    one, two = (np.asarray(Image.open(tmp_path / f'{name}.png')) for name in 'ab')
    assert one.shape == two.shape and not np.array_equal(one, two)
    size, last = 64 + pictures.PAD, IMAGES[3].permute(1, 2, 0).numpy()   # third of the last row
    left = next(i for i in range(one.shape[1]) if np.array_equal(
        one[pictures.MARGIN:pictures.MARGIN + 64:16, i:i + 64:16], IMAGES[1].permute(1, 2, 0)))
    top = pictures.MARGIN + 2 * size
    found = one[top:top + 64:16, left + 2 * size:left + 2 * size + 64:16]
    assert np.array_equal(found, last)


@pytest.mark.parametrize('stride', [1, 4])
def test_trajectory_ends_in_the_samples(tmp_path, stride):
    def network(z, t, y):
        return 1.5 * z / (1 + t[:, None, None, None])
    diffusion, x_T = Diffusion(32), torch.randn(2, 3, 8, 8)
    steps = pictures.trajectory(diffusion, network, x_T, stride)
    assert [t for t, _, _ in steps] == diffusion.times(stride)
    assert torch.equal(steps[0][1], x_T) and max(x.abs().max() for _, _, x in steps) <= 1
    assert torch.equal(steps[-1][1], diffusion.sample(network, x_T, stride))
    pictures.save_trajectory(tmp_path / 'a.png', 'title', steps)
    width, height = Image.open(tmp_path / 'a.png').size
    columns = 17 if stride == 1 else 9          # 33 are too many to look at
    assert columns * 66 < width < columns * 66 + 100 and 4 * 66 < height < 5 * 66
