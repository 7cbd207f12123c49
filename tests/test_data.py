"""Data sets and the order of images: a function of (seed, step) alone."""

import itertools
import multiprocessing
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from runtime import data, distributed, loader
from runtime.data import StepOrder, batches, make_dataset
from runtime.cli import UserError


def numbered(length=10, size=2, flip=False):
    """Images whose pixels all have the value of their index; labels too."""
    images = torch.arange(length, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, size, size)
    return data.Images('numbered', 'train', size, torch.arange(length), length, images, flip=flip)


def ramps(length=16):
    """Images that a mirror changes: column j of image i is 10 i + j."""
    images = torch.arange(length)[:, None, None, None] * 10 + torch.arange(2)
    images = images.expand(-1, 3, 2, -1).to(torch.uint8).contiguous()
    return data.Images('ramps', 'train', 2, torch.arange(length), length, images)


def first(count, *args, **kwargs):
    return list(itertools.islice(batches(*args, **kwargs), count))


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for pair in zip(one, two)
                                        for a, b in zip(*pair))


def join(parts):
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def test_every_pass_sees_every_image():
    order = StepOrder(10, 4, seed=3)
    stream = torch.cat([order.indices(step) for step in range(5)])      # 20 images: two passes
    assert sorted(stream[:10].tolist()) == sorted(stream[10:].tolist()) == list(range(10))
    assert stream[:10].tolist() != stream[10:].tolist()
    assert StepOrder(3, 8, 0).indices(0).shape == (8,)      # a set smaller than a batch


def test_a_batch_is_images_and_labels():
    (x_0, y), = first(1, numbered(), 4, 0, torch.device('cpu'))
    assert x_0.shape == (4, 3, 2, 2) and x_0.dtype == torch.float32 and y.dtype == torch.int64
    torch.testing.assert_close(x_0[:, 0, 0, 0], y / 127.5 - 1)
    white = data.Images('white', 'train', 1, [0], 1, torch.full((1, 3, 1, 1), 255).byte())
    assert first(1, white, 1, 0, torch.device('cpu'))[0][0].max() == 1


@pytest.mark.parametrize('flip', [False, True])
def test_same_seed_same_batches_and_resuming_continues_them(flip):
    args = ramps(), 6, 5, torch.device('cpu')
    whole = first(7, *args, flip=flip)
    assert same(whole, first(7, *args, flip=flip))
    assert not same(whole, first(7, ramps(), 6, 6, torch.device('cpu'), flip=flip))
    assert same(whole[3:], first(4, *args, start_step=3, flip=flip))


def test_flips():
    """About half of the images are mirrored, others each time, and the choice is the seed's."""
    args = ramps(), 16, 5, torch.device('cpu')
    mirrored = []
    for x_0, y in first(4, *args):
        plain = ramps().images[y].float() / 127.5 - 1
        flipped = (x_0 == plain.flip(3)).all(3).all(2).all(1)
        assert (flipped | (x_0 == plain).all(3).all(2).all(1)).all()
        mirrored.append(flipped)
    assert 16 < torch.cat(mirrored).sum() < 48 and not torch.equal(mirrored[0], mirrored[1])
    x_0, y = first(1, *args, flip=False)[0]
    torch.testing.assert_close(x_0, ramps().images[y].float() / 127.5 - 1)
    assert make_dataset('digits', '.', 8, True).flip is False       # a mirrored 3 is no digit


@pytest.mark.parametrize('accum', [2, 4])
def test_parts_make_the_same_batch(accum):
    args = ramps(), 8, 5, torch.device('cpu')
    parts, whole = first(3 * accum, *args, accum=accum), first(3, *args)
    assert all(len(x_0) == 8 // accum for x_0, _ in parts)
    for step in range(3):
        assert same([join(parts[step * accum:(step + 1) * accum])], [whole[step]])
    resumed = first(accum, *args, accum=accum, start_step=2)
    assert same(resumed, parts[2 * accum:])


def as_process(monkeypatch, rank, world_size=2):
    monkeypatch.setattr(distributed, 'rank', lambda: rank)
    monkeypatch.setattr(distributed, 'world_size', lambda: world_size)


@pytest.mark.parametrize('accum', [1, 2])
def test_two_processes_share_the_batch(monkeypatch, accum):
    args = ramps(), 8, 5, torch.device('cpu')
    whole, halves = first(2, *args), []
    for rank in range(2):
        as_process(monkeypatch, rank)
        halves.append(first(2 * accum, *args, accum=accum))
    for step in range(2):
        # part 0 of process 0, part 0 of process 1, part 1 of process 0, ..
        parts = [halves[rank][step * accum + micro] for micro in range(accum) for rank in range(2)]
        assert same([join(parts)], [whole[step]])


def test_rows(monkeypatch):
    as_process(monkeypatch, 1)
    assert distributed.rows(8) == slice(4, 8)
    assert [distributed.rows(8, micro, 2) for micro in range(2)] == [slice(2, 4), slice(6, 8)]
    distributed.check_batch(8, 4)
    for batch_size, accum in ((3, 1), (1, 1), (6, 2)):
        with pytest.raises(UserError, match=f'--batch_size {batch_size}'):
            distributed.check_batch(batch_size, accum)


# Data sets

def test_digits():
    train, test = (make_dataset('digits', 'nowhere', 8, train) for train in (True, False))
    assert (len(train), len(test)) == (1498, 299) and train.num_classes == 10
    assert train.images.shape == (1498, 3, 8, 8) and train.images.dtype == torch.uint8
    assert train.images.min() == 0 and train.images.max() == 255
    assert set(train.labels.tolist()) == set(range(10)) and len(train.labels) == 1498
    assert torch.equal(train.images[:, 0], train.images[:, 2])      # grey
    image, label = train[3]
    assert torch.equal(image, train.images[3]) and label == train.labels[3]
    assert make_dataset('digits', '.', 12, True).images.shape == (1498, 3, 12, 12)


def save(path, mode, size, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(str(path))


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / 'train/cat/grey.png', 'L', (9, 17), 100)
    save(tmp_path / 'train/cat/rgba.png', 'RGBA', (31, 8), (10, 20, 30, 128))
    palette = Image.new('RGB', (8, 8), (200, 100, 50)).convert('P', palette=Image.ADAPTIVE)
    palette.save(str(tmp_path / 'train/cat/palette.png'))
    save(tmp_path / 'train/dog/small.png', 'RGB', (3, 2), (1, 2, 3))
    save(tmp_path / 'train/dog/large.jpg', 'RGB', (64, 50), (255, 255, 255))
    save(tmp_path / 'val/dog/one.png', 'RGB', (8, 8), (0, 0, 0))
    save(tmp_path / 'val/cat/one.png', '1', (8, 8), 1)
    return tmp_path


@pytest.mark.parametrize('mode, colour, expected', [
    ('L', 100, [100] * 3), ('1', 1, [255] * 3), ('RGBA', (10, 20, 30, 255), [10, 20, 30]),
    ('LA', (7, 255), [7] * 3), ('I;16', 257 * 200, [200] * 3),
    ('CMYK', (0, 255, 255, 0), [255, 0, 0])])
def test_modes_of_images(tmp_path, mode, colour, expected):
    suffix = 'tif' if mode == 'CMYK' else 'png'
    save(tmp_path / f'one/a.{suffix}', mode, (8, 8), colour)
    image, _ = make_dataset('folder', str(tmp_path), 8, True)[0]
    assert image[:, 3, 3].tolist() == expected


def huge_png():
    """A file that says it has 10 ** 10 pixels, which Pillow refuses by an exception of its own."""
    header = b'IHDR' + struct.pack('>IIBBBBB', 100000, 100000, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + header + struct.pack(
        '>I', zlib.crc32(header)) + struct.pack('>I', 0) + b'IEND' + struct.pack(
        '>I', zlib.crc32(b'IEND'))


@pytest.mark.parametrize('workers', [0, 2])
def test_image_that_cannot_be_read(tmp_path, monkeypatch, capsys, workers):
    for i in range(6):
        save(tmp_path / f'{"ab"[i % 2]}/{i}.png', 'RGB', (8, 8), (i, i, i))
    whole = (tmp_path / 'a/2.png').read_bytes()
    (tmp_path / 'a/2.png').write_bytes(whole[:40])
    (tmp_path / 'b/5.png').write_bytes(b'')
    with pytest.raises(UserError) as caught:
        make_dataset('folder', str(tmp_path), 8, True, workers)
    assert 'a/2.png cannot be read as an image' in str(caught.value)
    assert '\n' not in str(caught.value) and '--skip_bad_images' in str(caught.value)
    for limit in (data.IN_MEMORY, 0):
        monkeypatch.setattr(data, 'IN_MEMORY', limit)
        good = make_dataset('folder', str(tmp_path), 8, True, workers, skip_bad_images=True)
        said = capsys.readouterr().out
        assert said.count('left out') == 2 and 'a/2.png' in said and 'b/5.png' in said
        assert [(int(good[i][0][0, 0, 0]), int(good[i][1])) for i in range(len(good))] == [
            (0, 0), (4, 0), (1, 1), (3, 1)]
    (tmp_path / 'a/4.png').write_bytes(huge_png())
    assert len(make_dataset('folder', str(tmp_path), 8, True, skip_bad_images=True)) == 3
    damaged = make_dataset('folder', str(tmp_path), 8, True)     # found while training
    with pytest.raises(UserError, match='cannot be read as an image'):
        for _ in zip(range(4), data.batches(damaged, 2, 0, torch.device('cpu'),
                                            num_workers=workers)):
            pass


class Faulty(torch.utils.data.Dataset):
    """Item i is i; item 5 cannot be read."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i == 5:
            raise UserError('item 5\nUserError: with text; that looks like another error', code=1)
        return i


@pytest.mark.parametrize('workers', [0, 2])
def test_an_error_comes_out_of_a_worker_as_it_was(workers):
    seen = []
    with pytest.raises(UserError) as caught:
        for batch in loader.load(Faulty(), workers, batch_size=2):
            seen.append(batch.tolist())
    assert seen == [[0, 1], [2, 3]]         # up to the batch that holds the item
    assert str(caught.value) == 'item 5\nUserError: with text; that looks like another error'
    assert caught.value.code == 1 and type(caught.value) is UserError
    assert not multiprocessing.active_children()        # the workers have ended


@pytest.mark.parametrize('workers', [0, 2])
def test_names_of_files_that_look_like_messages(tmp_path, workers, capsys):
    path = tmp_path / 'train/cat/UserError: 1; 2.png'
    save(tmp_path / 'train/cat/good.png', 'RGB', (8, 8), (1, 2, 3))
    path.write_bytes(b'no image')
    with pytest.raises(UserError) as caught:
        make_dataset('folder', str(tmp_path), 8, True, workers)
    assert str(caught.value).startswith(f'{path} cannot be read as an image (')
    assert str(caught.value).endswith('--skip_bad_images')
    assert len(make_dataset('folder', str(tmp_path), 8, True, workers, skip_bad_images=True)) == 1
    said, = [line for line in capsys.readouterr().out.splitlines() if 'left out' in line]
    assert said.startswith(f'note: left out: {path} cannot be read') and said.endswith(').')


@pytest.mark.parametrize('in_memory', [True, False])
def test_folder(folder, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(data, 'IN_MEMORY', 0)
    train = make_dataset('folder', str(folder), 8, True)
    assert (train.images is not None) == in_memory
    assert len(train) == 5 and train.labels.tolist() == [0, 0, 0, 1, 1] and train.num_classes == 2
    images = [train[i][0] for i in range(5)]        # grey, palette, rgba, large, small
    assert all(image.shape == (3, 8, 8) and image.dtype == torch.uint8 for image in images)
    middle = [image[:, 4, 4].tolist() for image in images]
    assert middle == [[100] * 3, [200, 100, 50], [10, 20, 30], [255] * 3, [1, 2, 3]]
    test = make_dataset('folder', str(folder), 8, False)        # val/ is the test split
    assert [test[i][0].max().item() for i in range(2)] == [255, 0]
    order = first(2, train, 5, 0, torch.device('cpu'))
    assert order[0][0].shape == (5, 3, 8, 8) and sorted(order[0][1].tolist()) == [0, 0, 0, 1, 1]
    inside = make_dataset('folder', str(folder / 'train'), 8, True)     # no train/: root itself
    assert len(inside) == 5


def test_folder_refusals(tmp_path, folder):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'hollow/cat').mkdir(parents=True)
    for root, train, words in [('empty', True, 'holds no images'), ('hollow', True, 'empty'),
                               ('none', True, 'no such folder'), ('hollow', False, 'no test')]:
        with pytest.raises(UserError, match=words) as caught:
            make_dataset('folder', str(tmp_path / root), 8, train)
        assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match='dogs is unknown; choose one of digits'):
        make_dataset('dogs', '.', 8, True)


def test_official_imagenet64(tmp_path):
    """The downsampled ImageNet as published: planes of red, green, blue; labels from 1."""
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (5, 3, 4, 4), dtype=np.uint8)
    flat, labels = pixels.reshape(5, -1), [1, 1000, 7, 7, 2]
    np.savez(str(tmp_path / 'train_data_batch_1.npz'), data=flat[:2], labels=labels[:2])
    (tmp_path / 'train_data_batch_2').write_bytes(
        pickle.dumps(dict(data=flat[2:], labels=labels[2:])))
    for _ in range(2):      # the second time from the rewritten file
        dataset = make_dataset('imagenet64', str(tmp_path), 4, True)
        assert dataset.labels.tolist() == [0, 999, 6, 6, 1] and dataset.num_classes == 1000
        images = torch.stack([dataset[i][0] for i in range(5)])
        assert torch.equal(images, torch.from_numpy(pixels))


def test_hostile_imagenet64(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / 'ran'), 'w')

    (tmp_path / 'train_data_batch_1').write_bytes(pickle.dumps(dict(data=Payload(), labels=[1])))
    with pytest.raises(UserError, match='not a batch'):
        make_dataset('imagenet64', str(tmp_path), 4, True)
    assert not (tmp_path / 'ran').exists()


def test_damaged_imagenet64(tmp_path):
    """Truncated or other files: one sentence with the file, what it holds, what was expected."""
    data = np.random.RandomState(0).randint(0, 256, (40, 48), dtype=np.uint8)
    labels = list(range(1, 41))
    np.savez(str(tmp_path / 'whole.npz'), data=data, labels=labels)
    whole = dict(npz=(tmp_path / 'whole.npz').read_bytes(),
                 pickled=pickle.dumps(dict(data=data, labels=labels, mean=data.mean(0))))
    damaged = {f'{kind}, first {size} bytes': (content[:size], f'truncated or not a batch ({size}')
              for kind, content in whole.items() for size in (0, 3, 100, 1000, len(content) - 1)}
    flipped = whole['npz'][:500] + bytes([whole['npz'][500] ^ 1]) + whole['npz'][501:]
    damaged.update({'npz, flipped bit': (flipped, 'truncated or not a batch (')})
    for name, batch, words in [
            ('list', [1, 2], 'not a batch ('), ('keys', dict(data=data), 'holds data, expected'),
            ('size', dict(data=data[:, :12], labels=labels), 'uint8 (40, 12), and 40 labels'),
            ('type', dict(data=data / 255, labels=labels), 'data, float64 (40, 48), and 40'),
            ('count', dict(data=data, labels=labels[1:]), 'and 39 labels from 2 to 40, expected'),
            ('zero', dict(data=data, labels=range(40)), '40 labels from 0 to 39, expected'),
            ('none', dict(data=[], labels=[]), '0 labels from none to none')]:
        damaged[name] = pickle.dumps(dict(batch, labels=list(batch['labels'])) if isinstance(
            batch, dict) and 'labels' in batch else batch), words
    for name, (content, words) in damaged.items():
        folder = tmp_path / name
        folder.mkdir()
        file = folder / ('train_data_batch_1' + ('.npz' if name.startswith('npz') else ''))
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            make_dataset('imagenet64', str(folder), 4, True)
        message = str(caught.value)
        assert '\n' not in message and str(file) in message and words in message, message
        assert 'uint8 (n, 48), and labels 1..1000' in message
        assert not list(folder.glob('*.labels.npy')) and not list(folder.glob('*.pixels'))
