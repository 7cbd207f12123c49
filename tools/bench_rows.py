"""The rows of the bench that are one function each: sampling, scoring, relational losses."""

import numpy as np
import torch
import torch.nn.functional as F
from absl import flags

from diffusion import Diffusion
from losses import MemoryP2P, intra_sample_p2p
from model import UNet
from runtime import data
from runtime.optim import frozen
from runtime.precision import autocast, choose, prepare
from runtime.torchvision_cpu import torchvision
from score import ActivationStats, frechet_distance

FLAGS = flags.FLAGS
N, CHANNELS = 1024, 1920            # base grid; channels of DenseNet-201's maps


def random_unet():
    torch.manual_seed(0)
    return UNet(N, FLAGS.ch, FLAGS.ch_mult, FLAGS.attn, FLAGS.num_res_blocks, FLAGS.dropout,
                FLAGS.conditional, FLAGS.class_num)


def random_images():
    count, size = 4 * FLAGS.batch_size, FLAGS.img_size
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    return data.Images('random', 'train', size, [0] * count, FLAGS.class_num, images)


def sampling(turn, steps):
    """A batch of images in `steps` steps of a model with 8."""
    diffusion = Diffusion(8, N // 8, device=turn.device)
    network = frozen(random_unet().to(turn.device, memory_format=torch.channels_last))
    prepare(choose(FLAGS.amp, turn.device), FLAGS.compile, turn.device, network, graphs=True)
    x_T = torch.randn(FLAGS.batch_size, 3, FLAGS.img_size, FLAGS.img_size, device=turn.device)
    y = torch.zeros(len(x_T), dtype=torch.int64, device=turn.device) if FLAGS.conditional else None
    for _ in turn:
        with torch.no_grad(), autocast(FLAGS.amp, turn.device):
            diffusion.sample(network, x_T, 8 // steps, y=y)


def feature_extraction(turn):
    """Inception as score/ runs it, in float32 on both sides; random weights."""
    network = torchvision().models.inception_v3(weights=None, aux_logits=False, num_classes=1008,
                                                init_weights=False)
    network = frozen(network.to(turn.device))
    images = random_images().images[:FLAGS.batch_size].to(turn.device)
    for _ in turn:
        x = F.interpolate(images / 255, (299, 299), mode='bilinear', align_corners=False)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            network(2 * x - 1)


def frechet(features, probs, mean, cov):
    """Frechet distance of the features (B, D) of some images to known statistics."""
    stats = ActivationStats(len(features))
    stats.update(features, probs, torch.arange(len(features)))
    return frechet_distance(*stats.reduce().mean_cov(), mean, cov)


def frechet_of_random(turn, count=4096, dim=2048):
    features = torch.rand(count, dim, device=turn.device)
    probs = torch.full((count, 1008), 1 / 1008, device=turn.device)
    for _ in turn:
        frechet(features, probs, np.zeros(dim), np.eye(dim))


def relational_loss(name, device, B, size=4):
    """A function that returns (value, gradient) of a loss of B random images, all in one group.

    Maps are as the classifier makes them: (B, 1920, size, size), channels_last, not negative.
    """
    torch.manual_seed(0)
    map_T, map_S = (torch.randn(B, CHANNELS, size, size, device=device).relu_().to(
        memory_format=torch.channels_last) for _ in range(2))
    loss = intra_sample_p2p if name == 'IS_P2P' else MemoryP2P(CHANNELS).to(device)
    map_S.requires_grad_()

    def value_and_gradient():
        value = loss(map_S, map_T)
        return (value.detach(), *torch.autograd.grad(value, [map_S]))
    return value_and_gradient


def work_on(row, turn):
    """Do the work of a row once per step of `turn`."""
    if FLAGS.compile:
        torch._dynamo.reset()       # every turn compiles networks of its own
    name, _, steps = row.partition(' ')
    if row.endswith('_P2P'):
        function = relational_loss(row, turn.device, FLAGS.batch_size)
        for _ in turn:
            function()
    elif name == 'sample':
        sampling(turn, int(steps))
    else:
        dict(features=feature_extraction, frechet=frechet_of_random)[row](turn)


def images_of(row):
    """Images that a step of a row works on."""
    return 4096 if row == 'frechet' else FLAGS.batch_size
