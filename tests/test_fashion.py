"""Fashion-MNIST from its idx.gz files, written here: images, labels, sizes, damage."""

import gzip
import struct

import pytest
import torch

from runtime import idx_files
from runtime.cli import UserError
from runtime.data import make_dataset
from runtime.torchvision_cpu import torchvision


def idx(values, *shape):
    """An idx.gz file of bytes."""
    header = b'\0\0\x08' + bytes([len(shape)]) + struct.pack(f'>{len(shape)}I', *shape)
    return gzip.compress(header + bytes(values))


@pytest.fixture
def root(tmp_path):
    """Two images: a ramp 0..15 and one of a single grey; three for testing."""
    for split, n in (('train', 2), ('test', 3)):
        images, labels = idx_files.names(split)
        pixels = list(range(16)) + [100] * 16 * (n - 1)
        (tmp_path / images).write_bytes(idx(pixels, n, 4, 4))
        (tmp_path / labels).write_bytes(idx([9, 3, 0][:n], n))
    return tmp_path


def test_images_and_labels(root):
    train, test = (make_dataset('fashion_mnist', str(root), 4, split) for split in (True, False))
    assert (len(train), len(test), train.num_classes) == (2, 3, 10)
    assert train.labels.tolist() == [9, 3] and test.labels.tolist() == [9, 3, 0]
    assert train.images.shape == (2, 3, 4, 4) and train.images.dtype == torch.uint8
    assert train.images[0, 0].flatten().tolist() == list(range(16))
    assert torch.equal(train.images[:, 0], train.images[:, 2])      # grey
    assert train.flip is False      # all shoes point to the left


def test_any_size(root):
    """Halving a ramp with antialiasing averages 4 x 4 pixels with triangle weights."""
    half, = make_dataset('fashion_mnist', str(root), 2, True).images[:1]
    ramp = torch.arange(16.).view(1, 1, 4, 4)
    weights = torch.tensor([[3., 3, 1, 0], [0, 1, 3, 3]]) / 7     # of rows, and of columns
    expected = (weights @ ramp[0, 0] @ weights.t()).round()
    assert torch.equal(half[1].float(), expected)
    assert make_dataset('fashion_mnist', str(root), 12, True).images.shape == (2, 3, 12, 12)
    with pytest.raises(UserError, match='fashion_mnist, whose images have 4 x 4 .* at most 9459'):
        make_dataset('fashion_mnist', str(root), 9460, True)


@pytest.mark.parametrize('content', [
    b'', b'no gzip', idx([1, 2], 3), idx([1, 2, 3], 2), gzip.compress(b'\0\0'),
    gzip.compress(b'\0\0\x0d' + bytes([1]) + struct.pack('>I', 2) + b'ab'), idx([1, 2], 2)[:-9]])
def test_damaged_files(root, content):
    file = root / idx_files.names('train')[1]
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        make_dataset('fashion_mnist', str(root), 4, True)
    assert str(caught.value) == f'{file} is damaged or not an idx file of bytes; get it again'


def test_files_that_do_not_fit(root):
    images, labels = idx_files.names('train')
    (root / labels).write_bytes(idx([1, 2, 3], 3))
    with pytest.raises(UserError, match='has 2 train images of fashion_mnist and 3 labels'):
        make_dataset('fashion_mnist', str(root), 4, True)
    (root / labels).write_bytes((root / images).read_bytes())       # images where labels belong
    with pytest.raises(UserError, match='is damaged or not an idx file'):
        make_dataset('fashion_mnist', str(root), 4, True)
    (root / labels).unlink()
    with pytest.raises(UserError, match=f'lacks {labels}; put it beside'):
        make_dataset('fashion_mnist', str(root), 4, True)


def test_download_fails(tmp_path, monkeypatch):
    """Offline, one sentence names the files to put there."""
    monkeypatch.setattr(torchvision().datasets.FashionMNIST, 'mirrors', ['http://127.0.0.1:9/'])
    with pytest.raises(UserError, match='neither in --data_root .* put train-images-idx3-ubyte.gz'):
        make_dataset('fashion_mnist', str(tmp_path / 'none'), 16, True)
