"""Inputs of the tests of whole scripts: teachers, a classifier, pictures; command lines."""

import torch
from PIL import Image

import oracle
from classifier.networks import build_classifier
from helpers import command
from model import UNet
from runtime import checkpoint


def random_unet(seed, conditional, T=8):
    """Weights without structure: every part of the network matters."""
    torch.manual_seed(seed)
    net = UNet(T, **oracle.NET, conditional=conditional)
    for name, p in net.named_parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape)
    return net.state_dict()


def make_inputs(folder):
    """Teachers, a classifier and pictures, as the scripts would find them."""
    teachers = dict(teacher={}, coarse=dict(T=4, time_scale=2), labels={},
                    epsilon=dict(mean_type='epsilon'))
    for name, more in teachers.items():
        state = dict(net_model=random_unet(1, name == 'labels'), T=8, time_scale=1, step=1,
                     img_size=8, mean_type='xstart')
        if name != 'coarse':        # a student: its raw weights count
            state['ema_model'] = random_unet(2, name == 'labels')
        (folder / name).mkdir()
        checkpoint.save(folder / name / 'ckpt.pt', dict(state, **more))
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
