"""The augmentation that the released classifiers were trained with."""

import numpy as np
import torch
from PIL import Image

from runtime import seeding
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
            centre = torch.randint(self.img_size, (2,)).tolist()
        pixels = torch.from_numpy(np.array(changed)).permute(2, 0, 1).contiguous()
        return cutout(pixels, *centre, self.img_size // 2)


def cutout(image, row, column, length):
    """Blacken a square of `length` pixels around (row, column), cut off at the border; in place."""
    top, left = max(0, row - length // 2), max(0, column - length // 2)
    image[:, top:row + length // 2, left:column + length // 2] = 0
    return image
