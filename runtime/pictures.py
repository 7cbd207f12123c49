"""Images as files: grids, folders of PNGs and npz."""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from runtime import files
from runtime.cli import UserError

MARGIN, PAD = 24, 2         # pixels: around a labelled grid, between its tiles
TILE = 64                   # smaller images are enlarged, whole times
MOST_CLASSES = 32           # rows of a grid


def to_uint8(x):
    """Float images in [-1, 1] rounded to the 8 bits of image files; values outside are clamped."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def check_place(path, flag, suffixes=('.npz',)):
    """Refuse a place for a folder, or a file with these suffixes, before hours of work for it."""
    path = Path(path)
    if path.suffix in suffixes:
        free = not path.exists() or holds_samples(path)
    elif path.is_dir():
        replaced = not os.path.ismount(path) and not path.samefile('.')
        free = replaced and not any(path.iterdir())
    else:       # a new folder; with a name such as x.jpg, a file of another kind was meant
        kinds = {'.npz', *Image.registered_extensions()}
        free = not path.exists() and not {path.suffix.lower(), path.name} & kinds
    if not free:
        or_file = f', or a file ({" or ".join(suffixes)}) that is new or holds samples'
        raise UserError(f'{flag} {path} cannot take the result, expected a new or empty folder, no '
                        f'mount point or working directory{or_file if suffixes else ""}; choose '
                        f'another')
    check_folder(path.resolve().parent)


def check_folder(folder):
    """Make a folder and try to write there; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=str(folder)).close()


def holds_samples(path):
    """Whether a file is one that may be overwritten: a PNG, or an npz of `save_images`."""
    try:
        if path.suffix == '.png':
            return path.is_file() and path.read_bytes().startswith(b'\x89PNG\r\n')
        with np.load(str(path)) as file:
            return 'arr_0' in file.files
    except Exception:       # what numpy raises depends on the bytes of the file
        return False


def save_images(path, images, y=None):
    """Write images uint8 (N, 3, H, W) and labels (N,) or None, on the CPU, whole or not at all.

    As guided-diffusion reads them, NAME.npz with arr_0 uint8 (N, H, W, 3) and arr_1, the labels; or
    as pytorch-fid does, a new or empty folder of 000000.png, 000001.png, .. and labels.txt.
    """
    path = Path(path).resolve()
    pixels = images.permute(0, 2, 3, 1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.npz':
        labels = [] if y is None else [y.numpy()]
        with files.replacing(path) as temporary:
            np.savez(temporary, pixels, *labels)
        return
    with files.replacing_folder(path) as folder:
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f'{i:06d}.png', compress_level=1)
        if y is not None:
            np.savetxt(str(folder / 'labels.txt'), y.numpy(), '%d')


def read_samples(path, count=1):
    """(images uint8 (N, H, W, 3), labels (N,) or None) by `save_images`, `count` or more."""
    path, labels = Path(path).expanduser(), None
    try:
        if path.is_dir():
            images = np.stack([np.array(Image.open(file)) for file in sorted(path.glob('*.png'))])
            if (path / 'labels.txt').exists():
                labels = np.loadtxt(str(path / 'labels.txt'), int, ndmin=1)
        else:
            with np.load(str(path)) as file:
                images = file['arr_0']
                labels = file['arr_1'] if 'arr_1' in file.files else None
    except Exception:       # what numpy raises depends on the bytes of the file
        images = np.zeros(0)
    if images.dtype != np.uint8 or images.shape[3:] != (3,) or len(images) < count:
        raise UserError(f'{path} is no npz or folder of {count} or more samples; give what '
                        f'ddim_eval.py --save_images wrote')
    return images, labels


def classes_in_turn(labels):
    """Indices of images with these labels (N,): the first of every class, the second, and so on."""
    turn = np.zeros(len(labels), dtype=int)     # how many images of the same class come before
    for c in np.unique(labels):
        turn[labels == c] = np.arange((labels == c).sum())
    return np.lexsort((labels, turn))


def rows_by_class(images, y, class_num):
    """(rows of images, their labels): one row per class, or a square if there are too many."""
    if y is None or class_num > MOST_CLASSES:
        width = max(1, round(len(images) ** 0.5))
        return [images[i:i + width] for i in range(0, len(images), width)], None
    return [images[y == c] for c in range(class_num)], [str(c) for c in range(class_num)]


def save_labelled(path, title, rows, row_labels=None):
    """Write one PNG, also returned (H, W, 3), of rows of uint8 images (n, 3, H, W) with words."""
    font, columns = ImageFont.load_default(12), max(len(row) for row in rows)
    size = rows[0].shape[-1] * max(1, TILE // rows[0].shape[-1])
    left = MARGIN if not row_labels else 12 + round(max(font.getlength(w) for w in row_labels))
    width = left + columns * (size + PAD) + MARGIN // 2
    sheet = Image.new('RGB', (max(width, round(font.getlength(title)) + MARGIN),
                              MARGIN + len(rows) * (size + PAD) + MARGIN // 2), 'white')
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN // 2, 5), title, 'black', font)
    for i, row in enumerate(rows):
        y = MARGIN + i * (size + PAD)
        if row_labels:
            draw.text((left - 6, y + size / 2), row_labels[i], 'black', font, anchor='rm')
        for j, image in enumerate(row.permute(0, 2, 3, 1).numpy()):
            picture = Image.fromarray(image).resize((size, size), Image.NEAREST)
            sheet.paste(picture, (left + j * (size + PAD), y))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        sheet.save(temporary, 'png')
    return np.asarray(sheet)
