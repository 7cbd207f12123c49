"""Which files of a folder are read, under which labels, and what becomes of their pixels."""

import os
import struct
import sys
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from helpers import picture
from runtime import distributed, image_files
from runtime.cli import UserError
from runtime.data import make_dataset

W = 16      # height and width of pictures that are not resized


def read(root, train=True, **options):
    return make_dataset('folder', str(root), 8, train, **options)


def reds(dataset):
    return dataset.images[:, 0, 0, 0].tolist()


def refused(root, words, train=True, **options):
    with pytest.raises(UserError, match=words):
        read(root, train, **options)


# Pixels

@pytest.mark.parametrize('mode, colour, expected', [
    ('L', 100, [100] * 3), ('1', 1, [255] * 3), ('RGBA', (10, 20, 30, 255), [10, 20, 30]),
    ('I;16', 257 * 200, [200] * 3), ('CMYK', (0, 255, 255, 0), [255, 0, 0]),
    ('La', (50, 128), [177] * 3), ('LA', (100, 51), [224] * 3)])
def test_modes(mode, colour, expected):
    """Transparent pixels show the white under them."""
    found = image_files._rgb(Image.new(mode, (2, 2), colour)).getpixel((1, 1))
    np.testing.assert_allclose(found, expected, atol=1)


@pytest.mark.parametrize('transparency, last_two', [
    (None, [[0, 255, 0], [1, 2, 3]]), (1, [[255] * 3, [1, 2, 3]]), (b'\xff\0\0', [[255] * 3] * 2)])
def test_palettes(tmp_path, transparency, last_two):
    image = Image.fromarray(np.arange(W * W).reshape(W, W).astype(np.uint8) % 3, 'P')
    image.putpalette([200, 40, 40, 0, 255, 0, 1, 2, 3])
    image.save(tmp_path / 'x.png', transparency=transparency)
    found = image_files.decode(tmp_path / 'x.png', W)[:, 0, :3]
    assert found.T.tolist() == [[200, 40, 40], *last_two]


@pytest.mark.parametrize('depth, channels', [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3),
                                             (16, 3)])
def test_one_transparent_colour_of_any_depth(tmp_path, depth, channels):
    """A PNG of a ramp from black to white, in which one of the values stands for transparent."""
    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', checksum)

    header = struct.pack('>IIBBBBB', W, W, depth, channels - 1, 0, 0, 0)
    values = [i * 2 ** depth // W for i in range(W)]
    row = int(''.join(f'{value:0{depth}b}' * channels for value in values), 2)
    rows = (b'\0' + row.to_bytes(W * depth * channels // 8, 'big')) * W
    grey = np.array([value >> 8 if (depth, channels) == (16, 3)     # as Pillow reads it
                     else round(value * 255 / (2 ** depth - 1)) for value in values])
    for i in (0, 5, 15):
        clear = struct.pack('>H', values[i]) * channels
        (tmp_path / 'x.png').write_bytes(
            b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'tRNS', clear)
            + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))
        found = image_files.decode(tmp_path / 'x.png', W)[:, 7]
        assert found.tolist() == [np.where(grey == grey[i], 255, grey).tolist()] * 3


@pytest.mark.parametrize('top', [1023, 4095, 65535])
def test_wide_pgm(tmp_path, top):
    """10, 12 and 16 bits: a ramp from black to white is one."""
    row = np.linspace(0, top, W).round().astype('>u2').tobytes()
    (tmp_path / 'x.pgm').write_bytes(b'P5 %d %d %d\n' % (W, W, top) + row * W)
    assert image_files.decode(tmp_path / 'x.pgm', W)[1, 3].tolist() == list(range(0, 256, 17))


@pytest.mark.parametrize('black, order', [(1, 1), (0, -1)])
def test_tiff_of_16_bits_whose_zero_is_black_or_white(tmp_path, black, order):
    row = np.linspace(0, 65535, W).round().astype(np.uint16)
    Image.fromarray(np.tile(row, (W, 1))).save(tmp_path / 'x.tif', tiffinfo={262: black})
    found = image_files.decode(tmp_path / 'x.tif', W)[1, 3].tolist()
    assert found == list(range(0, 256, 17))[::order]


TURNED = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
          5: Image.TRANSPOSE, 6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270}


@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp', 'tif'])
def test_orientation(tmp_path, ending):
    """Every viewer shows these with a white bar at the top left."""
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:2, :4] = 255
    file, exif = tmp_path / f'x.{ending}', Image.Exif()
    for orientation, how in TURNED.items():
        exif[0x0112] = orientation
        Image.fromarray(upright).transpose(how).save(file, exif=exif, quality=100)
        found = image_files.decode(file, 8).transpose(1, 2, 0)
        assert np.array_equal(found > 125, upright > 125), orientation
    Image.fromarray(upright).save(tmp_path / 'x.png', exif=b'damaged')      # turns nothing
    assert np.array_equal(image_files.decode(tmp_path / 'x.png', 8).transpose(1, 2, 0), upright)


def test_size_and_frames(tmp_path):
    """The shorter side is resized, the centre cropped; the first of several pictures counts."""
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    frames = [Image.fromarray(wide), Image.new('RGB', (48, 16), 'blue')]
    frames[0].save(tmp_path / 'x.gif', save_all=True, append_images=frames[1:])
    found = image_files.decode(tmp_path / 'x.gif', 8)
    assert found.shape == (3, 8, 8) and (found[:, :, 1:7] == 200).all()


# Files

def test_folder(tmp_path):
    """Classes in alphabetical order, in them any tree; every image under its own label."""
    for i, name in enumerate(['b/z.png', 'b/a/2.png', 'b/a/b/1.png', 'a b/x.jpg', 'a/x.BMP']):
        picture(tmp_path / 'train' / name, 20 * i)
    found = read(tmp_path)
    assert reds(found) == [80, 60, 0, 20, 40] and found.flip
    assert found.labels.tolist() == [0, 1, 2, 2, 2] and found.num_classes == 3
    assert found.summary == (f'{tmp_path}, train: 5 images of 3 classes (1 to 3 each), 3 .png, '
                             f'1 .bmp, 1 .jpg')
    assert reds(read(tmp_path / 'train')) == reds(found)            # no train/: the folder itself
    assert read(tmp_path / 'train/b/a/b').labels.tolist() == [0]    # images and no folder


def test_what_is_left_out(tmp_path):
    for name in ('a/1.png', '.x/1.png', '@eaDir/1.png', '__MACOSX/1.png', '$RECYCLE.BIN/1.png',
                 '#recycle/1.png', 'lost+found/1.png', 'System Volume Information/1.png',
                 'a/._1.png', 'a/Thumbs.db', 'loose.png', 'a/x.heic', 'a/y.HEIC', 'a/z.eps',
                 'a/labels'):
        picture(tmp_path / name)
    (tmp_path / 'a/gone').symlink_to('nowhere')
    found = read(tmp_path)
    assert len(found) == found.num_classes == 1
    assert set(found.summary.split('left out: ')[1].split(', ')) == {
        '9 hidden or of the system', '2 .heic', '1 beside the class folders', '1 .eps',
        '2 without ending'}


def test_images_beside_the_training_folder(tmp_path):
    """Counted; refused where the folder holds no classes, as it may be a class called train."""
    for name in ('train/a/1.png', 'more/1.png', 'more/2.png', 'loose.png', 'test/a/1.png'):
        picture(tmp_path / 'sets' / name)
    assert '1 images of 1 classes' in read(tmp_path / 'sets').summary
    assert read(tmp_path / 'sets').summary.endswith('left out: 3 beside train')
    for name in ('car/1.png', 'Train/2.png', 'logo.png'):
        picture(tmp_path / 'vehicles' / name)
    refused(tmp_path / 'vehicles', 'has images in car and Train; if both are classes, ')
    (tmp_path / 'vehicles/car').rename(tmp_path / 'vehicles/test')
    assert read(tmp_path / 'vehicles').summary.endswith('left out: 1 beside Train')


def test_links(tmp_path):
    """A link to a folder is followed, each real folder is read once, and none above the classes."""
    for name in ('elsewhere/1.png', 'other/1.png', 'train/a/2.png', 'train/b/3.png'):
        picture(tmp_path / name)
    for name, to in [('a/up', '..'), ('a/above', '../../..'), ('a/b', '../b'), ('b/self', '.'),
                     ('b/one', '../../other'), ('b/two', '../../other'), ('b/loop', 'loop'),
                     ('b/class', '../../elsewhere'), ('c', '../elsewhere')]:
        (tmp_path / 'train' / name).symlink_to(to)
    found = read(tmp_path)
    assert found.labels.tolist() == [0, 1, 1, 2]
    assert '6 links to folders that are read anyway' in found.summary
    (tmp_path / 'train/d').symlink_to('../elsewhere')
    refused(tmp_path, 'the class folders d are empty')


@pytest.mark.parametrize('train, test', [
    ('Train', 'Test'), ('training', 'testing'), ('TRAIN', 'valid'), ('train', 'val'),
    ('train', 'Validation')])
def test_names_of_the_splits(tmp_path, train, test):
    picture(tmp_path / train / 'a/1.png', 1)
    picture(tmp_path / test / 'a/2.png', 2)
    assert reds(read(tmp_path)) == [1] and reds(read(tmp_path, False)) == [2]


def test_several_test_folders(tmp_path):
    """test/ comes before val/. Without a training folder, they are no classes."""
    for i, name in enumerate(['cat', 'val', 'test']):
        picture(tmp_path / 'photos' / name / 'a/1.png', i)
    assert reds(read(tmp_path / 'photos', False)) == [2]
    for folder in (tmp_path / 'photos', tmp_path):
        refused(folder, 'photos has a folder test, which would be trained on')
    picture(tmp_path / 'photos/Testing/a/1.png')
    refused(tmp_path / 'photos', 'has the folders .* and .*; keep one', False)


@pytest.mark.parametrize('other, words', [
    ((None, 'another digest'), 'the processes find different train images in --data_root'),
    (('no such folder there', None), 'no such folder there')])
def test_machines_must_find_the_same_images(tmp_path, monkeypatch, other, words):
    """All processes end, also those whose own images are fine."""
    picture(tmp_path / 'a/1.png')
    monkeypatch.setattr(distributed, 'gather_objects', lambda mine: [mine, other])
    refused(tmp_path, words)


def test_labels_of_the_test_split(tmp_path):
    """They are those of the names in train/, whatever test/ lacks."""
    for name in ('train/a', 'train/b', 'train/c', 'test/b', 'test/c'):
        picture(tmp_path / name / '1.png')
    found = read(tmp_path, False)
    assert found.labels.tolist() == [1, 2] and found.num_classes == 3
    picture(tmp_path / 'test/d/1.png')
    refused(tmp_path, 'test has a class d, which .*train lacks', False)


def test_refusals(tmp_path):
    (tmp_path / 'hollow/cat').mkdir(parents=True)
    (tmp_path / 'empty').mkdir()
    picture(tmp_path / 'other/x.heic')
    for kind in (np.float32, np.int32):
        (tmp_path / kind.__name__).mkdir()
        Image.fromarray(np.zeros((8, 8), kind)).save(tmp_path / kind.__name__ / 'x.tif')
    signed = 'x.tif .*32-bit or signed numbers of unknown range: save it with 8 or 16'
    refused(tmp_path / 'hollow', 'no test images', train=False)
    for root, words in dict(
            empty='holds no images .*it is empty', none='no such folder', other='1 .heic',
            hollow='the class folders cat are empty', float32=signed, int32=signed).items():
        refused(tmp_path / root, words)


# Damage

@pytest.mark.parametrize('workers', [0, 2])
def test_bad_images(tmp_path, capsys, monkeypatch, workers):
    """Each is left out with its reason, in the order of their names, or the first is refused."""
    bad = dict(cut='truncated', empty='cannot identify', link='No such file',
               waits='not a regular file')
    folder = tmp_path / 'a'
    picture(folder / '0.png')
    picture(tmp_path / 'b/1.png', 7)
    (folder / 'cut.png').write_bytes((folder / '0.png').read_bytes()[:60])
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'link.png').symlink_to('nowhere')
    os.mkfifo(folder / 'waits.png')
    monkeypatch.setattr(image_files, 'PART', 1)      # several for the workers to share
    good = read(tmp_path, num_workers=workers, skip_bad_images=True)
    assert reds(good) == [9, 7] and good.labels.tolist() == [0, 1]
    assert good.summary.endswith('left out: 4 that cannot be read')
    notes = [line for line in capsys.readouterr().out.splitlines() if 'left out' in line]
    assert len(notes) == len(bad)
    for note, (name, reason) in zip(notes, bad.items()):
        assert f'{folder}/{name}.png cannot be read as an image (' in note and reason in note
    refused(tmp_path, '/a/cut.png cannot be read as an image .* --skip_bad_images',
            num_workers=workers)


def test_whatever_a_file_raises(tmp_path, monkeypatch, capsys):
    """Also in folders and files whose names are not UTF-8."""
    sys.stdout.reconfigure(errors='backslashreplace')      # as scripts do
    picture(tmp_path / os.fsdecode(b'z\xe9ro/caf\xe9.png'))
    monkeypatch.setattr(Image, 'open', Mock(side_effect=RecursionError('deep\nstack')))
    refused(tmp_path, r'.png cannot be read as an image \(deep\); .* --skip_bad_images')
    refused(tmp_path, 'none of the 1 images', skip_bad_images=True)
    assert 'caf\\udce9.png cannot be read' in capsys.readouterr().out
