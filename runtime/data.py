"""Data sets, and which of their images make a training step.

Small sets live as uint8 on the device; the images of large ones are decoded by the workers of a
DataLoader. Both are scaled and flipped on the device. Which images make step k, and which of them
are mirrored, is a function of (seed, k) alone.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from runtime import distributed, idx_files, image_files, imagenet_batches, seeding
from runtime.cli import UserError
from runtime.loader import load
from runtime.image_cache import decoded
from runtime.torchvision_cpu import torchvision

DATASETS = ('digits', 'fashion_mnist', 'cifar10', 'imagenet64', 'folder')
IMG_SIZE = dict(digits=8, fashion_mnist=28, imagenet64=64)   # without a flagfile; others 32
IN_MEMORY = 512 * 2 ** 20       # bytes of uint8 pixels up to which a set lives on the device


class Images(Dataset):
    """A data set of `len(self)` RGB images of `img_size` x `img_size` pixels, as uint8.

    Attributes:
        name, split: as given to `make_dataset`; split is 'train' or 'test'.
        labels: (N,) int64 in 0..num_classes - 1. num_classes: number of classes.
        flip: whether a mirrored image is still a valid one.
        images: (N, 3, H, W) uint8 when the set is held in memory, else None.
        decode: function from an index to uint8 (3, H, W); called when `images` is None.
    """

    def __init__(self, name, split, img_size, labels, num_classes, images=None, decode=None,
                 flip=True):
        self.name, self.split, self.img_size, self.flip = name, split, img_size, flip
        self.labels, self.num_classes = torch.as_tensor(labels, dtype=torch.int64), num_classes
        self.images, self.decode = images, decode

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """(image uint8 (3, H, W), label) of index `i`."""
        return (self.decode(i) if self.images is None else self.images[i]), self.labels[i]


def make_dataset(name, root, img_size, train, num_workers=0, skip_bad_images=False):
    """The training or test split of data set `name`, as `Images`.

    Args:
        name: one of DATASETS. root: folder that holds (or will hold) its files.
        img_size: height and width in pixels. train: training split, else test split.
        num_workers: processes that decode a folder small enough to be held in memory.
        skip_bad_images: read every image file once, name those that cannot be read and leave
            them out.
    Raises:
        UserError: unknown name; missing, empty or unusable files; no test split; CIFAR-10 or
            Fashion-MNIST could not be downloaded (code 1).
    """
    makers = dict(digits=_digits, fashion_mnist=_fashion_mnist, cifar10=_cifar10,
                  imagenet64=_imagenet64, folder=_folder)
    if name not in makers:
        raise UserError(f'--dataset {name} is unknown; choose one of {", ".join(DATASETS)}')
    dataset = makers[name](name, root, img_size, 'train' if train else 'test')
    if skip_bad_images and isinstance(dataset.decode, image_files.Decoder):
        _leave_out_bad(dataset, num_workers)
    if dataset.images is None and len(dataset) * 3 * img_size ** 2 <= IN_MEMORY:
        files = isinstance(dataset.decode, image_files.Decoder)
        dataset.images = decoded(dataset, num_workers) if files else dataset.decode.all()
    return dataset


def _resize(images, img_size):
    """uint8 (N, 3, H, W) to (N, 3, img_size, img_size), antialiased."""
    if images.shape[-1] == img_size:
        return images
    size = (img_size, img_size)
    out = F.interpolate(images.float(), size, mode='bilinear', antialias=True, align_corners=False)
    return out.round_().clamp_(0, 255).to(torch.uint8)


def _digits(name, root, img_size, split):
    """scikit-learn's 1797 handwritten digits (8x8, 17 grey levels); every sixth is for testing."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    chosen = (torch.arange(len(digits.target)) % 6 == 5) == (split == 'test')
    images = torch.from_numpy(digits.images)[chosen].float() * (255 / 16)
    return _grey(name, split, images, torch.from_numpy(digits.target)[chosen], img_size)


def _fashion_mnist(name, root, img_size, split):
    """Fashion-MNIST (Xiao et al. 2017), 28 x 28: its idx.gz files in `root`, or torchvision's."""
    files = idx_files.find(root, split)
    if files:
        images, labels = idx_files.read(files[0], 3), idx_files.read(files[1], 1)
        if len(labels) != len(images):
            raise UserError(f'--data_root {root} has {len(images)} {split} images of {name} and '
                            f'{len(labels)} labels; get its files again')
    else:
        try:
            with distributed.main_first():
                data = torchvision().datasets.FashionMNIST(root, train=split == 'train',
                                                           download=distributed.is_main())
        except (OSError, RuntimeError) as error:
            reason = str(error).split('\n')[0].rstrip(':')
            raise UserError(f'Fashion-MNIST is neither in --data_root {root} nor could it be '
                            f'downloaded ({reason}); put {", ".join(idx_files.names(split))} '
                            f'there', code=1)
        images, labels = data.data, data.targets
    return _grey(name, split, images, labels, img_size)


def _grey(name, split, images, labels, img_size):
    """`Images` of 10 classes from grey ones (N, H, W); writing and shoes have a direction."""
    if len(images) * 3 * img_size ** 2 > IN_MEMORY:
        largest = int((IN_MEMORY / 3 / len(images)) ** .5)
        raise UserError(f'--img_size {img_size} is too large for --dataset {name}, whose images '
                        f'have {images.shape[1]} x {images.shape[2]} pixels; choose at most '
                        f'{largest}')
    small = torch.cat([_resize(part[:, None], img_size).round().to(torch.uint8)
                       for part in images.split(4096)])
    return Images(name, split, img_size, labels, 10, small.expand(-1, 3, -1, -1), flip=False)


def _cifar10(name, root, img_size, split):
    """torchvision's CIFAR-10, downloaded once by the first process."""
    try:
        with distributed.main_first():
            data = torchvision().datasets.CIFAR10(root, train=split == 'train',
                                                  download=distributed.is_main())
    except (OSError, RuntimeError) as error:
        reason = str(error).split('\n')[0]
        raise UserError(f'CIFAR-10 is neither in --data_root {root} nor could it be downloaded '
                        f'({reason}); put cifar-10-python.tar.gz there', code=1)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Images(name, split, img_size, data.targets, 10, _resize(images, img_size))


def _folder(name, root, img_size, split):
    """Any tree of class folders, in sorted order."""
    paths, labels, num_classes = image_files.find_images(root, split)
    return Images(name, split, img_size, labels, num_classes,
                  decode=image_files.Decoder(paths, img_size))


def _imagenet64(name, root, img_size, split):
    """The official downsampled ImageNet, or class folders if its batch files are not there."""
    files = imagenet_batches.find_batches(root, split)
    if not files:
        return _folder(name, root, img_size, split)
    labels, decode = imagenet_batches.open_batches(files, split, img_size)
    return Images(name, split, img_size, labels, 1000, decode=decode)


def _leave_out_bad(dataset, num_workers):
    """Read every file once; name those that cannot be read and take them out of `dataset`."""
    problems = None
    if distributed.is_main():
        problems = image_files.find_problems(dataset.decode, num_workers)
    problems = distributed.broadcast_object(problems)
    for problem in filter(None, problems):
        distributed.print0(f'note: left out: {problem}.')
    good = [i for i, problem in enumerate(problems) if not problem]
    if not good:
        raise UserError(f'none of the {len(problems)} images of --dataset {dataset.name} can be '
                        f'read; see the reasons above')
    dataset.labels = dataset.labels[good]
    dataset.decode.paths = [dataset.decode.paths[i] for i in good]


def in_order(dataset, batch_size, device, indices=None, num_workers=0):
    """Once through the data set (or through `indices` of it), without flips.

    Args:
        dataset: `Images`. batch_size: B; the last batch may be smaller.
        indices: (n,) integers. num_workers: processes that decode a set not held in memory.
    Yields:
        images uint8 (B, 3, H, W) and labels (B,) on `device`, indices (B,) on the CPU.
    Raises:
        UserError: an image file cannot be read.
    """
    indices = torch.arange(len(dataset)) if indices is None else torch.as_tensor(indices)
    chunks = indices.split(batch_size)
    if dataset.images is None:
        parts = load(dataset, num_workers, batch_sampler=[c.tolist() for c in chunks])
    else:
        parts = ((dataset.images[c], dataset.labels[c]) for c in chunks)
    for chunk, (images, labels) in zip(chunks, parts):
        yield images.to(device), labels.to(device), chunk


class StepOrder:
    """Indices of the images of every step, without end: one shuffled pass after another.

    The passes form one stream of indices, and step k takes those from k * batch_size on. Pass e is
    shuffled by (seed, e). Iterating yields lists: this process's indices, part by part of each
    step (see `distributed.rows`), from `start_step` on.
    """

    def __init__(self, length, batch_size, seed, start_step=0, accum=1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start_step, self.accum = start_step, accum
        self._pass = (None, None)

    def _shuffled(self, number):
        if self._pass[0] != number:
            rng = seeding.generator('cpu', self.seed, seeding.ORDER, number)
            self._pass = (number, torch.randperm(self.length, generator=rng))
        return self._pass[1]

    def indices(self, step):
        """(batch_size,) indices of the total batch of `step`."""
        position, missing, parts = step * self.batch_size, self.batch_size, []
        while missing:
            number, offset = divmod(position, self.length)
            part = self._shuffled(number)[offset:offset + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
        return torch.cat(parts)

    def __iter__(self):
        for step in itertools.count(self.start_step):
            indices = self.indices(step)
            for micro in range(self.accum):
                yield indices[distributed.rows(self.batch_size, micro, self.accum)].tolist()


class _Augmented(Dataset):
    """`Images` changed by augment(image, position), read by keys (position, index)."""

    def __init__(self, dataset, augment):
        self.dataset, self.augment = dataset, augment

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        position, i = key
        image, label = self.dataset[i]
        return self.augment(image, position), label


def _with_positions(order):
    """The lists of `StepOrder` as [(position in the stream of images, index), ..]."""
    total = order.batch_size
    for number, indices in enumerate(order, order.start_step * order.accum):
        step, micro = divmod(number, order.accum)
        first = step * total + distributed.rows(total, micro, order.accum).start
        yield list(enumerate(indices, first))


def batches(dataset, batch_size, seed, device, start_step=0, accum=1, flip=None, num_workers=0,
            augment=None):
    """Training batches without end: this process's rows of every step, part by part.

    Args:
        dataset: `Images`. batch_size: images per step over all processes; a multiple of
            processes x accum. device: `torch.device` of the batches.
        start_step: steps already done. accum: parts per step.
        flip: mirror half of the images; None: if the data set allows it.
        num_workers: processes that decode a set not held in memory, or augment.
        augment: function from an image, uint8 (3, H, W), and its position in the stream of all
            images to a changed image; takes the place of `flip`.
    Yields:
        x_0 float32 (batch_size / processes / accum, 3, H, W) in [-1, 1] and y (same length,).
    Raises:
        UserError: an image file cannot be read.
    """
    flip = dataset.flip if flip is None else flip
    order = StepOrder(len(dataset), batch_size, seed, start_step, accum)
    pinned = device.type == 'cuda'
    if augment:
        flip, loaded = False, load(_Augmented(dataset, augment), num_workers, pin_memory=pinned,
                                   batch_sampler=_with_positions(order))
    elif dataset.images is None:
        loaded = load(dataset, num_workers, batch_sampler=order, pin_memory=pinned)
    else:
        loaded = _from_memory(dataset, order, device)
    for number, (images, labels) in enumerate(loaded, start_step * accum):
        step, micro = divmod(number, accum)
        x_0 = images.to(device, non_blocking=True).float().div_(127.5).sub_(1)
        if flip:
            rng = seeding.generator(device, seed, seeding.FLIP, step)
            mirrored = torch.rand(batch_size, generator=rng, device=device) < 0.5
            mirrored = mirrored[distributed.rows(batch_size, micro, accum)]
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
        yield x_0, labels.to(device, non_blocking=True)


def _from_memory(dataset, order, device):
    images, labels = dataset.images.to(device), dataset.labels.to(device)
    for chosen in order:
        chosen = seeding.sent(torch.tensor(chosen), device)
        yield images[chosen], labels[chosen]
