"""Inputs of the tests of whole scripts: teachers, a classifier, pictures; command lines."""

import torch
from PIL import Image

import oracle
from classifier.networks import build_classifier
from helpers import command
from model import UNet
from runtime import checkpoint


def random_unet(seed=0, T=8, **changes):
    """A network without structure: every part of it matters, also those that start near 0."""
    torch.manual_seed(seed)
    net = UNet(T, **dict(oracle.NET, **changes))
    for p in net.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape)
    return net


def make_inputs(folder):
    """Teachers, a classifier and pictures, as the scripts would find them."""
    teachers = dict(teacher={}, coarse=dict(T=4, time_scale=2), labels={},
                    epsilon=dict(mean_type='epsilon'))
    for name, more in teachers.items():
        net, average = (random_unet(seed, conditional=name == 'labels') for seed in (1, 2))
        if name != 'coarse':        # a student: its raw weights count
            more['ema_model'] = average.state_dict()
        save_model(folder / name, net, **more)
    torch.manual_seed(3)
    net = build_classifier('convnet_small', 10)
    for name, value in net.state_dict().items():
        if 'norm' in name and value.is_floating_point():
            value.copy_(0.5 + torch.rand(value.shape))
        if name in ('stage4.norm.weight', 'fc.weight'):
            value.mul_(4)
    (folder / 'classifier').mkdir()
    checkpoint.save(folder / 'classifier/ckpt.pt', dict(
        model=net.state_dict(), name='convnet_small', mean=[.3, .4, .5], std=[.4, .5, .6]))
    make_photos(folder / 'photos')
    make_photos(folder / 'photos', 'test', 60)


def save_model(folder, net, **entries):
    """A checkpoint of 8 steps for images of 8 pixels; `entries` come on top."""
    folder.mkdir(exist_ok=True)
    checkpoint.save(folder / 'ckpt.pt', dict(
        dict(net_model=net.state_dict(), T=8, time_scale=1, step=1, img_size=8,
             mean_type='xstart'), **entries))


def make_photos(folder, split='train', count=24):
    """Images of 8 x 12 pixels in three classes."""
    generator = torch.Generator().manual_seed(len(split))
    for i in range(count):
        path = folder / f'{split}/{"abc"[i % 3]}/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (8, 12, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(str(path))


def started(folder, flags, **how):
    """The command that runs the script of `flags` in `folder`; flags that are None are left out."""
    argv = [flags['script']]
    for name, value in flags.items():
        if name != 'script' and value is not None:
            values = value if isinstance(value, list) else [value]
            argv += [f'--{name}={item}' for item in values]
    return command(argv, cwd=str(folder), **how)


def near(found, expected, rtol, floor=1e-12):
    """Whether two tensors differ by little, measured by the length of what is expected."""
    return (found.double() - expected).norm() <= rtol * expected.norm() + floor
