"""Folders of image files: which files they hold, and how they become an array."""

import collections
import contextlib
import functools
import hashlib
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from runtime import distributed
from runtime.cli import UserError, first_line
from runtime.image_cache import kept, new_array
from runtime.loader import in_workers
from runtime.log import progress
from runtime.torchvision_cpu import torchvision

SPLITS = dict(train=[('train', 'training')],
              test=[('test', 'testing'), ('val', 'valid', 'validation')])
# what systems, archives and storage boxes leave in folders; also all that begins with . or @
FOREIGN = ('__macosx', '#recycle', '#snapshot', '$recycle.bin', 'system volume information',
           'lost+found', 'thumbs.db', 'desktop.ini')
# Pillow does not decode these, or starts another program for it, or does not know their range
NOT_READ = ('BUFR', 'EPS', 'FITS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'WMF')
PART = 32       # images that a process decodes at a time


def read_folder(root, split, img_size, num_workers, skip_bad_images):
    """The images of split 'train' or 'test' of a folder, as arguments of `Images`."""
    paths, labels, classes, left_out = find_on_all(root, split)
    if skip_bad_images:
        problems = dict(decode_all(paths, img_size, num_workers)) if distributed.is_main() else {}
        for path, reason in problems.items():
            distributed.print0(f'note: left out: {path} {reason}.')
        # indices, as other machines may have another --data_root
        bad = distributed.broadcast_object({i for i, path in enumerate(paths) if path in problems})
        if len(bad) == len(paths):
            raise UserError(f'none of the {len(paths)} images in {root} can be read, see above')
        if bad:
            left_out['that cannot be read'] = len(bad)
        labels = [label for i, label in enumerate(labels) if i not in bad]
        paths = [path for i, path in enumerate(paths) if i not in bad]

    def fill(file):
        new_array(file, len(paths), img_size)
        for path, reason in decode_all(paths, img_size, num_workers, file):
            raise UserError(f'{path} {reason}; repair or remove it, or give --skip_bad_images')

    images, _, key = kept(root, split, img_size, paths, fill)
    return dict(images=images, labels=labels, num_classes=len(classes), key=key,
                summary=summary(root, split, paths, labels, classes, left_out))


def summary(root, split, paths, labels, classes, left_out):
    """One line on what `find_images` found."""
    counts = np.bincount(labels, minlength=len(classes))
    text = (f'{root}, {split}: {len(paths)} images of {len(classes)} classes ({counts.min()} to '
            f'{counts.max()} each), {_listed(map(_ending, paths))}')
    return f'{text}; left out: {_listed(left_out)}' if left_out else text


def _listed(found):
    counts = collections.Counter(found).most_common()
    return ', '.join(f'{count} {what}' for what, count in counts)


def _ending(path):
    return os.path.splitext(path)[1].lower()


# Which files there are

def find_on_all(root, split):
    """`find_images`; UserError on all processes if it fails on one, or not all find the same."""
    found, problem, names = None, None, []
    try:
        found = paths, labels, classes, _ = find_images(root, split)
        names = [*classes, *map(os.path.basename, paths), *map(str, labels)]
    except UserError as error:
        problem = str(error)
    digest = hashlib.sha256('\n'.join(names).encode(errors='surrogateescape')).hexdigest()
    problems, digests = zip(*distributed.gather_objects((problem, digest)))
    if any(problems):
        raise UserError(next(filter(None, problems)))
    if len(set(digests)) > 1:
        raise UserError(f'the processes find different {split} images in --data_root {root}; give '
                        f'all machines the same files')
    return found


def find_images(root, split):
    """Paths, labels, class names and a `Counter` of what was left out, for a split of `root`.

    Each folder of a split is a class, and holds any tree of files; a split without folders is one
    class, "all". Classes are in alphabetical order; the test split has those of the training split.
    """
    folder = _split_folder(root, split)
    found, left_out = _classes(folder)
    if split == 'train' and folder != Path(root):
        loose, beside = _beside(folder)
        if beside and not _listing(folder)[0]:
            other = os.path.basename(os.path.dirname(beside[0]))
            raise UserError(f'{root} has images in {other} and {folder.name}; if both are classes, '
                            f'move them into {root}/train, else move {other} out of {root}')
        if loose + beside:
            left_out[f'beside {folder.name}'] = len(loose + beside)
    classes, train = list(found), _named(root, 'train') if split == 'test' else None
    if train:
        classes = [os.path.basename(top) for top in _listing(train)[0]] or ['all']
    paths, labels = [], []
    for name, images in found.items():
        if name not in classes:
            raise UserError(f'{folder} has a class {name}, which {train} lacks; add or remove it')
        paths += sorted(images, key=os.path.split)
        labels += [classes.index(name)] * len(images)
    return paths, labels, classes, left_out


def _classes(folder):
    """{class: image files} of the folder of a split, each real folder once; what was left out."""
    tops, loose, left_out = _listing(folder)
    found = {os.path.basename(top): [] for top in tops} or dict(all=loose)
    if tops and loose:
        left_out['beside the class folders'] = len(loose)
    visited = {os.path.realpath(path) for path in (folder, *folder.resolve().parents)}
    waiting = list(zip(found, tops))    # class folders come before what is in them, links as well
    for name, path in waiting:
        real = os.path.realpath(path)
        if real in visited:
            left_out['links to folders that are read anyway'] += 1
            continue
        visited.add(real)
        folders, images, others = _listing(path)
        waiting += [(name, inner) for inner in folders]
        found[name] += images
        left_out.update(others)
    empty = [name for name, images in found.items() if not images]
    if empty:
        what = f'the class folders {", ".join(empty[:5])} are empty' if tops else (
            _listed(left_out) or 'it is empty')
        raise UserError(f'{folder} holds no images ({what}); expected <class>/*.jpg (or png)')
    return found, left_out


def _beside(folder):
    """The image files beside the folder of a split, and those in folders that are no split."""
    names = [name for split in SPLITS.values() for equal in split for name in equal]
    (folders, loose, _), images = _listing(folder.parent), []
    for path in folders:
        if os.path.basename(path).lower() not in names:
            with contextlib.suppress(OSError):      # it may not be read, and is not used
                images += _listing(path)[1]
    return loose, images


def _split_folder(root, split):
    """The folder in `root` with a name of the split; for training, else `root` itself."""
    if not os.path.isdir(root):
        raise UserError(f'--data_root {root} holds no {split} images: there is no such folder')
    found = _named(root, split)
    if split == 'test' and not found:
        raise UserError(f'--data_root {root} holds no test images: expected {root}/test/<class>/')
    for folder in [] if found else [root, *_listing(root)[0]]:
        test = _named(folder, 'test')
        if test:
            raise UserError(f'{folder} has a folder {test.name}, which would be trained on; put '
                            f'the training images into {folder}/train')
    return found or Path(root)


def _named(root, split):
    """The folder in `root` with a name of the split, in any case; None without one."""
    folders = [Path(path) for path in _listing(root)[0]]
    for names in SPLITS[split]:
        found = [folder for folder in folders if folder.name.lower() in names]
        if len(found) > 1:
            raise UserError(f'{root} has the folders {found[0].name} and {found[1].name}; keep one')
        if found:
            return found[0]
    return None


def _listing(folder):
    """(sorted folders, sorted image files, Counter of what was left out) in `folder`."""
    folders, images, left_out = [], [], collections.Counter()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(('.', '@')) or entry.name.lower() in FOREIGN:
                left_out['hidden or of the system'] += 1
            elif os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                folders.append(entry.path)
            elif _ending(entry.name) in _formats()[1]:
                images.append(entry.path)
            else:
                left_out[_ending(entry.name) or 'without ending'] += 1
    return sorted(folders), sorted(images), left_out


@functools.lru_cache(None)
def _formats():
    """(names of the formats that are read, endings of their files)"""
    Image.init()
    names = [name for name in Image.ID if name not in NOT_READ]
    endings = [ending for ending, name in Image.registered_extensions().items() if name in names]
    return names, {'.mpo', *endings}        # .mpo is read as JPEG


# How they are read

def decode_all(paths, img_size, num_workers, file=None):
    """Decode files, into the array in `file` if given; yields (path, reason) of bad ones."""
    def decode_part(part):
        records, problems = np.load(file, mmap_mode='r+') if file else None, []
        for i in part:
            try:
                pixels = decode(paths[i], img_size)
                if file:
                    records['pixels'][i] = pixels
            except Exception as error:
                problems.append((paths[i], f'cannot be read as an image ({first_line(error)})'))
        return problems

    parts = [range(len(paths))[first:first + PART] for first in range(0, len(paths), PART)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    workers = min(cores, len(parts)) if num_workers else 0
    with progress(len(paths), 'decode once', unit='img') as bar:
        for part, problems in zip(parts, in_workers(decode_part, parts, workers)):
            yield from problems
            bar.update(len(part))


def decode(path, img_size):
    """The first image in a file, uint8 RGB (3, img_size, img_size), numpy.

    It is turned as its EXIF data say, put on white where it is transparent, resized on its shorter
    side (antialiased) and cropped. Damaged files raise anything: Pillow has no base class for it.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError('not a regular file')
    F = torchvision().transforms.functional
    with Image.open(path, formats=_formats()[0]) as image:
        image = F.resize(_rgb(image), img_size, antialias=True)
        return F.pil_to_tensor(F.center_crop(image, img_size)).numpy()


def _rgb(image):
    """A freshly opened PIL image of any mode in RGB."""
    layout = str(getattr(image, 'tile', [])[:1])        # how the file stores pixels, as 'L;2'
    wide = image.mode.startswith('I;16') or image.mode == 'I' and image.format in ('PPM', 'PNG')
    if image.mode in ('I', 'F') and not wide:
        raise ValueError('32-bit or signed numbers of unknown range: save it with 8 or 16 bits')
    image.load()
    with contextlib.suppress(Exception):        # damaged EXIF data turn nothing
        ImageOps.exif_transpose(image, in_place=True)
    clear = image.info.get('transparency')      # the colour that stands for transparent
    if wide:
        pixels = np.asarray(image)
        grey = (pixels / (4095 / 255 if 'I;12' in layout else 257)).round().clip(0, 255)
        if image.format == 'TIFF' and image.tag_v2.get(262) == 0:       # 0 is white
            grey = 255 - grey
        return Image.fromarray(np.where(pixels == clear, 255, grey).astype(np.uint8)).convert('RGB')
    if clear is not None and ('L;2' in layout or 'L;4' in layout):  # Pillow scales only pixels
        image.info['transparency'] = clear * (85 if 'L;2' in layout else 17)
    elif clear is not None and 'RGB;16B' in layout:
        image.info['transparency'] = tuple(value >> 8 for value in clear)
    if not image.has_transparency_data:
        return image.convert('RGB')
    straight = image.convert('LA') if image.mode == 'La' else image
    white = Image.new('RGBA', image.size, 'white')
    white.alpha_composite(straight.convert('RGBA'))
    return white.convert('RGB')
