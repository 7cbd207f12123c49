"""Names and weights of our U-Net as a `UNet2DModel` of diffusers, and back.

Both are the same network, with other names and three differences in layout: attention projects
with linear layers instead of 1x1 convolutions; the time embedding has all sines before all cosines
instead of alternating; and class labels have one table instead of a weight and a bias.
"""

import itertools
import math

import torch

from runtime.cli import UserError

RESNET = {'block1.0': 'norm1', 'block1.2': 'conv1', 'temb_proj.1': 'time_emb_proj',
          'block2.0': 'norm2', 'block2.3': 'conv2', 'shortcut': 'conv_shortcut'}
ATTENTION = {'attn.group_norm': 'group_norm', 'attn.proj_q': 'to_q', 'attn.proj_k': 'to_k',
             'attn.proj_v': 'to_v', 'attn.proj': 'to_out.0'}
TABLE = 'time_embedding.timembedding.0.weight'
# The settings of a UNet2DModel that our U-Net has and cannot change
FAMILY = dict(in_channels=3, out_channels=3, center_input_sample=False,
              time_embedding_type='positional', time_embedding_dim=None,
              mid_block_type='UNetMidBlock2D', mid_block_scale_factor=1, downsample_type='conv',
              upsample_type='conv', act_fn='silu', attention_head_dim=None, norm_num_groups=32,
              attn_norm_num_groups=None, resnet_time_scale_shift='default', add_attention=True,
              class_embed_type=None)


# Names

def _block(ours, theirs, index):
    """{our layer: theirs} in a residual block and in its attention."""
    names = {f'{ours}.{a}': f'{theirs}.resnets.{index}.{b}' for a, b in RESNET.items()}
    names.update({f'{ours}.{a}': f'{theirs}.attentions.{index}.{b}' for a, b in ATTENTION.items()})
    return names


def layer_names(levels, num_res_blocks):
    """{our layer: theirs} for a U-Net of `levels` resolutions.

    Every block is listed with attention and a shortcut, and every resolution with a resampling
    layer, whether or not a given network has them.
    """
    names = {'head': 'conv_in', 'tail.0': 'conv_norm_out', 'tail.2': 'conv_out',
             'time_embedding.timembedding.1': 'time_embedding.linear_1',
             'time_embedding.timembedding.3': 'time_embedding.linear_2'}
    for side, blocks, sampler in (('down', num_res_blocks, 'downsamplers'),
                                  ('up', num_res_blocks + 1, 'upsamplers')):
        for level in range(levels):
            first = level * (blocks + 1)        # our list has a resampling layer after each level
            for i in range(blocks):
                names.update(_block(f'{side}blocks.{first + i}', f'{side}_blocks.{level}', i))
            names[f'{side}blocks.{first + blocks}.main'] = f'{side}_blocks.{level}.{sampler}.0.conv'
    return dict(names, **_block('middleblocks.0', 'mid_block', 0),
                **_block('middleblocks.1', 'mid_block', 1))


# Weights

def to_diffusers(state_dict, arch, file='the checkpoint'):
    """State dict of our UNet -> that of a UNet2DModel.

    Args:
        arch: from `runtime.models.architecture`. file: of the weights, for messages.
    Raises:
        UserError: the time embedding is not the one that UNet2DModel computes.
    """
    names, theirs = layer_names(len(arch['ch_mult']), arch['num_res_blocks']), {}
    time_settings(state_dict[TABLE], file)
    for key, value in state_dict.items():
        layer, _, kind = key.rpartition('.')
        if layer in names:
            theirs[f'{names[layer]}.{kind}'] = _to_their_layout(names[layer], kind, value)
    if arch['conditional']:
        theirs['class_embedding.weight'] = (state_dict['y_embedding.weight'].t()
                                            + state_dict['y_embedding.bias']).contiguous()
    return theirs


def time_settings(table, file):
    """`freq_shift` and `flip_sin_to_cos` of the UNet2DModel with the time embedding in `table`.

    With a clean end, row k holds their timestep k - 1, and row 0 is never used.
    """
    rows, ch = table.shape
    for first, shift, flip in itertools.product((0, -1), (0, 1), (False, True)):
        expected = sinusoids(rows - 1, ch, shift, flip, first)[-first:]
        if (table[-first:] - expected).abs().max() < 1e-3:
            return dict(freq_shift=shift, flip_sin_to_cos=flip)
    raise UserError(f'the time embedding in {file} differs from the sinusoids of DDPM, which '
                    f'diffusers expects and computes itself; export with --format safetensors')


def from_diffusers(theirs, config, T, first=0):
    """State dict of a UNet2DModel with this `config` -> that of our UNet with T + 1 times.

    Args:
        first: their timestep at our time 0, -1 where that is the clean end.
    """
    levels, ours = len(config['block_out_channels']), {}
    names = {b: a for a, b in layer_names(levels, config['layers_per_block']).items()}
    ours[TABLE] = sinusoids(T, config['block_out_channels'][0], config['freq_shift'],
                            config['flip_sin_to_cos'], first)
    for key, value in theirs.items():
        layer, _, kind = key.rpartition('.')
        if layer != 'class_embedding':
            ours[f'{names[layer]}.{kind}'] = _to_our_layout(layer, kind, value)
    if config['num_class_embeds']:
        ours['y_embedding.weight'] = theirs['class_embedding.weight'].t().contiguous()
        ours['y_embedding.bias'] = torch.zeros(ours['y_embedding.weight'].shape[0])
    return ours


def _to_their_layout(layer, kind, value):
    """A parameter of ours in the layout of diffusers, where its layer is called `layer`."""
    if kind == 'weight' and '.to_' in layer:        # 1x1 convolution -> linear
        return value[:, :, 0, 0]
    if kind == 'weight' and layer == 'time_embedding.linear_1':     # alternating -> sin.., cos..
        return torch.cat([value[:, 0::2], value[:, 1::2]], dim=1)
    return value


def _to_our_layout(layer, kind, value):
    """The inverse of `_to_their_layout`."""
    if kind == 'weight' and '.to_' in layer:
        return value[:, :, None, None]
    if kind == 'weight' and layer == 'time_embedding.linear_1':
        return torch.stack(value.chunk(2, dim=1), dim=-1).flatten(1)
    return value


def sinusoids(T, ch, shift=0, flip=False, first=0):
    """Table of the time embedding (T + 1, ch) from time `first` on, sines and cosines alternating.

    Args:
        shift, flip: `freq_shift` and `flip_sin_to_cos` of a UNet2DModel.
    """
    if shift:
        frequency = torch.exp(-math.log(10000) * torch.arange(ch // 2) / (ch // 2 - shift))
    else:       # the operations of model.py in their order, so that the bits are equal
        frequency = torch.exp(-torch.arange(0, ch, 2) / ch * math.log(10000))
    angle = torch.arange(first, first + T + 1).float()[:, None] * frequency[None, :]
    pair = [angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()]
    return torch.stack(pair, dim=-1).view(T + 1, ch)


# Configuration

def block_types(attention):
    """(down, up) block types of a UNet2DModel; attention: one bool per resolution."""
    down = ['AttnDownBlock2D' if here else 'DownBlock2D' for here in attention]
    up = ['AttnUpBlock2D' if here else 'UpBlock2D' for here in reversed(attention)]
    return down, up


def unet_config(network, arch, img_size, file='the checkpoint'):
    """Arguments of the UNet2DModel that computes the same as our `network`.

    Args:
        arch: from `runtime.models.architecture`. file: of the network, for messages.
    Raises:
        UserError: the first resolution does not have `ch` channels, which theirs always has.
    """
    mult = arch['ch_mult']
    if mult[0] != 1:
        raise UserError(f'the network in {file} has --ch_mult {mult[0]} at its first resolution, '
                        f'where diffusers expects 1; export with --format safetensors')
    down, up = block_types([level in arch['attn'] for level in range(len(mult))])
    return dict(FAMILY, sample_size=img_size, block_out_channels=[arch['ch'] * m for m in mult],
                layers_per_block=arch['num_res_blocks'], down_block_types=down, up_block_types=up,
                dropout=0., **time_settings(network.state_dict()[TABLE], file),
                num_class_embeds=arch['class_num'] if arch['conditional'] else None,
                **network.details)


def difference(config):
    """(setting, found, expected) where a UNet2DModel is not of the family of our U-Net, or None.

    Args:
        config: of the UNet2DModel.
    """
    widths, padding = config['block_out_channels'], config['downsample_padding']
    down, up = block_types([name.startswith('Attn') for name in config['down_block_types']])
    base = widths[0] // 32 * 32 or 32       # group norm has 32 groups
    expected = dict(FAMILY, block_out_channels=[max(1, width // base) * base for width in widths],
                    down_block_types=down, up_block_types=up,
                    downsample_padding=padding if padding in (0, 1) else '0 or 1')
    for name, value in expected.items():
        found = list(config[name]) if isinstance(config[name], tuple) else config[name]
        if found != value:
            return name, found, value
    return None


def check_family(config, folder):
    """Refuse a UNet2DModel that has no equivalent in our U-Net.

    Args:
        config: of the UNet2DModel. folder: where it was found, for messages.
    Raises:
        UserError: names the setting that differs.
    """
    found = difference(config)
    if found:
        raise UserError(f'{found[0]} of the U-Net in {folder} is {found[1]}, expected {found[2]}; '
                        f'give a network of the DDPM family')
