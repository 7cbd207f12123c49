"""Our U-Net as a `UNet2DModel` of diffusers.

Both are the same network, with other names and three differences in layout: attention projects
with linear layers instead of 1x1 convolutions; the time embedding has all sines before all cosines
instead of alternating; and class labels have one table instead of a weight and a bias.
"""

import torch

from model import TimeEmbedding
from runtime.cli import UserError

ENDS = {'head': 'conv_in', 'tail.0': 'conv_norm_out', 'tail.2': 'conv_out',
        'time_embedding.timembedding.1': 'time_embedding.linear_1',
        'time_embedding.timembedding.3': 'time_embedding.linear_2'}
RESNET = {'block1.0': 'norm1', 'block1.2': 'conv1', 'temb_proj.1': 'time_emb_proj',
          'block2.0': 'norm2', 'block2.3': 'conv2', 'shortcut': 'conv_shortcut'}
ATTENTION = {'attn.group_norm': 'group_norm', 'attn.proj_q': 'to_q', 'attn.proj_k': 'to_k',
             'attn.proj_v': 'to_v', 'attn.proj': 'to_out.0'}
TABLE = 'time_embedding.timembedding.0.weight'


def convert(model):
    """The UNet2DModel that computes the same as the `UNet` of a `formats.load.Model`.

    Raises:
        UserError: diffusers has no such network.
    """
    from diffusers import UNet2DModel
    state_dict = model.network.state_dict()
    check_times(state_dict[TABLE], model.diffusion.clean_end, model.file)
    unet = UNet2DModel(**unet_config(model.arch, model.img_size, model.file))
    unet.load_state_dict(to_diffusers(state_dict, model.arch))
    return unet


def unet_config(arch, img_size, file='the checkpoint'):
    """Arguments of the UNet2DModel that computes the same as the U-Net with arguments `arch`.

    Raises:
        UserError: the first resolution does not have `ch` channels, which theirs always has.
    """
    mult = arch['ch_mult']
    if mult[0] != 1:
        raise UserError(f'the network in {file} has --ch_mult {mult[0]} at its first resolution, '
                        f'where diffusers expects 1; export with --format safetensors')
    attention = [level in arch['attn'] for level in range(len(mult))]
    return dict(
        sample_size=img_size, block_out_channels=[arch['ch'] * m for m in mult],
        layers_per_block=arch['num_res_blocks'],
        down_block_types=['AttnDownBlock2D' if here else 'DownBlock2D' for here in attention],
        up_block_types=['AttnUpBlock2D' if here else 'UpBlock2D' for here in attention[::-1]],
        num_class_embeds=arch['class_num'] if arch['conditional'] else None,
        attention_head_dim=None, freq_shift=0, flip_sin_to_cos=False)


def check_times(table, clean_end, file):
    """Refuse a time embedding other than the sinusoids that UNet2DModel computes itself.

    Where index 0 is the clean image, row k has those of their timestep k - 1.
    """
    expected = TimeEmbedding(len(table) - 1, table.shape[1], 1).timembedding[0].weight
    found = table[1:] if clean_end else table
    if (found - expected[:len(found)]).abs().max() > 1e-3:
        raise UserError(f'the time embedding in {file} differs from the sinusoids of DDPM, which '
                        f'diffusers computes itself; export with --format safetensors')


def to_diffusers(state_dict, arch):
    """State dict of our UNet with arguments `arch` -> that of a UNet2DModel."""
    theirs = {}
    for key, value in state_dict.items():
        layer, _, kind = key.rpartition('.')
        if key == TABLE or layer == 'y_embedding':
            continue
        name = their_layer(layer, arch['num_res_blocks'])
        if kind == 'weight' and '.to_' in name:     # 1x1 convolution -> linear
            value = value[:, :, 0, 0]
        if kind == 'weight' and name == 'time_embedding.linear_1':  # alternating -> sin.., cos..
            value = torch.cat([value[:, 0::2], value[:, 1::2]], dim=1)
        theirs[f'{name}.{kind}'] = value
    if arch['conditional']:
        theirs['class_embedding.weight'] = (state_dict['y_embedding.weight'].t()
                                            + state_dict['y_embedding.bias'])
    return theirs


def their_layer(layer, num_res_blocks):
    """downblocks.4.block1.0 -> down_blocks.1.resnets.1.norm1, for two blocks per resolution."""
    if layer in ENDS:
        return ENDS[layer]
    blocks, index, rest = layer.split('.', 2)
    side, place, number = blocks[:-len('blocks')], 'mid_block', int(index)
    if side != 'middle':        # our list has a resampling layer after the blocks of a resolution
        level, number = divmod(number, num_res_blocks + (1 if side == 'down' else 2))
        place = f'{side}_blocks.{level}'
    if rest == 'main':
        return f'{place}.{side}samplers.0.conv'
    if rest in ATTENTION:
        return f'{place}.attentions.{number}.{ATTENTION[rest]}'
    return f'{place}.resnets.{number}.{RESNET[rest]}'
