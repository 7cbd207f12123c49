"""Images as files: 8-bit pixels, sample grids, labelled grids, folders of PNGs and npz."""

import zipfile
from pathlib import Path

import numpy as np
import torch

from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision

MARGIN, PAD = 24, 2         # pixels: around a labelled grid, between its tiles
# what numpy.load raises for files that are not what they should be
UNREADABLE = (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile)
MOST_CLASSES = 32           # rows of a grid
MOST_COLUMNS = 17           # of a trajectory: at 16 of many steps and at the end


def to_uint8(x, finite=False):
    """Float images in [-1, 1] rounded to the 8 bits of image files; values outside are clamped.

    Args:
        finite: whether they are known to be, or will be looked at later (`refuse_unless`).
    Raises:
        UserError: values that are not finite, which 8 bits would hide.
    """
    if not finite:
        refuse_unless(torch.isfinite(x).all())
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def refuse_unless(finite):
    """Raise a UserError unless `finite`, a bool tensor; waits for its device."""
    if not finite:
        raise UserError('the images to be rounded to 8 bits hold values that are not finite; the '
                        'network that made them has diverged', code=1)


def save_grid(images, path, nrow=8, scale=1):
    """Write images (B, 3, H, W) in [-1, 1] as one PNG grid, enlarged `scale` times.

    Pixels that are not finite are drawn grey. Returns the picture, uint8 (height, width, 3).
    """
    from PIL import Image
    pixels = to_uint8(images.detach().cpu().nan_to_num(0.))
    grid = torchvision().utils.make_grid(pixels, nrow=nrow, padding=1, pad_value=255)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    size = (picture.width * scale, picture.height * scale)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture = picture.resize(size, Image.NEAREST)
    picture.save(path)
    return np.asarray(picture)


def check_place(path):
    """Refuse, before any sampling, a place for images that holds something else."""
    path = Path(path)
    if path.suffix == '.npz':
        if path.exists() and not holds_samples(path):
            raise UserError(f'--save_images {path} exists and does not hold samples, which may be '
                            f'overwritten; choose another file')
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f'--save_images {path} exists and is not an empty folder; choose another, '
                        f'or a file that ends in .npz')


def holds_samples(path):
    """Whether a file is an npz as `save_images` writes it."""
    try:
        with np.load(str(path)) as file:
            return 'arr_0' in file.files
    except UNREADABLE:
        return False


def save_images(path, images, y=None):
    """All images, as one npz or as a folder.

    Args:
        path: ending in .npz: arr_0 uint8 (N, H, W, 3) and, if there are labels, arr_1, as the
            evaluator of guided-diffusion reads them; else a folder of 000000.png, 000001.png, ..
            (and labels.txt), as pytorch-fid reads it.
        images: uint8 (N, 3, H, W). y: labels (N,) or None.
    """
    from PIL import Image
    path, pixels = Path(path), images.permute(0, 2, 3, 1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.npz':
        return np.savez(path, pixels, *([] if y is None else [y.cpu().numpy()]))
    path.mkdir(exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(path / f'{i:06d}.png', compress_level=1)
    if y is not None:
        (path / 'labels.txt').write_text(''.join(f'{label}\n' for label in y.tolist()))


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


def save_labelled(path, title, rows, row_labels=None, column_labels=None, tile=64):
    """One PNG of rows of uint8 images (n, 3, H, W) with a title and words beside and above.

    Args:
        tile: smallest size of an image in the picture; small ones are enlarged, whole times.
    """
    from PIL import Image, ImageDraw, ImageFont
    font, columns = ImageFont.load_default(12), max(len(row) for row in rows)
    size = rows[0].shape[-1] * max(1, tile // rows[0].shape[-1])
    left = MARGIN if not row_labels else 12 + round(max(font.getlength(w) for w in row_labels))
    top = MARGIN * (2 if column_labels else 1)
    width = left + columns * (size + PAD) + MARGIN // 2
    sheet = Image.new('RGB', (max(width, round(font.getlength(title)) + MARGIN),
                              top + len(rows) * (size + PAD) + MARGIN // 2), 'white')
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN // 2, 5), title, 'black', font)
    for j, words in enumerate(column_labels or ()):
        draw.text((left + j * (size + PAD) + size / 2, top - 12), words, 'black', font, anchor='mm')
    for i, row in enumerate(rows):
        y = top + i * (size + PAD)
        if row_labels:
            draw.text((left - 6, y + size / 2), row_labels[i], 'black', font, anchor='rm')
        for j, image in enumerate(row.permute(0, 2, 3, 1).numpy()):
            picture = Image.fromarray(image).resize((size, size), Image.NEAREST)
            sheet.paste(picture, (left + j * (size + PAD), y))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


@torch.no_grad()
def trajectory(diffusion, network, x_T, stride, y=None):
    """[(t, z_t, x_pred)] of the sampler, x_pred clipped; the last is (0, image, image)."""
    z, times, visited = x_T, diffusion.times(stride), []
    for t, s in zip(times[:-1], times[1:]):
        t_all, s_all = (torch.full((len(z),), u, device=z.device) for u in (t, s))
        x_pred, _ = diffusion.predict(network, z, t_all, y)
        visited.append((t, z, x_pred.clamp(-1, 1)))
        z = diffusion.ddim_step(network, z, t_all, s_all, y=y)
    return visited + [(0, z.clamp(-1, 1), z.clamp(-1, 1))]


def save_trajectory(path, title, steps):
    """z_t above x_pred for every image of `trajectory`, time from left to right, as one PNG."""
    if len(steps) > MOST_COLUMNS:
        chosen = torch.linspace(0, len(steps) - 1, MOST_COLUMNS).round().long().tolist()
        steps = [steps[i] for i in chosen]
    latents, predictions = (torch.stack([step[i] for step in steps], 1).cpu() for i in (1, 2))
    both = torch.stack([latents, predictions], 1).flatten(0, 1)     # (2 B, steps, 3, H, W)
    save_labelled(path, title, list(to_uint8(both)), ['z_t', 'x_pred'] * len(latents),
                  [f't {t}' for t, _, _ in steps])
