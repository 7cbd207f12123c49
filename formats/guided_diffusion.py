"""State dicts of guided-diffusion, improved-diffusion and openai/consistency_models.

Their U-Net (Dhariwal & Nichol 2021, 2105.05233), a DhariwalUNet in EDM, is a UNet2DModel of
diffusers with other names. C is the width of an attention layer, d that of a head.
"""

import math
import re

import torch

from runtime.cli import UserError

# What the shapes do not show of the public files
GUIDED = dict(img_size=256, num_head_channels=64, beta_schedule='linear')
EDM = dict(GUIDED, new_attention_order=True)
CIFAR10 = dict(img_size=32, num_heads=4, beta_schedule='cosine', steps=4000,
               rescale_timesteps=True)
LSUN = dict(img_size=256, num_heads=1, beta_schedule='linear')
PRESETS = {
    '64x64_diffusion': dict(EDM, img_size=64, beta_schedule='cosine'),
    '256x256_diffusion': GUIDED, '256x256_diffusion_uncond': GUIDED,
    '512x512_diffusion': dict(GUIDED, img_size=512),
    'lsun_bedroom': GUIDED, 'lsun_cat': GUIDED, 'lsun_horse': GUIDED,
    'lsun_horse_nodropout': GUIDED,
    'cifar10_uncond_50M_500K': CIFAR10, 'cifar10_uncond_vlb_50M_500K': CIFAR10,
    'lsun_uncond_100M_1200K_bs128': LSUN, 'lsun_uncond_100M_2400K_bs64': LSUN,
    'edm_imagenet64_ema': dict(EDM, img_size=64), 'edm_bedroom256_ema': EDM, 'edm_cat256_ema': EDM}

ENDS = {'time_embed.0': 'time_embedding.linear_1', 'time_embed.2': 'time_embedding.linear_2',
        'label_emb': 'class_embedding', 'input_blocks.0.0': 'conv_in', 'out.0': 'conv_norm_out',
        'out.2': 'conv_out'}
LAYERS = {'in_layers.0': 'norm1', 'in_layers.2': 'conv1', 'emb_layers.1': 'time_emb_proj',
          'out_layers.0': 'norm2', 'out_layers.3': 'conv2', 'skip_connection': 'conv_shortcut',
          'norm': 'group_norm', 'proj_out': 'to_out.0', 'op': 'conv', 'conv': 'conv', 'qkv': 'qkv'}
# layers of EDM, and theirs in a block: 0 is its residual part, 1 its attention
EDM_ENDS = {'map_layer0': 'time_embed.0', 'map_layer1': 'time_embed.2', 'map_label': 'label_emb',
            'out_norm': 'out.0', 'out_conv': 'out.2'}
EDM_LAYERS = dict(norm0='0.in_layers.0', conv0='0.in_layers.2', affine='0.emb_layers.1',
                  norm1='0.out_layers.0', conv1='0.out_layers.3', skip='0.skip_connection',
                  norm2='1.norm', qkv='1.qkv', proj='1.proj_out')


def convert(state_dict, img_size, order, num_heads, num_head_channels, where):
    """(arguments of a UNet2DModel, its state dict) of a U-Net of guided-diffusion.

    Tensors that do not belong there keep their names.
    Args:
        order: of the rows of qkv: 'legacy' (heads, 3, d), 'new' (3, heads, d), 'edm' (heads, d, 3).
        num_heads, num_head_channels: of all attention layers; the one that is not given is 0.
    Raises:
        UserError: no UNet2DModel has these heads. KeyError, ValueError: it is no such U-Net.
    """
    head = head_width(state_dict, num_heads, num_head_channels, where)
    count = 1 + max(int(key.split('.')[1]) for key in state_dict if key.startswith('input_blocks'))
    per_level = blocks_per_level(state_dict, count)
    firsts = [f'input_blocks.{i}' for i in range(1, count, per_level)]
    attention = [f'{block}.1.qkv.bias' in state_dict for block in firsts]
    widths = [len(state_dict[f'{block}.0.out_layers.3.bias']) for block in firsts]
    scale_shift = len(state_dict['input_blocks.1.0.emb_layers.1.bias']) == 2 * widths[0]
    groups = min(32, widths[0] // 4) if order == 'edm' else 32
    plain = any('.op.' in key for key in state_dict)        # convolutions change the size
    down, up = ('Down', 'Up') if plain else ('ResnetDownsample', 'ResnetUpsample')
    config = dict(
        sample_size=img_size, in_channels=3, out_channels=3, block_out_channels=widths,
        layers_per_block=per_level - 1, attention_head_dim=head, norm_num_groups=groups,
        attn_norm_num_groups=groups,
        down_block_types=[f'{"AttnDown" if here else down}Block2D' for here in attention],
        up_block_types=[f'{"AttnUp" if here else up}Block2D' for here in attention[::-1]],
        downsample_type='conv' if plain else 'resnet', upsample_type='conv' if plain else 'resnet',
        resnet_time_scale_shift='scale_shift' if scale_shift else 'default',
        flip_sin_to_cos=True, freq_shift=0,
        num_class_embeds=len(state_dict.get('label_emb.weight', ())) or None)
    weights = {}
    for key, value in state_dict.items():
        layer, _, kind = key.rpartition('.')
        name = ENDS.get(layer) or place(layer, per_level)
        if name.endswith(('qkv', 'to_out.0')) and kind == 'weight':
            value = value.flatten(1)        # of a convolution with one tap
        parts = ['to_q', 'to_k', 'to_v'] if name.endswith('qkv') else ['']
        values = rows_of(value, order, head) if name.endswith('qkv') else [value]
        for part, rows in zip(parts, values):
            weights[f'{name.replace("qkv", part)}.{kind}'] = rows
    return config, weights


def blocks_per_level(state_dict, count):
    """Output blocks of a resolution, of `count` in all; there are as many input blocks.

    The last one of each but the largest has a second residual block, or a convolution, which
    doubles the size.
    """
    ends = [int(key.split('.')[1]) for key in state_dict
            if re.match(r'output_blocks\.\d+\.[12]\.(in_layers|conv)\.', key)]
    return 1 + min(ends, default=count - 1)


def head_width(state_dict, num_heads, num_head_channels, where):
    """Channels of an attention head."""
    widths = sorted({len(value) // 3 for key, value in state_dict.items()
                     if key.endswith('qkv.bias')})
    head = num_head_channels or widths[0] // num_heads
    if any(width % head or num_heads not in (0, width // head) for width in widths):
        raise UserError(f'the attention layers in {where} have {widths} channels, which '
                        f'--num_heads {num_heads} or --num_head_channels {num_head_channels} '
                        f'does not divide into heads of one width, as those of a UNet2DModel are')
    return head


def place(layer, per_level):
    """input_blocks.4.0.in_layers.0 -> down_blocks.1.resnets.0.norm1, for 3 blocks per level."""
    found = re.fullmatch(r'(input|middle|output)_blocks?\.(\d+)\.(\d\.)?(.+)', layer)
    if not found or found[4] not in LAYERS:
        return layer
    side, i, name = found[1], int(found[2]), LAYERS[found[4]]
    attention = name in ('group_norm', 'qkv', 'to_out.0')
    if side == 'middle':
        return f'mid_block.{"attentions" if attention else "resnets"}.{i // 2}.{name}'
    level, k = divmod(i - 1 if side == 'input' else i, per_level)
    down = side == 'input' and k == per_level - 1
    up = side == 'output' and found[3] != '0.' and not attention
    kind = f'{"down" if down else "up"}samplers.0' if down or up else (
        f'{"attentions" if attention else "resnets"}.{k}')
    return f'{"down" if side == "input" else "up"}_blocks.{level}.{kind}.{name}'


def rows_of(value, order, head):
    """Queries, keys and values (3, C, ..) among the rows of qkv (3 C, ..)."""
    shape, axes = dict(legacy=((-1, 3, head), (1, 0, 2)), new=((3, -1, head), (0, 1, 2)),
                       edm=((-1, head, 3), (2, 0, 1)))[order]
    rows = value.reshape(*shape, *value.shape[1:]).movedim(axes, (0, 1, 2))
    return rows.reshape(3, -1, *value.shape[1:])


def from_edm(state_dict):
    """The state dict of a DhariwalUNet of EDM with the names of guided-diffusion."""
    blocks = list(dict.fromkeys('.'.join(key.split('.')[:2]) for key in state_dict
                                if key.startswith(('enc.', 'dec.'))))
    inputs = [block for block in blocks if block.startswith('enc.')]
    outputs = [block for block in blocks if block.startswith('dec.') and '_block' in block]
    places = {block: f'input_blocks.{i}' for i, block in enumerate(inputs)}
    places.update({block: f'output_blocks.{i}' for i, block in enumerate(outputs)})
    for block, before in zip(blocks[1:], blocks):
        if block.endswith('_in0'):
            places[block] = 'middle_block'
        elif block.endswith('_in1'):
            places[block] = 'middle_block.2'
        elif block.endswith('_up'):
            places[block] = f'{places[before]}.{2 if f"{before}.qkv.weight" in state_dict else 1}'
    found = {}
    for key, value in state_dict.items():
        layer, _, kind = key.rpartition('.')
        block, _, last = layer.rpartition('.')
        value = value.t() if layer == 'map_label' else value
        if layer in places:             # the first convolution
            layer = f'{places[layer]}.0'
        elif last in EDM_LAYERS:
            single = block.endswith(('_in1', '_up'))      # without attention
            layer = f'{places[block]}.{EDM_LAYERS[last][2 * single:]}'
        if kind != 'resample_filter' and layer != 'map_augment':
            found[f'{EDM_ENDS.get(layer, layer)}.{kind}'] = value
    return found


def schedule(name, steps, rescaled):
    """The betas of a linear or cosine schedule.

    Args:
        steps: of training. rescaled: the network was given times scaled to 0..1000. Only the 1000
            of them that are whole numbers are taken, with their alpha_bar.
    """
    if name == 'linear':
        betas = torch.linspace(.1 / steps, 20 / steps, steps, dtype=torch.float64)
    else:
        f = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        f = torch.cos((f + .008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=.999)
    alpha_bar = torch.cumprod(1 - betas, 0)[::steps // 1000 if rescaled else 1]
    before = torch.cat([torch.ones(1), alpha_bar[:-1]])
    return dict(name=name, betas=(1 - alpha_bar / before).tolist())
