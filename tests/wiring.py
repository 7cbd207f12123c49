"""Inputs of the wiring tests: teachers, a classifier, pictures; and comparisons of tensors."""

import functools

import numpy as np
import torch
from PIL import Image

import oracle
from classifier import build_classifier
from model import UNet
from runtime import checkpoint

# 64 channels somewhere: with 32, group norm has one channel per group and wipes out t and y
NET = dict(ch=32, ch_mult=[2, 1], attn=[1], num_res_blocks=1)
PATHS = ('base_ckpt', 'classifier_path', 'data_root', 'logdir', 'fid_cache', 'feature_network',
         'save_images', 'result_path', 'output')      # flags that name a file of these tests


def random_unet(seed, conditional, T=8):
    """Weights without structure: every part of the network matters."""
    torch.manual_seed(seed)
    net = UNet(T, **NET, conditional=conditional)
    for name, p in net.named_parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape)
    return net.state_dict()


def make_inputs(folder):
    """Teachers and a classifier, as the scripts would find them."""
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
        if name == 'stage4.norm.weight':
            value.mul_(3)
        if name == 'fc.weight':
            value.mul_(4)
    (folder / 'classifier').mkdir()
    checkpoint.save(folder / 'classifier/ckpt.pt', dict(
        model=net.state_dict(), name='convnet_small', mean=[.3, .4, .5], std=[.4, .5, .6]))


def make_photos(folder, split='train', count=24):
    """Images of 8 x 12 pixels in three classes."""
    generator = torch.Generator().manual_seed(len(split))
    for i in range(count):
        path = folder / f'{split}/{"abc"[i % 3]}/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (8, 12, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(str(path))


@functools.lru_cache(None)
def photos(folder, split='train'):
    """Images as a script must see them, the centre of each, and their labels."""
    images, labels = [], []
    for label, name in enumerate('abc'):
        for path in sorted((folder / f'{split}/{name}').iterdir()):
            pixels = torch.from_numpy(np.array(Image.open(str(path)))).permute(2, 0, 1)
            images.append(pixels[:, :, 2:10].float() / 127.5 - 1)
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def words(flags, folder):
    """Flags as words of a command line; names of inputs become their paths.

    A student of an eps teacher predicts v by default; v is not given, since it would contradict the
    teacher.
    """
    for name, value in flags.items():
        students_own = name == 'mean_type' and value == 'v' and 'base_ckpt' in flags
        if name == 'script' or value is None or students_own:
            continue
        if isinstance(value, bool):
            yield f'--{name}' if value else f'--no{name}'
            continue
        for item in value if isinstance(value, list) else [value]:
            yield f'--{name}={folder / item if name in PATHS else item}'


@functools.lru_cache(9)
def load(file):
    """A file that these tests have written; fast, because it may hold anything."""
    return torch.load(str(file), weights_only=False)


def near(found, expected, rtol, floor=1e-12):
    """Whether two tensors differ by little, measured by the length of what is expected."""
    found, expected = oracle.double(found), oracle.double(expected)
    return (found - expected).norm() <= rtol * expected.norm() + floor
