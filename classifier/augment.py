"""Augmentation of the released classifiers (`Augment`) and of the plain recipe (`random_crop`)."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from runtime import data, seeding
from runtime.torchvision_cpu import torchvision


class Augment:
    """Random crop, mirroring, AutoAugment and cutout, as a function of (seed, position).

    The crop moves an image by up to an eighth of its size, over a border of grey 128. AutoAugment
    is its policy for CIFAR-10 (Cubuk et al., 1805.09501). Cutout (DeVries & Taylor, 1708.04552)
    blackens a square of half the size, 16 pixels of 32, around a random centre.

    Args:
        img_size: height and width. flip: mirror half of the images.
    """

    def __init__(self, img_size, seed, flip=True):
        t = torchvision().transforms
        self.seed, self.img_size = seed, img_size
        self.transform = t.Compose([
            t.RandomCrop(img_size, padding=img_size // 8, fill=128),
            t.RandomHorizontalFlip(.5 if flip else 0.),
            t.AutoAugment(t.AutoAugmentPolicy.CIFAR10, fill=[128] * 3)])

    def __call__(self, image, position):
        """An image, uint8 (3, H, W), changed at random; position: its place in the stream."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.mix(self.seed, seeding.AUGMENT, position))
            changed = self.transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
            row, column = torch.randint(self.img_size, (2,)).tolist()
        pixels, half = torch.from_numpy(np.array(changed)).permute(2, 0, 1), self.img_size // 4
        top, left = max(0, row - half), max(0, column - half)
        pixels[:, top:row + half, left:column + half] = 0
        return pixels.contiguous()


def random_crop(x_0, pad, total, rows, generator):
    """Shift every image of x_0 (B, 3, H, W) in [-1, 1] by up to `pad` pixels each way.

    Pixels that come in from outside are black (-1).
    Args:
        total: images of the total batch, for which the shifts are drawn.
        rows: slice of the total batch that x_0 is.
    """
    B, _, H, W = x_0.shape
    padded = F.pad(x_0, (pad,) * 4, value=-1.).permute(0, 2, 3, 1)      # (B, H + 2p, W + 2p, 3)
    corner = torch.randint(0, 2 * pad + 1, (2, total, 1), generator=generator)[:, rows]
    vertical = seeding.to_device(corner[0] + torch.arange(H), x_0.device)       # (B, H)
    horizontal = seeding.to_device(corner[1] + torch.arange(W), x_0.device)     # (B, W)
    image = torch.arange(B, device=x_0.device)[:, None, None]
    shifted = padded[image, vertical[:, :, None], horizontal[:, None, :]]
    return shifted.permute(0, 3, 1, 2).contiguous()


def measured_normalisation(dataset, most=50000):
    """Mean and std per channel, lists, of at most `most` images in [0, 1], evenly spaced."""
    chosen = torch.linspace(0, len(dataset) - 1, min(len(dataset), most)).round().long()
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for images, _ in data.in_order(dataset, 512, 'cpu', chosen):
        pixels = images.double() / 255
        sums += torch.stack([pixels.mean((2, 3)).sum(0), pixels.square().mean((2, 3)).sum(0)])
    mean, square = sums / len(chosen)
    std = (square - mean.square()).clamp(min=1e-4).sqrt()
    return [round(v, 4) for v in mean.tolist()], [round(v, 4) for v in std.tolist()]
