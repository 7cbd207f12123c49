"""Digits, Fashion-MNIST and CIFAR-10 from files written here, and batch files of ImageNet."""

import gzip
import io
import pickle
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from helpers import Call
from runtime.cli import UserError
from runtime.data import make_dataset
from runtime.torchvision_cpu import torchvision


def test_digits():
    """Every sixth is for testing; test_wiring.py looks at the pixels."""
    data = load_digits()
    for train, length in ((True, 1498), (False, 299)):
        found = make_dataset('digits', 'nowhere', 8, train)
        chosen = (np.arange(1797) % 6 != 5) == train
        assert found.labels.tolist() == data.target[chosen].tolist() and len(found) == length
        assert found.flip is False      # a mirrored 3 is no digit
    assert found.summary == 'digits, test: 299 images of 10 classes'


# Fashion-MNIST

def idx(values, *shape, kind=8):
    """An idx.gz file; kind 8: of bytes."""
    header = bytes([0, 0, kind, len(shape)]) + struct.pack(f'>{len(shape)}I', *shape)
    return gzip.compress(header + bytes(values), mtime=0)


@pytest.fixture
def fashion(tmp_path):
    """Two images: a ramp 0..15 and one of a single grey; three for testing."""
    for prefix, n in (('train', 2), ('t10k', 3)):
        pixels = list(range(16)) + [100] * 16 * (n - 1)
        (tmp_path / f'{prefix}-images-idx3-ubyte.gz').write_bytes(idx(pixels, n, 4, 4))
        (tmp_path / f'{prefix}-labels-idx1-ubyte.gz').write_bytes(idx([9, 3, 0][:n], n))
    return tmp_path


def test_fashion_mnist(fashion):
    train, test = (make_dataset('fashion_mnist', fashion, 4, train) for train in (True, False))
    assert train.labels.tolist() == [9, 3] and test.labels.tolist() == [9, 3, 0]
    assert train.images[0].flatten(1).tolist() == [list(range(16))] * 3
    assert train.flip is False      # all shoes point to the left
    # halving a ramp with antialiasing averages 4 x 4 pixels with triangle weights
    half, = make_dataset('fashion_mnist', fashion, 2, True).images[:1]
    weights = torch.tensor([[3., 3, 1, 0], [0, 1, 3, 3]]) / 7     # of rows, and of columns
    expected = weights @ torch.arange(16.).view(4, 4) @ weights.t()
    assert half.tolist() == [expected.round().tolist()] * 3
    with pytest.raises(UserError, match='--img_size 26755 is too large .* have 4 x 4 pixels'):
        make_dataset('fashion_mnist', fashion, 26755, True)


@pytest.mark.parametrize('labels', [
    b'', b'no gzip', idx([1, 2], 3), idx([], 0), idx(range(32), 2, 4, 4), idx([1, 2], 2)[:-9],
    idx([1, 2], 2, kind=13)])
def test_damaged_fashion_mnist(fashion, labels):
    (fashion / 'train-labels-idx1-ubyte.gz').write_bytes(labels)
    with pytest.raises(UserError, match='train-labels-idx1-ubyte.gz is damaged or not an idx file'):
        make_dataset('fashion_mnist', fashion, 4, True)


# What torchvision downloads

@pytest.mark.parametrize('name, kind, file', [
    ('fashion_mnist', 'FashionMNIST', 'train-images-idx3-ubyte.gz'),
    ('cifar10', 'CIFAR10', 'cifar-10-python.tar.gz')])
def test_download_fails(tmp_path, monkeypatch, name, kind, file):
    """One sentence names the files to put there; a damaged one is not called missing."""
    offline = Mock(side_effect=RuntimeError('no route to host:\nand a second line'))
    monkeypatch.setattr(torchvision().datasets, kind, offline)
    with pytest.raises(UserError, match=f'{kind} is not in --data_root .*no route to host.; put '
                                        f'{file}') as caught:
        make_dataset(name, tmp_path, 16, True)
    assert '\n' not in str(caught.value) and caught.value.code == 1
    (tmp_path / file).write_bytes(b'half an archive')
    with pytest.raises(UserError, match=f'{kind} in .* is incomplete or damaged: {file}'):
        make_dataset(name, tmp_path, 16, True)


def test_cifar10(tmp_path, monkeypatch):
    """torchvision has images (N, H, W, 3) and a list of labels. One process downloads at a time:
    commands that start together on a new machine would overwrite each other's file."""
    inside, most = [], []

    def download(root, train, download):
        inside.append(root)
        most.append(len(inside))
        time.sleep(.02)
        inside.pop()
        pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3) + 100 * (not train)
        return SimpleNamespace(data=pixels, targets=[9])

    monkeypatch.setattr(torchvision().datasets, 'CIFAR10', download)
    with ThreadPoolExecutor(4) as pool:
        train, test, *_ = pool.map(
            lambda train: make_dataset('cifar10', tmp_path / 'new', 2, train), [True, False] * 2)
    assert most == [1] * 4 and not list((tmp_path / 'new').iterdir())
    assert train.images.tolist() == [[[[0, 3], [6, 9]], [[1, 4], [7, 10]], [[2, 5], [8, 11]]]]
    assert torch.equal(test.images, train.images + 100)
    assert train.labels.tolist() == [9] and train.flip is True


# Downsampled ImageNet as published: planes of red, green, blue; labels from 1

PIXELS = np.random.RandomState(0).randint(0, 256, (40, 48), dtype=np.uint8)
LABELS = list(range(1, 41))


def batch(first, last, **change):
    """A pickled batch file of the images first..last - 1, 4 x 4 pixels."""
    return pickle.dumps(dict(dict(data=PIXELS[first:last], labels=LABELS[first:last]), **change))


def read(root):
    found = make_dataset('imagenet64', root, 4, True)
    assert np.array_equal(found.images.numpy().reshape(-1, 48), PIXELS[found.labels.numpy()])
    return found


def test_imagenet64(tmp_path):
    np.savez(tmp_path / 'train_data_batch_2.npz', data=PIXELS[2:5], labels=[3, 4, 5])
    (tmp_path / 'train_data_batch_10').write_bytes(batch(8, 10))
    (tmp_path / 'train_data_batch_1').write_bytes(batch(0, 2))
    with pytest.raises(UserError, match='none of the test split; class folders'):
        make_dataset('imagenet64', tmp_path, 4, False)
    (tmp_path / 'val_data').write_bytes(batch(0, 1, labels=[1000]))
    assert make_dataset('imagenet64', tmp_path, 4, False).labels.tolist() == [999]
    for _ in range(2):      # the second time from the file that is kept
        found = read(tmp_path)
        assert found.labels.tolist() == [0, 1, 2, 3, 4, 8, 9] and found.num_classes == 1000
    assert found.summary.endswith('7 images from 3 batch files; missing are those with the '
                                  'numbers 3, 4, 5, 6, 7, 8, 9')
    (tmp_path / 'train_data_batch_3').write_bytes(batch(5, 6))      # comes later
    assert read(tmp_path).labels.tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
    assert len(list(tmp_path.glob('train*.npy'))) == 1
    (tmp_path / 'train_data_batch_3.npz').write_bytes(b'')
    with pytest.raises(UserError, match='batch_3 and train_data_batch_3.npz are the same batch'):
        read(tmp_path)


NPZ = io.BytesIO()
np.savez(NPZ, data=PIXELS, labels=LABELS)


@pytest.mark.parametrize('ending, content, words', [
    *[('.npz', NPZ.getvalue()[:size], f'with {size} bytes is') for size in (0, 3, 1000)],
    *[('', batch(0, 40)[:size], f'with {size} bytes is') for size in (0, 3, 1000)],
    ('', batch(0, 1, data=Call(sys.exit, 3)), 'sys.exit is not allowed'),
    ('', pickle.dumps([1, 2]), ''), ('', pickle.dumps(dict(data=PIXELS)), 'labels'),
    ('', batch(0, 40, labels=[1.5] * 40), 'float64'),
    ('', batch(0, 40, data=PIXELS[:, :12]), r'data uint8 \(40, 12\), 40 labels from 1 to 40'),
    ('', batch(0, 40, data=PIXELS / 255), r'data float64 \(40, 48\)'),
    ('', batch(0, 40, labels=list(range(40))), 'labels from 0 to 39'),
    ('', batch(0, 40, labels=[1001] * 40), 'labels from 1001 to 1001'),
    ('', batch(0, 0, labels=np.zeros(0, int)), '')])
def test_damaged_imagenet64(tmp_path, ending, content, words):
    """One sentence with the file, what it holds and what was expected; nothing is written."""
    file = tmp_path / f'train_data_batch_1{ending}'
    file.write_bytes(content)
    with pytest.raises(UserError, match=f'{file} .*{words}.*, expected data, uint8 .n, 48.'):
        read(tmp_path)
    assert list(tmp_path.iterdir()) == [file]
