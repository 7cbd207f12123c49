"""A diffusion model, the entries of its checkpoint, and the values that are accepted there."""

import copy
import reprlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from diffusion import Diffusion
from model import UNet
from runtime.cli import UserError
from runtime.flags import MEAN_TYPES

TRAINING = ('method', 'step', 'dataset', 'batch_size', 'seed', 'flags', 'origin', 'license')


@dataclass
class Model:
    """A frozen network with its schedule."""
    network: nn.Module
    diffusion: Diffusion    # on the device of the network
    file: Path              # named in messages; its folder gets results.jsonl
    weights_name: str       # entry of the checkpoint with its weights: net_model or ema_model
    arch: dict              # arguments of our U-Net, or the nearest to them
    img_size: int           # height and width of its images
    entries: dict           # other entries of its checkpoint, such as method, step, flags

    def to(self, device):
        """The model with its network, in channels_last memory, and its schedule on `device`."""
        self.network.to(device, memory_format=torch.channels_last)
        self.diffusion = Diffusion(**self.diffusion.arguments(), device=device)
        return self

    def trainable(self):
        """A copy of the network to train."""
        network = copy.deepcopy(self.network).train().requires_grad_(True)
        if isinstance(network, UNet):
            network.time_embedding.timembedding[0].requires_grad_(False)    # no parameter: a table
        return network

    def provenance(self):
        """How it was trained: {entry of `TRAINING`: value} for those it has."""
        return {key: self.entries[key] for key in TRAINING if key in self.entries}


def betas_of(alpha_bar):
    """[beta] of times 1..N behind a clean image, from their alpha_bar (N,)."""
    return (1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])).tolist()


def are_betas(value):
    """Numbers with 1 > alpha_bar > 0 at every time; alpha_bar of the last may be 0 (zero SNR)."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST:
        return False
    if not {type(beta) for beta in value} <= {int, float}:
        return False
    betas = torch.tensor(value, dtype=torch.float32)
    alpha_bar = torch.cumprod(1 - betas, 0)
    return bool((betas >= 0).all() and alpha_bar[0] < 1 and (alpha_bar[:-1] > 0).all()
                and alpha_bar[-1] >= 0)


def is_schedule(value):
    if isinstance(value, dict):
        return isinstance(value.get('name'), str) and are_betas(value.get('betas'))
    return value == 'cosine'


MOST = 10 ** 6
NUMBER = (int, lambda value: 1 <= value <= MOST, 'a whole number from 1 to 1,000,000')
COUNT = (int, lambda value: value >= 0, 'a whole number')
TEXT = (str, lambda value: True, 'text')
# entry: (its type, whether a value of this type is accepted, what is expected)
ENTRIES = dict(
    T=NUMBER, time_scale=NUMBER, N=NUMBER,
    schedule=(object, is_schedule, 'cosine, or a name with betas in (0, 1)'),
    mean_type=(str, lambda value: value in MEAN_TYPES, ' or '.join(MEAN_TYPES)),
    use=(str, lambda value: value in ('net_model', 'ema_model'), 'net_model or ema_model'),
    img_size=(int, lambda value: 1 <= value <= 4096, 'a whole number from 1 to 4096'),
    x_T=(torch.Tensor, lambda value: value.ndim == 4 and value.shape[2] == value.shape[3] > 0,
         'noise of shape (B, 3, H, H)'),
    unet_config=(dict, lambda value: True, 'the arguments of a UNet2DModel'),
    edm=(dict, lambda value: True, 'the arguments of a network of EDM'),
    step=COUNT, seed=COUNT, batch_size=COUNT, method=TEXT, dataset=TEXT, flags=TEXT, origin=TEXT,
    license=TEXT)


def check(values, table, file):
    """Refuse a dictionary read from `file` with an unexpected value in an entry of `table`."""
    for key, (kind, accepted, expected) in table.items():
        value = values.get(key)
        if key in values and not (kind in (object, type(value)) and accepted(value)):
            raise UserError(f'{key} in {file} is {brief(value)}, expected {expected}; restore a '
                            f'copy, or give another model')


def brief(value):
    """A value of any kind in a few words, for messages."""
    if torch.is_tensor(value):
        return f'a tensor of shape {tuple(value.shape)}'
    return ' '.join(reprlib.repr(value).split())
