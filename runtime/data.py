"""Images: the only file that knows data sets.

Small sets live as uint8 on the device and are flipped and scaled there; large ones are decoded by
a DataLoader and flipped on the device all the same. Which images make step k, and which of them
are mirrored, is a function of (seed, k) alone.
"""

import itertools
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from runtime import distributed, seeding
from runtime.options import UserError

DATASETS = ('digits', 'cifar10', 'imagenet64', 'folder')
IMG_SIZE = dict(digits=8, imagenet64=64)       # default of scripts without a flagfile; others 32
IN_MEMORY = 512 * 2 ** 20       # bytes of uint8 pixels up to which a set lives on the device


class Images(Dataset):
    """A data set of `len(self)` RGB images of `img_size` x `img_size` pixels, as uint8.

    Attributes:
        name, split: as given to `make_dataset`; split is 'train' or 'test'.
        labels: (N,) int64; num_classes; flip: whether a mirrored image is still a valid one.
        images: (N, 3, H, W) uint8 when the set is held in memory, else None.
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
    """The training or test split of data set `name`.

    Args:
        name: one of DATASETS. root: folder that holds (or will hold) its files.
        img_size: height and width in pixels. train: training split, else test split.
        num_workers: processes that decode a folder small enough to be held in memory.
        skip_bad_images: name image files that cannot be read and leave them out.
    Raises:
        UserError: unknown name; missing, empty or unusable files; no test split.
    """
    makers = dict(digits=_digits, cifar10=_cifar10, imagenet64=_imagenet64, folder=_folder)
    if name not in makers:
        raise UserError(f'--dataset {name} is unknown; choose one of {", ".join(DATASETS)}')
    dataset = makers[name](name, root, img_size, 'train' if train else 'test')
    if skip_bad_images and isinstance(dataset.decode, _Decoder):
        _leave_out_bad(dataset, num_workers)
    if dataset.images is None and len(dataset) * 3 * img_size ** 2 <= IN_MEMORY:
        dataset.images = _decode_all(dataset, num_workers)
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
    grey = torch.from_numpy(digits.images)[chosen, None].float() * (255 / 16)
    images = _resize(grey.expand(-1, 3, -1, -1), img_size)
    return Images(name, split, img_size, torch.from_numpy(digits.target)[chosen], 10,
                  images.round().to(torch.uint8), flip=False)


def _cifar10(name, root, img_size, split):
    """torchvision's CIFAR-10, downloaded once by the first process."""
    import runtime.torchvision_cpu  # noqa: F401
    from torchvision.datasets import CIFAR10
    try:
        with distributed.main_first():
            data = CIFAR10(root, train=split == 'train', download=distributed.is_main())
    except (OSError, RuntimeError) as error:
        raise UserError(f'CIFAR-10 is neither in --data_root {root} nor could it be downloaded '
                        f'({str(error).splitlines()[0]}); put cifar-10-python.tar.gz there', code=1)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Images(name, split, img_size, data.targets, 10, _resize(images, img_size))


def _split_folder(root, split):
    """root/train, root/test or root/val; without these, root itself is the training split."""
    root = Path(root).expanduser()
    names = ('train',) if split == 'train' else ('test', 'val')
    found = [root / name for name in names if (root / name).is_dir()]
    if found:
        return found[0]
    if split == 'train' and root.is_dir():
        return root
    raise UserError(f'--data_root {root} holds no {split} images: expected '
                    f'{root}/{names[0]}/<class>/*.jpg' + ('' if root.is_dir() else
                                                         ', and there is no such folder'))


class _Decoder:
    """Path number -> RGB uint8 (3, S, S): shorter side to S (antialiased), then centre crop."""

    def __init__(self, samples, img_size):
        from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize
        self.samples = samples
        self.transform = Compose([Resize(img_size, antialias=True), CenterCrop(img_size),
                                  PILToTensor()])

    def __call__(self, i):
        from PIL import Image
        try:
            with Image.open(self.samples[i][0]) as image:
                return self.transform(_rgb(image))
        except Exception as error:      # Pillow raises what it likes, for what anyone may have sent
            raise UserError(f'{self.samples[i][0]} cannot be read as an image '
                            f'({str(error).splitlines()[0]}); repair or remove it, or leave such '
                            f'files out with --skip_bad_images')

    def problem(self, i):
        """Why file number `i` cannot be read, or ''."""
        try:
            self(i)
            return ''
        except UserError as error:
            return str(error).split(';')[0]


def _rgb(image):
    """A PIL image of any mode in RGB; 16 bits are scaled to 8, which Pillow would cut off."""
    if image.mode.startswith('I'):
        from PIL import Image
        grey = (np.asarray(image) / 257).round().clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert('RGB')


class _Problems(Dataset):
    """What is wrong with each file, for a DataLoader."""

    def __init__(self, decoder):
        self.decoder = decoder

    def __len__(self):
        return len(self.decoder.samples)

    def __getitem__(self, i):
        return self.decoder.problem(i)


def _leave_out_bad(dataset, num_workers):
    """Read every file once; name those that cannot be read and take them out of `dataset`."""
    loader = _load(_Problems(dataset.decode), num_workers, batch_size=256)
    problems = [problem for part in loader for problem in part]
    for problem in filter(None, problems):
        distributed.print0(f'note: left out: {problem}.')
    good = [i for i, problem in enumerate(problems) if not problem]
    if not good:
        raise UserError(f'none of the {len(problems)} images of --dataset {dataset.name} can be '
                        f'read; see the reasons above')
    dataset.labels = dataset.labels[good]
    dataset.decode.samples = [dataset.decode.samples[i] for i in good]


def _load(dataset, num_workers, **how):
    """Batches of a DataLoader; a file that a worker cannot read is told in one sentence.

    DataLoader raises the exception of a worker anew, with the traceback as its message.
    """
    try:
        yield from DataLoader(dataset, num_workers=num_workers, worker_init_fn=_outlive_signals,
                              persistent_workers=num_workers > 0, **how)
        return
    except UserError as error:
        sentence = str(error).strip().split('UserError: ')[-1]
    raise UserError(sentence)       # outside: the workers are gone when this is told


def _outlive_signals(worker):
    """Signals to a whole group of processes leave a worker 30 s to serve the step under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def _folder(name, root, img_size, split):
    """Any tree of class folders, in sorted order."""
    import runtime.torchvision_cpu  # noqa: F401
    from torchvision.datasets import ImageFolder
    folder = _split_folder(root, split)
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError:
        raise UserError(f'{folder} holds no images, or a class folder in it is empty: expected '
                        f'{folder}/<class>/*.jpg (or png, ...)')
    return Images(name, split, img_size, found.targets, len(found.classes),
                  decode=_Decoder(found.samples, img_size))


def _imagenet64(name, root, img_size, split):
    """The official downsampled ImageNet, or class folders if its batch files are not there.

    The batch files (train_data_batch_1 .. 10, val_data; pickled or npz) are rewritten once as one
    array beside them, which is then memory-mapped: no process holds the images.
    """
    root = Path(root).expanduser()
    pattern = 'train_data_batch_*' if split == 'train' else 'val_data*'
    files = sorted((f for f in root.glob(pattern) if f.suffix in ('', '.npz')),
                   key=lambda f: (len(f.stem), f.stem))
    if not files:
        return _folder(name, root, img_size, split)
    file, labels_file = root / f'{split}_{img_size}.pixels', root / f'{split}_{img_size}.labels.npy'
    with distributed.main_first():
        if not labels_file.exists():
            _rewrite_batches(files, file, labels_file, img_size)
    labels = np.load(labels_file)
    return Images(name, split, img_size, labels, 1000,
                  decode=_Mapped(file, (len(labels), 3, img_size, img_size)))


class _Mapped:
    """Image number -> uint8 (3, H, W), from a raw file that each process maps for itself."""

    def __init__(self, file, shape):
        self.file, self.shape, self.map = file, shape, None

    def __getstate__(self):
        return dict(self.__dict__, map=None)

    def __call__(self, i):
        if self.map is None:
            self.map = np.memmap(self.file, np.uint8, 'r', shape=self.shape)
        return torch.from_numpy(self.map[i].copy())


def _rewrite_batches(files, pixels, labels, img_size):
    """Batch files to one raw file of pixels and an npy of labels, one batch in memory at a time."""
    every, temporary = [], pixels.with_suffix(f'.{os.getpid()}.tmp')      # two runs may do this
    with open(temporary, 'wb') as out:
        for file in files:
            data, y = _read_batch(file, img_size)
            np.ascontiguousarray(data).tofile(out)
            every.append(y)
    temporary.replace(pixels)
    with open(temporary, 'wb') as out:
        np.save(out, np.concatenate(every))
    temporary.replace(labels)       # last: its presence says that the pixels are complete


class _NumbersOnly(pickle.Unpickler):
    """Unpickles arrays, lists and numbers; refuses everything that could run code."""

    def find_class(self, module, name):
        if module.split('.')[0] == 'numpy' and name in ('_reconstruct', 'ndarray', 'dtype',
                                                       'scalar', '_frombuffer'):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'{module}.{name} is not allowed')


def _read_batch(file, img_size):
    """(data uint8 (n, 3 * H * W), labels 0..999 (n,)) of one official batch file."""
    expected = (f'expected data, uint8 (n, {3 * img_size ** 2}), and labels 1..1000 of '
                f'downsampled ImageNet (--img_size {img_size})')
    try:
        batch = _load_batch(file)
    except Exception as error:      # a broken pickle or zip file may raise anything
        raise UserError(f'{file} is truncated or not a batch ({file.stat().st_size} bytes, '
                        f'{type(error).__name__}): {expected}; fetch it again')
    if not {'data', 'labels'} <= set(batch):
        raise UserError(f'{file} holds {", ".join(map(str, batch)) or "nothing"}, {expected}')
    data, y = np.asarray(batch['data']), np.ravel(batch['labels'])
    fits = data.dtype == np.uint8 and data.shape == (len(y), 3 * img_size ** 2)
    if not fits or y.dtype.kind not in 'iu' or y.min(initial=1) < 1 or y.max(initial=1) > 1000:
        raise UserError(f'{file} holds data, {data.dtype} {data.shape}, and {len(y)} labels '
                        f'from {min(y, default="none")} to {max(y, default="none")}, {expected}')
    return data, y.astype(np.int64) - 1         # the official files count from 1


def _load_batch(file):
    """The dict of arrays in a batch file, pickled or npz; runs no code from it."""
    if file.suffix == '.npz':
        with np.load(file) as batch:
            return {key: batch[key] for key in batch.files}
    with open(file, 'rb') as stream:
        return dict(_NumbersOnly(stream, encoding='latin1').load())


def _decode_all(dataset, num_workers):
    """All images of a small folder as one uint8 tensor."""
    from runtime.training import progress
    images = torch.empty(len(dataset), 3, dataset.img_size, dataset.img_size, dtype=torch.uint8)
    loader = _load(dataset, num_workers, batch_size=256)
    with progress(len(dataset), f'decode {dataset.name}', unit='img') as bar:
        for i, (part, _) in enumerate(loader):
            images[256 * i:256 * i + len(part)] = part
            bar.update(len(part))
    return images


def in_order(dataset, batch_size, device, indices=None, num_workers=0):
    """Once through the data set (or through `indices` of it), without flips.

    Yields:
        images uint8 (B, 3, H, W) and labels (B,) on `device`, indices (B,) on the CPU.
    """
    indices = torch.arange(len(dataset)) if indices is None else torch.as_tensor(indices)
    chunks = indices.split(batch_size)
    if dataset.images is None:
        parts = _load(dataset, num_workers, batch_sampler=[c.tolist() for c in chunks])
    else:
        parts = ((dataset.images[c], dataset.labels[c]) for c in chunks)
    for chunk, (images, labels) in zip(chunks, parts):
        yield images.to(device), labels.to(device), chunk


class StepOrder:
    """Indices of the images of every step, for ever: one shuffled pass after another.

    Image i of step k is image number k * batch_size + i of the stream; pass e is shuffled by
    (seed, e). Iterating yields this process's indices, part by part, from `start_step` on.
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
        first, wanted, parts = step * self.batch_size, self.batch_size, []
        while wanted:
            number, offset = divmod(first, self.length)
            part = self._shuffled(number)[offset:offset + wanted]
            parts, first, wanted = parts + [part], first + len(part), wanted - len(part)
        return torch.cat(parts)

    def __iter__(self):
        for step in itertools.count(self.start_step):
            indices = self.indices(step)
            for micro in range(self.accum):
                yield indices[distributed.rows(self.batch_size, micro, self.accum)].tolist()


def batches(dataset, batch_size, seed, device, start_step=0, accum=1, flip=None, num_workers=0):
    """Training batches for ever: this process's rows of every step, part by part.

    Args:
        batch_size: images per step over all processes. start_step: steps already done.
        accum: parts per step. flip: mirror half of the images; None: if the data set allows it.
    Yields:
        x_0 float32 (batch_size / processes / accum, 3, H, W) in [-1, 1] and y (same length,).
    """
    flip = dataset.flip if flip is None else flip
    order = StepOrder(len(dataset), batch_size, seed, start_step, accum)
    loaded = _from_memory(dataset, order, device) if dataset.images is not None else _load(
        dataset, num_workers, batch_sampler=order, pin_memory=device.type == 'cuda')
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
        chosen = sent(torch.tensor(chosen), device)
        yield images[chosen], labels[chosen]


def sent(tensor, device):
    """`tensor` on `device`; from pinned memory, so that the host does not wait for a GPU."""
    if torch.device(device).type == 'cuda':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
