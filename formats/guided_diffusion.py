"""State dicts of guided-diffusion, improved-diffusion, openai/consistency_models and ADM of EDM.

Their U-Net (Dhariwal & Nichol 2021, 2105.05233), a DhariwalUNet in EDM, is a UNet2DModel of
diffusers with other names. C is the width of an attention layer, d that of a head.
"""

import re
from functools import partial

import torch
import torch.nn.functional as F

from diffusion import alpha_bar_table
from formats import edm
from formats.entries import betas_of
from formats.load import choose_weights, kind_of_file
from runtime import checkpoint
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
    'lsun_bedroom': GUIDED, 'lsun_cat': GUIDED, 'lsun_horse': GUIDED,
    'lsun_horse_nodropout': GUIDED,
    'cifar10_uncond_50M_500K': CIFAR10, 'cifar10_uncond_vlb_50M_500K': CIFAR10,
    'lsun_uncond_100M_1200K_bs128': LSUN, 'lsun_uncond_100M_2400K_bs64': LSUN,
    'edm_imagenet64_ema': dict(EDM, img_size=64), 'edm_bedroom256_ema': EDM, 'edm_cat256_ema': EDM}

# {layer: that of diffusers}; {last part of a layer in a block: that of diffusers}
ENDS = {'time_embed.0': 'time_embedding.linear_1', 'time_embed.2': 'time_embedding.linear_2',
        'label_emb': 'class_embedding', 'input_blocks.0.0': 'conv_in', 'out.0': 'conv_norm_out',
        'out.2': 'conv_out',
        # EDM
        'map_layer0': 'time_embedding.linear_1', 'map_layer1': 'time_embedding.linear_2',
        'map_label': 'class_embedding', 'out_norm': 'conv_norm_out', 'out_conv': 'conv_out'}
LAYERS = {'in_layers.0': 'norm1', 'in_layers.2': 'conv1', 'emb_layers.1': 'time_emb_proj',
          'out_layers.0': 'norm2', 'out_layers.3': 'conv2', 'skip_connection': 'conv_shortcut',
          'norm': 'group_norm', 'qkv': 'qkv', 'proj_out': 'to_out.0', 'op': 'conv', 'conv': 'conv',
          # EDM
          'norm0': 'norm1', 'conv0': 'conv1', 'affine': 'time_emb_proj', 'norm1': 'norm2',
          'conv1': 'conv2', 'skip': 'conv_shortcut', 'norm2': 'group_norm', 'proj': 'to_out.0'}
ATTENTION = 'group_norm', 'qkv', 'to_out.0'


def teacher(file, kind, img_size, num_heads, num_head_channels, new_attention_order, beta_schedule,
            steps, rescale_timesteps, predict_xstart):
    """(entries of a checkpoint, weights) of a file; arguments as the flags of convert.py."""
    if re.match('c[dt]_', file.stem):
        raise UserError(f'{file} has the name of a consistency model, which makes images in one '
                        f'step and is no teacher; give edm_imagenet64_ema.pt or another one')
    state_dict = checkpoint.read(file)
    if 'input_blocks.0.0.weight' not in state_dict:
        raise UserError(f'{file} is {kind_of_file(state_dict)}; give the weights of a U-Net of '
                        f'guided-diffusion, such as ema_0.9999_100000.pt')
    if kind == 'guided_diffusion' and rescale_timesteps and steps % 1000:
        raise UserError(f'--steps is {steps} with --rescale_timesteps, expected a multiple of '
                        f'1000, so that scaled times are whole numbers')
    _, weights = choose_weights(dict(net_model=state_dict), 'net', file)
    preconditioning = kind if kind == 'consistency_models' else None
    config, unet = convert(weights, img_size, 'new' if new_attention_order else 'legacy', num_heads,
                           num_head_channels, file, preconditioning)
    if preconditioning:
        entries = edm.entries(preconditioning, steps)
    else:
        entries = dict(mean_type='xstart' if predict_xstart else 'epsilon',
                       schedule=schedule(beta_schedule, steps, rescale_timesteps))
    return dict(entries, unet_config=config, img_size=img_size), unet


def convert(state_dict, img_size, order, num_heads, num_head_channels, where, preconditioning):
    """(arguments of a UNet2DModel, weights of a network that has it) for one of these state dicts.

    Tensors that do not belong there keep their names.
    Args:
        order: of the rows of qkv: 'legacy' (heads, 3, d) or 'new' (3, heads, d); 'edm' (heads, d,
            3), where all names are those of EDM.
        num_heads, num_head_channels: of all attention layers; the one that is not given is 0.
        preconditioning: of EDM; None for a network without one.
    Raises:
        KeyError, ValueError: it is no such U-Net.
    """
    head = head_width(state_dict, num_heads, num_head_channels, where)
    if order == 'edm':
        sizes = {int(key.split('.')[1].split('x')[0]) for key in state_dict if key[:4] == 'enc.'}
        name_of = partial(name_of_edm, sizes=sorted(sizes, reverse=True))
    else:
        name_of = partial(name_of_guided, per_level=blocks_per_level(state_dict))
    unet = {}
    for key, value in state_dict.items():
        layer, _, kind = key.rpartition('.')
        name = name_of(layer)
        if kind == 'resample_filter' or layer == 'map_augment':
            continue
        if name == 'class_embedding':
            value = value.t() if order == 'edm' else value
            value = F.pad(value, (0, 0, 0, 1)) if preconditioning else value     # no label
        if name == 'conv_out' and len(value) == 6 and not preconditioning:
            value = value[:3]           # without the variance
        if name.endswith(('qkv', 'to_out.0')) and kind == 'weight':
            value = value.flatten(1)        # of a convolution with one tap
        if name.endswith('qkv'):
            for part, rows in zip('qkv', rows_of(value, order, head)):
                unet[f'{name[:-len("qkv")]}to_{part}.{kind}'] = rows
        else:
            unet[f'{name}.{kind}'] = value
    prefix = 'model.unet' if preconditioning else 'unet'
    return (arguments(unet, img_size, head, order),
            {f'{prefix}.{key}': value for key, value in unet.items()})


def arguments(unet, img_size, head, order):
    """Those of the UNet2DModel with the state dict `unet`."""
    levels = range(len({key.split('.')[1] for key in unet if key.startswith('down_blocks.')}))
    widths = [len(unet[f'down_blocks.{i}.resnets.0.conv2.bias']) for i in levels]
    attention = [f'down_blocks.{i}.attentions.0.to_q.bias' in unet for i in levels]
    layers = re.compile(r'down_blocks\.0\.resnets\.\d+\.conv2\.bias')
    scale_shift = len(unet['down_blocks.0.resnets.0.time_emb_proj.bias']) == 2 * widths[0]
    groups = min(32, widths[0] // 4) if order == 'edm' else 32
    plain = 'down_blocks.0.downsamplers.0.conv.bias' in unet    # convolutions change the size
    down, up = ('Down', 'Up') if plain else ('ResnetDownsample', 'ResnetUpsample')
    return dict(
        sample_size=img_size, in_channels=3, out_channels=3, block_out_channels=widths,
        layers_per_block=len(list(filter(layers.fullmatch, unet))), attention_head_dim=head,
        norm_num_groups=groups, attn_norm_num_groups=groups,
        down_block_types=[f'{"AttnDown" if here else down}Block2D' for here in attention],
        up_block_types=[f'{"AttnUp" if here else up}Block2D' for here in attention[::-1]],
        downsample_type='conv' if plain else 'resnet', upsample_type='conv' if plain else 'resnet',
        resnet_time_scale_shift='scale_shift' if scale_shift else 'default',
        flip_sin_to_cos=True, freq_shift=0,
        num_class_embeds=len(unet.get('class_embedding.weight', ())) or None)


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


def blocks_per_level(state_dict):
    """Output blocks of a resolution; there are as many input blocks.

    The last one of each but the largest has a second residual block, or a convolution, which
    doubles the size.
    """
    ends = [int(key.split('.')[1]) for key in state_dict
            if re.match(r'output_blocks\.\d+\.[12]\.(in_layers|conv)\.', key)]
    count = len({key.split('.')[1] for key in state_dict if key.startswith('output_blocks')})
    return 1 + min(ends, default=count - 1)


def name_of_guided(layer, per_level):
    """input_blocks.4.0.in_layers.0 -> down_blocks.1.resnets.0.norm1, for 3 blocks per level."""
    found = re.fullmatch(r'(input|middle|output)_blocks?\.(\d+)\.(\d\.)?(.+)', layer)
    if layer in ENDS or not found or found[4] not in LAYERS:
        return ENDS.get(layer, layer)
    side, i, name = found[1], int(found[2]), LAYERS[found[4]]
    kind = 'attentions' if name in ATTENTION else 'resnets'
    if side == 'middle':
        return f'mid_block.{kind}.{i // 2}.{name}'
    level, k = divmod(i - 1 if side == 'input' else i, per_level)
    if side == 'input':
        place = 'downsamplers.0' if k == per_level - 1 else f'{kind}.{k}'
        return f'down_blocks.{level}.{place}.{name}'
    place = 'upsamplers.0' if found[3] != '0.' and kind == 'resnets' else f'{kind}.{k}'
    return f'up_blocks.{level}.{place}.{name}'


def name_of_edm(layer, sizes):
    """enc.16x16_block0.norm0 -> down_blocks.1.resnets.0.norm1, for sizes 32, 16, ..."""
    found = re.fullmatch(r'(enc|dec)\.(\d+)x\d+_([a-z]+)(\d*)\.(\w+)', layer)
    if re.fullmatch(r'enc\.\d+x\d+_conv', layer):
        return 'conv_in'
    if not found or found[5] not in LAYERS:
        return ENDS.get(layer, layer)
    side, size, part, i, name = found.groups()
    down, up, name = sizes.index(int(size)), sizes[::-1].index(int(size)), LAYERS[name]
    kind = 'attentions' if name in ATTENTION else 'resnets'
    place = {'in': f'mid_block.{kind}.{i}', 'down': f'down_blocks.{down - 1}.downsamplers.0',
             'up': f'up_blocks.{up - 1}.upsamplers.0'}
    block = f'down_blocks.{down}' if side == 'enc' else f'up_blocks.{up}'
    return f'{place.get(part, f"{block}.{kind}.{i}")}.{name}'


def rows_of(value, order, head):
    """Queries, keys and values (3, C, ..) among the rows of qkv (3 C, ..)."""
    shape, axes = dict(legacy=((-1, 3, head), (1, 0, 2)), new=((3, -1, head), (0, 1, 2)),
                       edm=((-1, head, 3), (2, 0, 1)))[order]
    rows = value.reshape(*shape, *value.shape[1:]).movedim(axes, (0, 1, 2))
    return rows.reshape(3, -1, *value.shape[1:])


def schedule(name, steps, rescaled):
    """The betas of a linear or cosine schedule of `steps` times.

    rescaled: the network was given times scaled to 0..1000. Only the 1000 of them that are whole
        numbers are taken, with their alpha_bar.
    """
    if name == 'linear':
        betas = torch.linspace(.1 / steps, 20 / steps, steps, dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - betas, 0)
    else:
        alpha_bar = alpha_bar_table(steps - 1)
    alpha_bar = alpha_bar[::steps // 1000 if rescaled else 1]
    return dict(name=name, betas=betas_of(alpha_bar))
