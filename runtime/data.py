"""Data sets as arrays of uint8 pixels; the images of step k are a function of (seed, k) alone."""

import dataclasses
import functools
import hashlib
import itertools

import torch
import torch.nn.functional as F

from runtime import distributed, image_files, published_sets, seeding
from runtime.cli import UserError
from runtime.loader import in_workers

IMG_SIZE = dict(digits=8, fashion_mnist=28, imagenet64=64)   # without a flagfile; others 32
ON_DEVICE = 512 * 2 ** 20       # bytes of pixels up to which a set lives on the device
LARGEST = 2 ** 32               # bytes of pixels that a small set may be enlarged to


@dataclasses.dataclass(eq=False)
class Images:
    """A data set of `len(self)` RGB images of `img_size` x `img_size` pixels."""
    name: str
    split: str                      # 'train' or 'test'
    img_size: int
    labels: torch.Tensor            # (N,) int64 in 0..num_classes - 1
    num_classes: int
    images: torch.Tensor            # (N, 3, H, W) uint8, may be read-only
    flip: bool = True               # whether a mirrored image is still a valid one
    summary: str = ''               # one line: what was read, and what was left out
    key: str = ''                   # of the files of a memory-mapped array: see `image_cache.kept`

    def __post_init__(self):
        self.labels = torch.as_tensor(self.labels, dtype=torch.int64)
        low, high = self.labels.min().item(), self.labels.max().item()
        if len(self.images) != len(self) or low < 0 or high >= self.num_classes:
            raise UserError(f'--dataset {self.name} has {len(self.images)} images and {len(self)} '
                            f'labels from {low} to {high}, expected one for each, from 0 to '
                            f'{self.num_classes - 1}; get its files again')

    def __len__(self):
        return len(self.labels)

    @functools.cached_property
    def fingerprint(self):
        """Changes with any image, any label and their order."""
        digest = hashlib.sha256(self.labels.numpy())
        if self.key:        # stands for the pixels, which would take minutes to read
            digest.update(self.key.encode())
        else:
            for part in self.images.split(4096):
                digest.update(part.contiguous().numpy())
        return digest.hexdigest()


def make_dataset(name, root, img_size, train, num_workers=0, skip_bad_images=False):
    """The training or test split of data set `name`, whose files are in the folder `root`.

    num_workers 0: this process decodes image files; else all cores do, once.
    """
    split = 'train' if train else 'test'
    if name in ('folder', 'imagenet64'):
        where = root, split, img_size
        found = published_sets.read_batches(*where) if name == 'imagenet64' else None
        found = found or image_files.read_folder(*where, num_workers, skip_bad_images)
        return Images(name, split, img_size, **found)
    images, labels = getattr(published_sets, name)(root, split)
    # writing and shoes have a direction
    return Images(name, split, img_size, labels, 10, _resized(images, img_size, name),
                  flip=name == 'cifar10',
                  summary=f'{name}, {split}: {len(labels)} images of 10 classes')


def _resized(images, img_size, name):
    """(N, 1 or 3, H, W) in 0..255 to uint8 (N, 3, img_size, img_size), antialiased."""
    N, _, H, W = images.shape
    if N * 3 * img_size ** 2 > LARGEST:
        raise UserError(f'--img_size {img_size} is too large for --dataset {name}, whose {N} '
                        f'images have {H} x {W} pixels; choose a smaller one')
    parts = []
    for part in images.split(4096):
        if (H, W) != (img_size, img_size):
            part = F.interpolate(part.float(), img_size, mode='bilinear', antialias=True)
        parts.append(part.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts).expand(-1, 3, -1, -1)


def in_order(dataset, batch_size, device, indices):
    """Yield images uint8 (B, 3, H, W) and labels (B,) on `device`, in the order of `indices`."""
    for chunk in indices.split(batch_size):
        yield dataset.images[chunk].to(device), dataset.labels[chunk].to(device)


def indices_of_step(length, batch_size, seed, step):
    """(batch_size,) indices of the images of step 0, 1, .. in the stream of shuffled passes."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    numbers, places = positions // length, positions % length
    return torch.cat([_shuffled(length, seed, number)[places[numbers == number]]
                      for number in numbers.unique().tolist()])


@functools.lru_cache(2)
def _shuffled(length, seed, number):
    """The order of pass `number` = 0, 1, .. through the data set."""
    rng = seeding.generator('cpu', seed, seeding.ORDER, number)
    return torch.randperm(length, generator=rng)


def batches(dataset, batch_size, seed, device, start_step=0, accum=1, num_workers=0, augment=None):
    """Training batches without end: this process's rows of every step, part by part.

    Args:
        batch_size: images per step over all processes; a multiple of processes x accum.
        start_step: steps already done. accum: parts per step.
        num_workers: processes that augment, or read a set too large for the device.
        augment: function from an image, uint8 (3, H, W), and its position in the stream of all
            images to a changed image; without it, half of the images are mirrored if `flip` is set.
    Yields x_0 float32 (batch_size / processes / accum, 3, H, W) in [-1, 1] and y (same length,).
    """
    parts = ((step, distributed.rows(batch_size, micro, accum))
             for step in itertools.count(start_step) for micro in range(accum))
    loaded = _loaded(dataset, parts, batch_size, seed, device, num_workers, augment)
    for (step, rows), images, labels in loaded:
        x_0 = images.float().div_(127.5).sub_(1)
        if dataset.flip and not augment:
            rng = seeding.generator(device, seed, seeding.FLIP, step)
            mirrored = torch.rand(batch_size, generator=rng, device=device)[rows] < 0.5
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
        yield x_0, labels


def _loaded(dataset, parts, batch_size, seed, device, num_workers, augment):
    """(step, rows), images and labels of every part, on `device`."""
    def read(part):
        step, rows = part
        chosen = indices_of_step(len(dataset), batch_size, seed, step)[rows]
        images = dataset.images[chosen]
        if augment:
            first = step * batch_size + rows.start
            images = torch.stack([augment(image, i) for i, image in enumerate(images, first)])
        return part, images.numpy(), dataset.labels[chosen].numpy()     # not by shared memory

    if augment or dataset.images.numel() > ON_DEVICE:
        for part, *arrays in in_workers(read, parts, num_workers):
            yield (part, *(seeding.to_device(torch.from_numpy(array), device) for array in arrays))
        return
    images, labels = dataset.images.to(device), dataset.labels.to(device)
    for step, rows in parts:
        chosen = indices_of_step(len(dataset), batch_size, seed, step)[rows]
        chosen = seeding.to_device(chosen, device)
        yield (step, rows), images[chosen], labels[chosen]
