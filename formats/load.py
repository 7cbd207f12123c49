"""Diffusion models from a checkpoint or a folder of diffusers: network, schedule, other entries.

A network that the scripts can train and sample has
    net(z_t, t, y)      images (B, 3, H, W), times (B,) int, labels (B,) int or None -> what
                        `Diffusion.mean_type` names, (B, 3, H, W)
    net.conditional     whether it takes labels
    net.class_num       number of classes; 10 if it takes no labels
    net.in_float32      names of its parts that stay in float32 under --amp
    net.entries         {key: plain value}: what its checkpoint must keep besides the weights to
                        rebuild it; copied to its students
"""

import re

import torch
from absl import flags

from diffusion import Diffusion, clean_linear
from formats import diffusers_read, edm
from formats.entries import ENTRIES, Model, brief, check
from model import UNet
from runtime import checkpoint, distributed
from runtime.checkpoint import differences, plain_keys, some_of
from runtime.cli import UserError
from runtime.flags import given
from runtime.optim import frozen

FLAGS = flags.FLAGS
ARCHITECTURE = ('ch', 'ch_mult', 'attn', 'num_res_blocks', 'conditional', 'class_num')
# not kept after loading
LARGE = ('net_model', 'ema_model', 'optim', 'optim_head', 'memory', 'fake_model', 'optim_fake')
TABLE = 'time_embedding.timembedding.0.weight'
NOT_BUILT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError,
             ZeroDivisionError)


def load_model(path, weights='auto', dropout=0., mean_type='xstart', img_size=32, steps=0):
    """The frozen `Model` of a checkpoint or a folder of diffusers, on the CPU.

    Args:
        path: folder of a run, file of a checkpoint, or folder of diffusers.
        weights: 'net', 'ema', or 'auto': the average of a base model, the raw ones of a student.
        dropout: rate in training.
        mean_type, img_size: for a source that does not state them.
        steps: DDIM steps that the model is taken to have; 0: as stated.
    """
    state, file = read_state(path)
    where = file if file == checkpoint.find(path) else path     # a folder of diffusers
    check(state, ENTRIES, where)
    name, state_dict = choose_weights(state, weights, where)
    if 'T' not in state and TABLE in state_dict:
        # of pytorch-ddpm: its times 0..T - 1 become 1..T, after an index 0 for the clean image
        T = len(state_dict[TABLE])
        state_dict[TABLE] = torch.cat([state_dict[TABLE][:1], state_dict[TABLE]])
        state.update(T=T, schedule=clean_linear(T))
        state.setdefault('mean_type', 'epsilon')
        distributed.print0(f'note: a checkpoint without T is read as one of pytorch-ddpm: linear '
                           f'schedule, eps, {T} steps.')
    network, arch = build(state, state_dict, dropout, f'the {name} in {where}')
    if 'method' not in state:       # a published file: its students are others' work, too
        folder = file.resolve().parent.name
        state.setdefault('origin', folder if file.name == 'ckpt.pt' else file.stem)
    network.entries.update((key, state[key]) for key in ('origin', 'license') if key in state)
    entries = {key: value for key, value in state.items() if key not in LARGE}
    # what published checkpoints do not state; x_T of their sample grids shows the size
    state.setdefault('mean_type', mean_type)
    state.setdefault('img_size', state['x_T'].shape[-1] if 'x_T' in state else img_size)
    factor = 2 ** (len(arch['ch_mult']) - 1)
    if state['img_size'] % factor:
        raise UserError(f'--img_size is {state["img_size"]} for {where}, expected a multiple of '
                        f'{factor}; give the size of its images')
    return Model(frozen(network), diffusion_of(state, arch['T'], steps, where), file, name, arch,
                 state['img_size'], entries)


def load_teacher(path, device):
    """The model to halve, on `device`, by the flags of the running script."""
    first = path == FLAGS.base_ckpt         # a later stage of PD.py has students as teachers
    model = load_model(path, dropout=FLAGS.dropout, mean_type=FLAGS.mean_type,
                       img_size=FLAGS.img_size, steps=FLAGS.teacher_steps if first else 0)
    check_flags(model, (*ARCHITECTURE, 'img_size'))
    if model.diffusion.T % 2:
        raise UserError(f'--base_ckpt {path} has {model.diffusion.T} sampling steps, which cannot '
                        f'be halved; give an even number, such as --teacher_steps 128')
    return model.to(device)


def check_flags(model, names=(*ARCHITECTURE, 'mean_type', 'img_size')):
    """Refuse flags given by the user that contradict the network, output type or image size."""
    found = dict(model.arch, mean_type=model.diffusion.mean_type, img_size=model.img_size)
    if not found['conditional']:
        del found['class_num']
    for name in filter(given, names):
        ours, theirs = FLAGS[name].value, found.get(name)
        if theirs is not None and (sorted(set(ours)) if name == 'attn' else ours) != theirs:
            has = 'the network in {} has' if name in ARCHITECTURE else '{} was trained with'
            raise UserError(f'--{name} is {ours} and {has.format(model.file)} {theirs}; give the '
                            f'same, or leave it out (repeated after a flagfile, it may append)')


# Checkpoints

def read_state(path):
    """(the checkpoint in the folder of a run, in a file or in a folder of diffusers, its file)."""
    file, of_diffusers = checkpoint.find(path), diffusers_read.main_file(path)
    if of_diffusers and not file.exists():
        return diffusers_read.read(path), of_diffusers
    if not file.exists() and re.fullmatch(r'\w[\w.-]*/[\w.-]+', str(path)):
        raise UserError(f'there is no checkpoint {file}; give the folder of a finished run, or '
                        f'download a model of a hub: hf download {path} --local-dir DIR')
    return checkpoint.read(file), file


def choose_weights(state, wanted, file):
    """(name, {parameter: float32 tensor}) of the weights to use.

    `wanted` 'auto' takes the average of a base model, which has `use` or, if published,
    time_scale 1; and the raw weights of a student.
    """
    base = state.get('time_scale', 1) == 1 and 'ema_model' in state
    automatic = state.get('use', 'ema_model' if base else 'net_model')
    name = dict(net='net_model', ema='ema_model', auto=automatic)[wanted]
    other = dict(net_model='ema_model', ema_model='net_model').get(name)
    if wanted != 'auto' and other in state and name not in state:
        raise UserError(f'{file} has no {name}, only {other}; leave out --weights {wanted}')
    if not isinstance(state.get(name), dict):
        raise UserError(f'{file} is {kind_of_file(state)}, not a diffusion checkpoint with {name}; '
                        f'give what train_base.py, PD.py, train_rdd.py or convert.py wrote')
    for key, value in state[name].items():
        good = (isinstance(key, str) and torch.is_tensor(value) and value.is_floating_point()
                and value.layout == torch.strided and value.device.type == 'cpu'
                # an expanded tensor is larger than its memory: no network is
                and value.numel() * value.element_size() <= value.untyped_storage().nbytes())
        if not good or not value.float().isfinite().all():
            raise UserError(f'{key} of the {name} in {file} is {brief(value)}, expected a tensor '
                            f'of finite floating-point numbers; give another checkpoint')
    plain = dict(dtype=torch.float32, memory_format=torch.contiguous_format, copy=True)
    return name, {key: value.to(**plain) for key, value in plain_keys(state[name]).items()}


def kind_of_file(state):
    """What a file is that has no weights of a network of this project."""
    keys = state['model'] if isinstance(state.get('model'), dict) else ()
    if any(str(key).endswith('fc.weight') for key in keys):
        return 'a classifier'
    if {'model', 'ema', 'opt'} <= set(state):
        return 'a checkpoint of denoising-diffusion-pytorch, whose network cannot be read here'
    if 'input_blocks.0.0.weight' in state:
        return 'a U-Net of guided-diffusion, which convert.py reads'
    return f'a file with {some_of(state)}'


def build(state, weights, dropout=0., where='the checkpoint'):
    """(network of a checkpoint, with its weights; its architecture).

    It is built without memory, so that a network of an absurd size costs nothing.
    """
    try:
        if 'edm' in state or 'unet_config' in state:
            kind = edm if 'edm' in state else diffusers_read
            network = kind.build(state, dropout, where)
            arch = network.architecture(state.get('N', state['T'] * state['time_scale']))
        else:
            arch = architecture(weights)
            with torch.device('meta'):
                network = UNet(dropout=dropout, **arch)
    except NOT_BUILT:
        raise UserError(f'{where} has names or shapes that fit no U-Net of ours: expected '
                        f'head.weight, downblocks.0.block1.2.weight, .., found {some_of(weights)}')
    for key, found, expected in differences(weights, network.state_dict()):
        raise UserError(f'{where} has shapes that do not fit its network: {key} is {found}, '
                        f'expected {expected}; restore a copy, or give another model')
    network.load_state_dict(weights, assign=True)
    return network, arch


def diffusion_of(state, times, steps, file):
    """The `Diffusion` of a checkpoint, for a network of `times` times; 0 `steps`: as stated."""
    T, schedule = state['T'], state.get('schedule', 'cosine')
    scale = state.get('time_scale', max(1, times // T))
    N = state.get('N', T * scale)
    betas = len(schedule['betas']) if isinstance(schedule, dict) else N
    if N // T != scale or not N == times == betas:
        raise UserError(f'T {T}, time_scale {scale} and N {N} in {file} do not fit each other, '
                        f'{betas} betas or the {times} times of its network; give another model')
    if steps > T:
        raise UserError(f'{steps} steps are more than the {T} of {file}; lower --teacher_steps or '
                        f'--student_steps, or set 0 for all of them')
    if steps and T < N and T % steps:
        raise UserError(f'{steps} steps do not divide the {T} of {file}, which was trained at no '
                        f'others; choose a divisor as --teacher_steps or --student_steps')
    diffusion = Diffusion(steps or T, 1, state['mean_type'], schedule=schedule, N=N)
    if diffusion.mean_type == 'epsilon' and diffusion.alpha[-1] == 0:
        raise UserError(f'the schedule of {file} ends with alpha 0, where eps does not determine '
                        f'the image; give a model that predicts v or x_0')
    return diffusion


def architecture(state_dict):
    """Arguments of the `UNet` that has these parameters, read off their names and shapes."""
    ch = len(state_dict['head.weight'])
    count = len({key.split('.')[1] for key in state_dict if key.startswith('downblocks.')})
    # a layer named main follows the blocks of each resolution but the last
    ends = [i for i in range(count) if f'downblocks.{i}.main.weight' in state_dict]
    blocks = min(ends, default=count)
    firsts = [f'downblocks.{i}' for i in range(0, count, blocks + 1)]
    y_weight = state_dict.get('y_embedding.weight')
    return dict(T=len(state_dict[TABLE]) - 1, ch=ch, num_res_blocks=blocks,
                ch_mult=[len(state_dict[f'{block}.block1.2.weight']) // ch for block in firsts],
                attn=[level for level, block in enumerate(firsts)
                      if f'{block}.attn.proj.weight' in state_dict],
                conditional=y_weight is not None,
                class_num=10 if y_weight is None else y_weight.shape[1])
