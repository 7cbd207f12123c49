"""Our U-Net and schedule as `UNet2DModel` and `DDIMScheduler` of diffusers, and back.

The two U-Nets are the same network under other names, with three differences: attention projects
with linear layers instead of 1x1 convolutions, the sines of the time embedding come before the
cosines instead of in turn with them, and class labels have one table instead of weight and bias.
"""

import math

import torch

from diffusion import alpha_bar_table
from runtime.cli import UserError

RESNET = {'block1.0': 'norm1', 'block1.2': 'conv1', 'temb_proj.1': 'time_emb_proj',
          'block2.0': 'norm2', 'block2.3': 'conv2', 'shortcut': 'conv_shortcut'}
ATTENTION = {'attn.group_norm': 'group_norm', 'attn.proj_q': 'to_q', 'attn.proj_k': 'to_k',
             'attn.proj_v': 'to_v', 'attn.proj': 'to_out.0'}
TABLE = 'time_embedding.timembedding.0.weight'
# What makes a UNet2DModel this U-Net; `None`: whatever it says
FAMILY = dict(in_channels=3, out_channels=3, center_input_sample=False,
              time_embedding_type='positional', time_embedding_dim=None,
              mid_block_type='UNetMidBlock2D', mid_block_scale_factor=1, downsample_type='conv',
              upsample_type='conv', act_fn='silu', attention_head_dim=None, norm_num_groups=32,
              attn_norm_num_groups=None, resnet_time_scale_shift='default', add_attention=True,
              class_embed_type=None)


def _block(ours, theirs, number):
    """Names of the layers of residual block `ours` and of its attention, if it has one."""
    names = {f'{ours}.{a}': f'{theirs}.resnets.{number}.{b}' for a, b in RESNET.items()}
    names.update({f'{ours}.{a}': f'{theirs}.attentions.{number}.{b}' for a, b in ATTENTION.items()})
    return names


def layer_names(levels, num_res_blocks):
    """{our layer: theirs} for a U-Net of `levels` resolutions; of all that a layer could be."""
    names = {'head': 'conv_in', 'tail.0': 'conv_norm_out', 'tail.2': 'conv_out',
             'time_embedding.timembedding.1': 'time_embedding.linear_1',
             'time_embedding.timembedding.3': 'time_embedding.linear_2'}
    for side, blocks, sampler in (('down', num_res_blocks, 'downsamplers'),
                                  ('up', num_res_blocks + 1, 'upsamplers')):
        for level in range(levels):
            first = level * (blocks + 1)            # every resolution but the last has a sampler
            for i in range(blocks):
                names.update(_block(f'{side}blocks.{first + i}', f'{side}_blocks.{level}', i))
            names[f'{side}blocks.{first + blocks}.main'] = f'{side}_blocks.{level}.{sampler}.0.conv'
    return dict(names, **_block('middleblocks.0', 'mid_block', 0),
                **_block('middleblocks.1', 'mid_block', 1))


def to_diffusers(state_dict, arch):
    """State dict of our UNet -> that of a UNet2DModel.

    Args:
        arch: from `checkpoint.architecture`.
    Raises:
        UserError: the table of sinusoids is not the one UNet2DModel computes.
    """
    names, theirs = layer_names(len(arch['ch_mult']), arch['num_res_blocks']), {}
    if (state_dict[TABLE] - sinusoids(arch['T'], arch['ch'])).abs().max() > 1e-3:
        raise UserError('the time embedding in the checkpoint is not the sinusoid of DDPM, which '
                        'diffusers computes itself; export with --format safetensors')
    for key, value in state_dict.items():
        layer, _, kind = key.rpartition('.')
        if layer in names:
            theirs[f'{names[layer]}.{kind}'] = _reshape(names[layer], kind, value)
    if arch['conditional']:
        theirs['class_embedding.weight'] = (state_dict['y_embedding.weight'].t()
                                            + state_dict['y_embedding.bias']).contiguous()
    return theirs


def _reshape(layer, kind, value):
    """A weight of ours in their layout."""
    if kind == 'weight' and '.to_' in layer:
        return value[:, :, 0, 0]
    if kind == 'weight' and layer == 'time_embedding.linear_1':     # sin, cos, .. -> sin.., cos..
        return torch.cat([value[:, 0::2], value[:, 1::2]], dim=1)
    return value


def unet_config(network, arch, img_size):
    """Arguments of the UNet2DModel that computes what our `network` does.

    Raises:
        UserError: a first resolution with other than `ch` channels, which theirs cannot have.
    """
    mult, attn, details = arch['ch_mult'], arch['attn'], network.details
    if mult[0] != 1:
        raise UserError(f'the first --ch_mult is {mult[0]} and the U-Net of diffusers has no '
                        f'multiplier there (expected 1); export with --format safetensors')
    down = ['AttnDownBlock2D' if i in attn else 'DownBlock2D' for i in range(len(mult))]
    up = ['AttnUpBlock2D' if i in attn else 'UpBlock2D' for i in reversed(range(len(mult)))]
    return dict(FAMILY, sample_size=img_size, block_out_channels=[arch['ch'] * m for m in mult],
                layers_per_block=arch['num_res_blocks'], down_block_types=down, up_block_types=up,
                flip_sin_to_cos=False, freq_shift=0, dropout=0.,
                num_class_embeds=arch['class_num'] if arch['conditional'] else None, **details)


def scheduler_config(diffusion, stride):
    """Arguments of the DDIMScheduler that visits our times with our alpha and sigma.

    The table has N + 1 entries and N "training steps", so that n steps are N / n apart; the
    offset makes the first of them N. The last one ends on index 0, as ours does.
    """
    alpha_bar = diffusion.alpha ** 2
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return dict(num_train_timesteps=diffusion.N, trained_betas=betas.tolist(),
                timestep_spacing='leading', steps_offset=stride * diffusion.time_scale,
                clip_sample=True, clip_sample_range=1., set_alpha_to_one=False,
                prediction_type='sample' if diffusion.mean_type == 'xstart' else 'epsilon')


# And back

def sinusoids(T, ch, shift=0, flip=False):
    """The table of the time embedding in our order, (T + 1, ch); `shift`, `flip`: as diffusers."""
    frequency = torch.exp(-math.log(10000) * torch.arange(ch // 2) / (ch // 2 - shift))
    if not shift:       # the very bits of our own network
        frequency = torch.exp(-torch.arange(0, ch, 2) / ch * math.log(10000))
    angle = torch.arange(T + 1).float()[:, None] * frequency[None, :]
    pair = [angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()]
    return torch.stack(pair, dim=-1).view(T + 1, ch)


def from_diffusers(theirs, config, T):
    """State dict of a UNet2DModel with this `config` -> that of our UNet with T + 1 times."""
    levels, ours = len(config['block_out_channels']), {}
    names = {b: a for a, b in layer_names(levels, config['layers_per_block']).items()}
    ours[TABLE] = sinusoids(T, config['block_out_channels'][0], config['freq_shift'],
                            config['flip_sin_to_cos'])
    for key, value in theirs.items():
        layer, _, kind = key.rpartition('.')
        if layer != 'class_embedding':
            ours[f'{names[layer]}.{kind}'] = _reshape_back(layer, kind, value)
    if config['num_class_embeds']:
        ours['y_embedding.weight'] = theirs['class_embedding.weight'].t().contiguous()
        ours['y_embedding.bias'] = torch.zeros(ours['y_embedding.weight'].shape[0])
    return ours


def _reshape_back(layer, kind, value):
    if kind == 'weight' and '.to_' in layer:
        return value[:, :, None, None]
    if kind == 'weight' and layer == 'time_embedding.linear_1':
        return torch.stack(value.chunk(2, dim=1), dim=-1).flatten(1)
    return value


def grid_of_scheduler(config, folder='the scheduler'):
    """dict(T, time_scale, mean_type, schedule) of a scheduler's configuration.

    Raises:
        UserError: another prediction, or a table that is neither our cosine one nor DDPM's.
    """
    kinds = dict(sample='xstart', epsilon='epsilon')
    if config.get('prediction_type', 'epsilon') not in kinds:
        raise UserError(f'prediction_type of {folder} is {config["prediction_type"]}, expected '
                        f'sample or epsilon')
    betas, times = config.get('trained_betas'), config.get('num_train_timesteps', 1000)
    named = dict(linear='linear', squaredcos_cap_v2='cosine')
    if betas is None:
        N, schedule = times - 1, named.get(config.get('beta_schedule', 'linear'))
        if schedule == 'linear' and (config.get('beta_start', 1e-4), config.get(
                'beta_end', 0.02)) != (1e-4, 0.02):
            schedule = None
    else:
        N, alpha_bar = len(betas) - 1, torch.cumprod(1 - torch.tensor(betas).double(), 0)
        schedule = next((name for name in named.values() if torch.allclose(
            alpha_bar, alpha_bar_table(N, name), rtol=1e-3, atol=1e-6)), None)
    if schedule is None:
        raise UserError(f'the schedule of {folder} is {config.get("beta_schedule", "its own")}, '
                        f'expected DDPM\'s linear one (1e-4 to 0.02) or the cosine one')
    offset = config.get('steps_offset', 0)
    time_scale = offset if betas is not None and offset and N % offset == 0 else 1
    return dict(T=N // time_scale, time_scale=time_scale, schedule=schedule,
                mean_type=kinds[config.get('prediction_type', 'epsilon')])


def check_family(config, folder):
    """Refuse a UNet2DModel that our U-Net cannot be.

    Raises:
        UserError: naming the entry of its configuration.
    """
    widths, size = list(config['block_out_channels']), config['sample_size']
    attn = [name.startswith('Attn') for name in config['down_block_types']]
    down = ['AttnDownBlock2D' if a else 'DownBlock2D' for a in attn]
    up = ['AttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(attn)]
    wanted = dict(FAMILY, block_out_channels=[width // widths[0] * widths[0] for width in widths],
                  sample_size=size if isinstance(size, int) else 'one number',
                  down_block_types=down, up_block_types=up,
                  downsample_padding=1 if config['downsample_padding'] else 0)
    for name, value in wanted.items():
        found = list(config[name]) if isinstance(config[name], tuple) else config[name]
        if found != value:
            raise UserError(f'{name} of the U-Net in {folder} is {found}, expected {value}; only '
                            f'networks of the DDPM family can be taken over')
    if widths[0] % 32:
        raise UserError(f'the U-Net in {folder} has {widths[0]} base channels, expected a multiple '
                        f'of 32')
