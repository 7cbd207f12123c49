"""A `UNet2DModel` of diffusers, called as our U-Net is."""

import json
from inspect import signature

import torch
from torch import nn

from formats.entries import check
from formats.packages import check_packages, first_line
from runtime.cli import UserError

RGB = (int, lambda value: value == 3, '3, for RGB images')
COUNT = (int, lambda value: 1 <= value <= 10 ** 6, 'null or a whole number from 1 to 1,000,000')
# Settings of a UNet2DModel that are checked before it is built, as in `entries.ENTRIES`
SETTINGS = dict(
    in_channels=RGB, out_channels=RGB, num_class_embeds=COUNT, num_train_timesteps=COUNT,
    class_embed_type=(str, lambda value: False, 'null: no labels, or a table of them'),
    # the logarithm in a Fourier embedding of times is not finite at time 0
    time_embedding_type=(str, lambda value: value in ('positional', 'learned'),
                         'positional or learned'),
    time_embedding_dim=(int, lambda value: 1 <= value <= 2 ** 16, 'null or a number to 65,536'),
    layers_per_block=(int, lambda value: 1 <= value <= 64, 'a whole number from 1 to 64'),
    block_out_channels=(list, lambda value: 1 <= len(value) <= 16 and all(
        type(width) is int and 1 <= width <= 2 ** 14 for width in value),
        '1 to 16 whole numbers from 1 to 16,384'))


class DiffusersUNet(nn.Module):
    """A UNet2DModel in the form that formats/load.py describes.

    Args:
        unet: the UNet2DModel. clean_end: see `Diffusion.clean_end`. With it, our time t is the
            timestep t - 1 of diffusers; without it, as for exports of our own networks, t.
    """

    in_float32 = ('unet',)      # weights stay as they are: diffusers takes its precision from them

    def __init__(self, unet, clean_end):
        super().__init__()
        self.unet, self.first = unet, int(clean_end)
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(in_precision_of_weights)
        config = {key: value for key, value in unet.config.items()
                  if key in signature(type(unet).__init__).parameters}
        self.conditional = config['num_class_embeds'] is not None
        self.class_num = config['num_class_embeds'] or 10
        self.entries = dict(unet_config=json.loads(json.dumps(dict(config, dropout=0.))))

    def forward(self, x, t, y=None):
        """Images (B, 3, H, W), times (B,) int in 1..N, labels (B,) or None -> (B, 3, H, W)."""
        return self.unet(x, t - self.first, y if self.conditional else None, return_dict=False)[0]

    def architecture(self, N):
        """The nearest to the arguments of our U-Net, for times 0..N."""
        config, widths = self.unet.config, self.unet.config['block_out_channels']
        learned = config['time_embedding_type'] == 'learned'        # a table of times
        return dict(T=config['num_train_timesteps'] if learned else N, ch=widths[0],
                    ch_mult=[width // widths[0] for width in widths],
                    attn=[i for i, name in enumerate(config['down_block_types']) if 'Attn' in name],
                    num_res_blocks=config['layers_per_block'], conditional=self.conditional,
                    class_num=self.class_num)


def in_precision_of_weights(norm, inputs):
    """A hook that gives group norm float32 under autocast, as in `model.GroupNorm`."""
    return tuple(x.to(norm.weight.dtype) for x in inputs)


def build(entries, dropout=0., where='the checkpoint'):
    """The network of a checkpoint with `unet_config`, on the meta device, without weights.

    Raises:
        UserError: its settings are unknown or impossible.
    """
    check_packages(['diffusers'])
    from diffusers import UNet2DModel
    config = entries['unet_config']
    check_config(dict(config, _class_name='UNet2DModel'), ['UNet2DModel'], SETTINGS, where)
    try:
        with torch.device('meta'):
            return DiffusersUNet(UNet2DModel(**dict(config, dropout=dropout)),
                                 isinstance(entries['schedule'], dict))
    except Exception as error:      # what is raised depends on the values
        raise UserError(f'{where} describes no network that diffusers can build '
                        f'({first_line(error)}); restore a copy')


def check_config(config, classes, table, file, ignored=()):
    """Refuse a configuration of none of these classes of diffusers, or with unexpected settings.

    Args:
        table: see `entries.check`. ignored: settings that may be there although the class has none.
    """
    import diffusers
    name = config.get('_class_name')
    if name not in classes:
        raise UserError(f'the class in {file} is {name}, expected {" or ".join(classes)}; give '
                        f'another model')
    config = {str(key): value for key, value in config.items() if value is not None}
    known = signature(getattr(diffusers, name).__init__).parameters
    unknown = sorted(key for key in set(config).difference(known, ignored) if key[:1] != '_')
    if unknown:
        raise UserError(f'{file} has {", ".join(unknown)}, which {name} of the installed diffusers '
                        f'lacks; remove it there, or install another version')
    check(config, table, file)
