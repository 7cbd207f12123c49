"""Folders of image files: finding them, decoding them, naming those that cannot be read."""

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from runtime.cli import UserError
from runtime.loader import load
from runtime.torchvision_cpu import torchvision


EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')


def find_images(root, split):
    """The image files of one split; each folder in it is a class, and holds any tree of files.

    Args:
        root: folder of the data set. split: 'train' or 'test'; see `_split_folder`.
    Returns:
        paths: list of str, sorted by class and name.
        labels: list of int, the class of each path; names of classes in alphabetical order.
        num_classes: number of class folders.
    Raises:
        UserError: no such folder or split, no images, or an empty class folder.
    """
    folder = _split_folder(root, split)
    try:
        found = torchvision().datasets.ImageFolder(str(folder))
    except FileNotFoundError:
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        empty = [name for name in classes if not any(
            path.suffix.lower() in EXTENSIONS for path in (folder / name).rglob('*'))]
        what = f'the class folders {", ".join(empty[:5])} are empty' if empty else (
            f'{sum(path.is_file() for path in folder.iterdir())} files and no class folder')
        raise UserError(f'{folder} holds no images that can be used ({what}): expected '
                        f'{folder}/<class>/*.jpg (or png, ...)')
    return [path for path, _ in found.samples], found.targets, len(found.classes)


def _split_folder(root, split):
    """root/train, root/test or root/val; without these, root itself is the training split."""
    root = Path(root).expanduser()
    names = ('train',) if split == 'train' else ('test', 'val')
    found = [root / name for name in names if (root / name).is_dir()]
    if found:
        return found[0]
    if split == 'train' and root.is_dir():
        return root
    missing = '' if root.is_dir() else ', and there is no such folder'
    raise UserError(f'--data_root {root} holds no {split} images: expected '
                    f'{root}/{names[0]}/<class>/*.jpg{missing}')


class Decoder:
    """Decodes image files to uint8 RGB (3, img_size, img_size).

    The shorter side is resized to `img_size` (antialiased), then the centre is cropped.

    Attributes:
        paths: list of str, the files.
    """

    def __init__(self, paths, img_size):
        self.paths = paths
        t = torchvision().transforms
        self.transform = t.Compose([t.Resize(img_size, antialias=True), t.CenterCrop(img_size),
                                    t.PILToTensor()])

    def __call__(self, i):
        """The image in `paths[i]`.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return self._decode(i)
        except Exception as error:      # Pillow has no base class for what damaged files raise
            raise UserError(f'{self._problem(i, error)}; repair or remove it, or leave such files '
                            f'out with --skip_bad_images')

    def problem(self, i):
        """Why `paths[i]` cannot be read, in words, or ''."""
        try:
            self._decode(i)
        except Exception as error:
            return self._problem(i, error)
        return ''

    def _decode(self, i):
        from PIL import Image
        with Image.open(self.paths[i]) as image:
            return self.transform(_rgb(image))

    def _problem(self, i, error):
        reason = str(error).split('\n')[0] or type(error).__name__
        return f'{self.paths[i]} cannot be read as an image ({reason})'


def _rgb(image):
    """A PIL image of any mode in RGB; 16 bits are scaled to 8, which Pillow would cut off."""
    if image.mode.startswith('I'):
        from PIL import Image
        grey = (np.asarray(image) / 257).round().clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert('RGB')


class _Problems(Dataset):
    """`Decoder.problem` of every file, as the items of a data set."""

    def __init__(self, decoder):
        self.decoder = decoder

    def __len__(self):
        return len(self.decoder.paths)

    def __getitem__(self, i):
        return self.decoder.problem(i)


def find_problems(decoder, num_workers):
    """Decode every file once.

    Args:
        decoder: `Decoder` of N files. num_workers: processes that share the work; 0: this one.
    Returns:
        list of N str: why file i cannot be read, or ''.
    """
    return [problem for batch in load(_Problems(decoder), num_workers, batch_size=256)
            for problem in batch]
