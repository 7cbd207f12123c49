"""The rate of the machine's convolutions, and what share of it a training step reaches."""

import statistics

import torch
import torch.nn.functional as F

from classifier import build_classifier
from model import UNet
from runtime.precision import autocast
from tools.estimate import counted, of_step
from tools.measure import now

REPEATS = 5


def operations(row, flags):
    """Floating-point operations of a step of a training row, all images together."""
    with torch.device('meta'):
        x = torch.empty(1, 3, flags.img_size, flags.img_size)
        t = torch.zeros(1, dtype=torch.int64)
        unet = UNet(8, flags.ch, flags.ch_mult, flags.attn, flags.num_res_blocks)
        classifier = build_classifier(flags.classifier, 10).eval().to('meta')
    per_image = of_step(row, counted(unet, x, t), counted(classifier, x))
    return flags.batch_size * per_image


def rate(flags, device):
    """Operations per second of the U-Net's 3x3 convolutions alone, forward and backward.

    One for each resolution, with its channels and the batch of a step.
    """
    work, seconds = 0, 0.
    for level, mult in enumerate(flags.ch_mult):
        channels, size = flags.ch * mult, flags.img_size >> level
        x, weight = (torch.randn(*shape, device=device).to(memory_format=torch.channels_last)
                     .requires_grad_() for shape in ((flags.batch_size, channels, size, size),
                                                     (channels, channels, 3, 3)))
        work += 3 * 2 * flags.batch_size * size ** 2 * channels ** 2 * 9
        seconds += statistics.median(timed(x, weight, flags.amp) for _ in range(REPEATS))
    return work / seconds


def timed(x, weight, amp):
    since = now(x.device)
    with autocast(amp, x.device):
        out = F.conv2d(x, weight, padding=1)
    torch.autograd.grad(out, [x, weight], torch.ones_like(out))
    return now(x.device) - since
