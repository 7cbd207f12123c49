"""Folders of diffusers: the same images by a `UNet2DModel` and a `DDIMScheduler`.

Our U-Net and theirs are the same network, with other names and three differences in layout:
attention projects with linear layers instead of 1x1 convolutions; the time embedding has all sines
before all cosines instead of alternating; and class labels have one table instead of a weight and a
bias.
"""

import json

import torch

from formats.diffusers_read import PREDICTIONS, DiffusersUNet
from formats.entries import betas_of
from formats.load import TABLE
from model import TimeEmbedding, UNet
from runtime.cli import UserError

ENDS = {'head': 'conv_in', 'tail.0': 'conv_norm_out', 'tail.2': 'conv_out',
        'time_embedding.timembedding.1': 'time_embedding.linear_1',
        'time_embedding.timembedding.3': 'time_embedding.linear_2'}
# {layer of a block: its place and name there}
LAYERS = {'block1.0': 'resnets.{i}.norm1', 'block1.2': 'resnets.{i}.conv1',
          'temb_proj.1': 'resnets.{i}.time_emb_proj', 'block2.0': 'resnets.{i}.norm2',
          'block2.3': 'resnets.{i}.conv2', 'shortcut': 'resnets.{i}.conv_shortcut',
          'attn.group_norm': 'attentions.{i}.group_norm', 'attn.proj_q': 'attentions.{i}.to_q',
          'attn.proj_k': 'attentions.{i}.to_k', 'attn.proj_v': 'attentions.{i}.to_v',
          'attn.proj': 'attentions.{i}.to_out.0', 'main': '{side}samplers.0.conv'}


def write(model, stride, folder):
    """unet/, scheduler/ and training.json; an unconditional model becomes a whole DDIMPipeline.

    DDIMPipeline cannot pass labels on, so the card of a conditional model has a sampling loop.
    """
    from diffusers import DDIMPipeline, DDIMScheduler
    scheduler = DDIMScheduler(**scheduler_config(model.diffusion, stride, model.file))
    network = model.network
    unet = network.unet if isinstance(network, DiffusersUNet) else convert(model)
    if network.conditional:
        unet.save_pretrained(folder / 'unet')
        scheduler.save_pretrained(folder / 'scheduler')
    else:
        DDIMPipeline(unet, scheduler).save_pretrained(folder)
    training = dict(model.diffusion.arguments(), img_size=model.img_size,
                    weights=model.weights_name, **model.provenance())
    (folder / 'training.json').write_text(json.dumps(training, indent=2) + '\n')


def scheduler_config(diffusion, stride, file):
    """Arguments of the DDIMScheduler that visits our times with our alpha and sigma.

    Where index 0 is the clean image, our index k is their timestep k - 1, the spacing "trailing".
    Our own table of betas has N + 1 entries, but `num_train_timesteps` is N, so that n steps are
    N / n apart. `steps_offset` makes the first time N; the last step ends at index 0, as ours does.
    """
    nfe, N = diffusion.T // stride, diffusion.N
    if N % nfe:
        raise UserError(f'{file} has {nfe} steps on a grid of {N}, and the steps of diffusers are '
                        f'equally far apart only if their number divides {N}; export with --format '
                        f'onnx or safetensors, or with a --stride that leaves a divisor')
    theirs = {ours: name for name, ours in PREDICTIONS.items()}
    common = dict(num_train_timesteps=N, clip_sample=True, clip_sample_range=1.,
                  prediction_type=theirs[diffusion.mean_type])
    if diffusion.clean_end:
        # without rescale_betas_zero_snr, other schedulers of diffusers divide by an alpha of 0
        return dict(common, trained_betas=diffusion.schedule['betas'], timestep_spacing='trailing',
                    set_alpha_to_one=True, steps_offset=0,
                    rescale_betas_zero_snr=bool(diffusion.alpha[-1] == 0))
    return dict(common, trained_betas=betas_of(diffusion.alpha ** 2),
                timestep_spacing='leading', set_alpha_to_one=False, steps_offset=N // nfe)


def convert(model):
    """The UNet2DModel that computes the same as the `UNet` of a `Model`."""
    from diffusers import UNet2DModel
    if not isinstance(model.network, UNet):
        raise UserError(f'the network in {model.file} is one of EDM, whose preconditioning no '
                        f'UNet2DModel has; export with --format onnx or safetensors')
    arch, state_dict, mult = model.arch, model.network.state_dict(), model.arch['ch_mult']
    if mult[0] != 1:
        raise UserError(f'the network in {model.file} has --ch_mult {mult[0]} at its first '
                        f'resolution, where diffusers expects 1; export with --format safetensors')
    table = state_dict[TABLE]
    expected = TimeEmbedding(len(table) - 1, table.shape[1], 1).timembedding[0].weight
    # where index 0 is the clean image, row k has the sinusoids of their timestep k - 1
    found = table[1:] if model.diffusion.clean_end else table
    if (found - expected[:len(found)]).abs().max() > 1e-3:
        raise UserError(f'the time embedding in {model.file} differs from the sinusoids of DDPM, '
                        f'which diffusers computes itself; export with --format safetensors')
    attention = [level in arch['attn'] for level in range(len(mult))]
    unet = UNet2DModel(
        sample_size=model.img_size, block_out_channels=[arch['ch'] * m for m in mult],
        layers_per_block=arch['num_res_blocks'],
        down_block_types=['AttnDownBlock2D' if here else 'DownBlock2D' for here in attention],
        up_block_types=['AttnUpBlock2D' if here else 'UpBlock2D' for here in attention[::-1]],
        num_class_embeds=arch['class_num'] if arch['conditional'] else None,
        attention_head_dim=None, freq_shift=0, flip_sin_to_cos=False)
    unet.load_state_dict(to_diffusers(state_dict, arch))
    return unet


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
    return f'{place}.' + LAYERS[rest].format(side=side, i=number)
