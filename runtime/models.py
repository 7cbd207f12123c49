"""Diffusion models from their checkpoints: network, schedule and the facts stored with them."""

import copy
import os
from pathlib import Path

import torch

from diffusion import Diffusion
from model import UNet
from runtime import checkpoint, distributed
from runtime.checkpoint import differences, plain_keys, some_of
from runtime.cli import UserError
from runtime.flags import given

ARCHITECTURE = ('ch', 'ch_mult', 'attn', 'num_res_blocks', 'conditional', 'class_num')
LARGE = ('net_model', 'ema_model', 'optim', 'optim_head', 'memory')     # not kept after loading


class Model:
    """A network with its schedule.

    Attributes:
        network: `UNet`. diffusion: `Diffusion`, on the device of the network.
        file: of the checkpoint. weights: name of the weights taken, net_model or ema_model.
        arch: constructor arguments of the network. img_size: height and width of its images.
        facts: what else the checkpoint says, such as method, step, flags.
    """

    def __init__(self, network, diffusion, file, weights, arch, img_size, facts):
        self.network, self.diffusion, self.file, self.weights = network, diffusion, file, weights
        self.arch, self.img_size, self.facts = arch, img_size, facts

    def to(self, device):
        """The model with its network, in channels_last memory, and its schedule on `device`."""
        self.network.to(device, memory_format=torch.channels_last)
        d = self.diffusion
        self.diffusion = Diffusion(d.T, d.time_scale, d.mean_type, device, d.schedule)
        return self

    def student(self):
        """(network, schedule) of a student: a copy to train, with every second grid point."""
        d, network = self.diffusion, copy.deepcopy(self.network).train().requires_grad_(True)
        network.time_embedding.timembedding[0].requires_grad_(False)    # a table, not a parameter
        return network, Diffusion(d.T // 2, 2 * d.time_scale, d.mean_type, d.alpha.device)


def new_unet(flags, N, device):
    """A freshly initialised U-Net on `device`, as the flags describe it, for times 0..N.

    Its size is printed before it is built.
    Raises:
        UserError: no machine of this size can train it.
    """
    arguments = (N, flags.ch, flags.ch_mult, flags.attn, flags.num_res_blocks, flags.dropout,
                 flags.conditional, flags.class_num)
    with torch.device('meta'):
        count = sum(p.numel() for p in UNet(*arguments).parameters())
    needed, present = 5 * 4 * count, memory_of(device)      # average, gradient, two moments
    distributed.print0(f'network: {count:,} parameters; with average, gradient and two moments '
                       f'{needed / 2 ** 20:,.0f} MiB')
    if needed > present:
        raise UserError(f'the network of --ch {flags.ch}, --ch_mult {flags.ch_mult}, '
                        f'--num_res_blocks {flags.num_res_blocks} and {N} times needs '
                        f'{needed / 2 ** 30:,.0f} GiB for its parameters alone, and {device} has '
                        f'{present / 2 ** 30:.0f} GiB; make it smaller')
    return UNet(*arguments).to(device, memory_format=torch.channels_last)


def memory_of(device):
    """Bytes of memory of a GPU, or of this machine."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def load_model(path, weights='auto', dropout=0., mean_type='xstart', img_size=32):
    """The frozen model of a checkpoint, on the CPU; the architecture is read off the weights.

    Args:
        path: folder or file. weights: 'net', 'ema', or 'auto': the average of a base model, the
            raw weights of a student.
        mean_type, img_size: for a checkpoint that does not say.
    Raises:
        UserError: not a diffusion checkpoint.
    """
    file = checkpoint.find(path)
    state = checkpoint.read(file)
    network, name = build_unet(state, file, dropout, weights)
    arch = architecture(network.state_dict())
    T, time_scale, schedule, stored_type = grid(state, arch)
    diffusion = Diffusion(T, time_scale, stored_type or mean_type, schedule=schedule)
    # published checkpoints do not say their size, but x_T of their sample grids shows it
    size = state['x_T'].shape[-1] if 'x_T' in state else img_size
    facts = {key: value for key, value in state.items() if key not in LARGE}
    return Model(network.eval().requires_grad_(False), diffusion, file, name, arch,
                 state.get('img_size', size), facts)


def load_teacher(path, flags, device):
    """The model to halve, on `device`, checked against the flags.

    Raises:
        UserError: not a diffusion checkpoint, an odd or single number of steps, a network or
        output type that the flags contradict.
    """
    model = load_model(path, dropout=flags.dropout, mean_type=flags.mean_type,
                       img_size=flags.img_size)
    file, diffusion, levels = model.file, model.diffusion, len(model.arch['ch_mult'])
    check_flags(model.arch, file, flags, given)
    if diffusion.schedule != 'cosine':
        raise UserError(f'{file} was trained on the linear schedule of pytorch-ddpm, and students '
                        f'here use the cosine one; train a teacher with train_base.py')
    if 'details' in model.facts:
        raise UserError(f'{file} is a network of diffusers with {model.facts["details"]}, which '
                        f'students here would not have; train a teacher with train_base.py')
    if diffusion.T % 2:
        raise UserError(f'--base_ckpt {path} has {diffusion.T} sampling steps, which cannot be '
                        f'halved; an even number is needed')
    if flags.img_size % 2 ** (levels - 1):
        raise UserError(f'--img_size is {flags.img_size}, expected a multiple of '
                        f'{2 ** (levels - 1)}: the network in {file} halves it {levels - 1} times')
    check_facts(model.facts, file, flags, lambda name: True)
    return model.to(device)


def architecture(state_dict):
    """Constructor arguments of the UNet that has these parameters, read off their shapes."""
    ch = state_dict['head.weight'].shape[0]
    ch_mult, attn, blocks, level = [], [], 0, 0
    count = 1 + max(int(key.split('.')[1]) for key in state_dict if key.startswith('downblocks.'))
    for i in range(count):
        if f'downblocks.{i}.main.weight' in state_dict:
            level += 1
            continue
        if level == len(ch_mult):
            ch_mult.append(state_dict[f'downblocks.{i}.block1.2.weight'].shape[0] // ch)
            if f'downblocks.{i}.attn.proj.weight' in state_dict:
                attn.append(level)
        if level == 0:
            blocks += 1
    y_weight = state_dict.get('y_embedding.weight')
    return dict(T=state_dict['time_embedding.timembedding.0.weight'].shape[0] - 1, ch=ch,
                ch_mult=ch_mult, attn=attn, num_res_blocks=blocks,
                conditional=y_weight is not None,
                class_num=10 if y_weight is None else y_weight.shape[1])


def weights(state, path, wanted='auto'):
    """(state dict, its name) to use: the averaged weights of a base model, the raw of a student.

    A base model says so itself (`use`) or, if published, by time_scale 1. `wanted` 'net' or 'ema'
    chooses regardless.
    """
    base = state.get('time_scale', 1) == 1 and 'ema_model' in state
    name = dict(net='net_model', ema='ema_model').get(wanted) or state.get(
        'use', 'ema_model' if base else 'net_model')
    if not isinstance(state.get(name), dict):
        kind = ('a classifier' if 'model' in state and 'net_model' not in state
                else f'a file with {some_of(state)}')
        raise UserError(f'{path} is {kind}, not a diffusion checkpoint with {name}; give what '
                        f'train_base.py, PD.py or train_rdd.py wrote')
    return plain_keys(state[name]), name


def build_unet(state, path='the checkpoint', dropout=0., weights_of='auto'):
    """The network of a checkpoint, with its weights; returns (UNet, name of the weights used).

    The architecture is read off the shapes, so no flags are needed.
    """
    state_dict, name = weights(state, path, weights_of)
    try:
        network = UNet(dropout=dropout, **architecture(state_dict))
    except (AttributeError, IndexError, KeyError, RuntimeError, ValueError, ZeroDivisionError):
        raise UserError(f'the {name} in {path} has names or shapes that fit no U-Net of this '
                        f'project: expected head.weight, downblocks.0.block1.2.weight and so on, '
                        f'found {some_of(state_dict)}')
    for key, found, expected in differences(state_dict, network.state_dict()):
        raise UserError(f'the {name} in {path} has shapes that fit no U-Net of this project: '
                        f'{key} is {found}, expected {expected}')
    for key, value in state_dict.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f'{key} of the {name} in {path} holds values that are not finite '
                            f'floating-point numbers; give a checkpoint of a run that went well')
    network.load_state_dict(state_dict)
    if 'details' in state:      # a network of diffusers, see export.py
        network.set_details(**state['details'])
    return network, name


def grid(state, arch):
    """(T, time_scale, schedule, mean_type or None) of a checkpoint.

    A file of pytorch-ddpm has no T: its table of 1000 rows is a grid 0..999 with DDPM's linear
    schedule of 1000 entries, sampled in 999 steps or divisors of them, and its networks predict
    eps.
    """
    if 'T' not in state:
        distributed.print0(f'note: a checkpoint without T is read as one of pytorch-ddpm: linear '
                           f'schedule, eps, {arch["T"]} steps on a grid 0..{arch["T"]}.')
        return arch['T'], 1, 'linear', state.get('mean_type', 'epsilon')
    T = state['T']
    for key in ('T', 'time_scale'):
        if type(state.get(key, 1)) is not int or state.get(key, 1) < 1:
            raise UserError(f'{key} in the checkpoint is {state[key]}, expected a whole number of '
                            f'at least 1; restore a copy of the file')
    return (T, state.get('time_scale', arch['T'] // T), state.get('schedule', 'cosine'),
            state.get('mean_type'))


def check_flags(arch, path, flags, given):
    """Refuse flags that contradict the network in a checkpoint.

    Args:
        arch: from `architecture`. flags: the values. given: name -> whether the user set it.
    """
    for name in ARCHITECTURE:
        ours, theirs = getattr(flags, name), arch[name]
        if name == 'class_num' and not arch['conditional']:
            continue
        if given(name) and (sorted(ours) != theirs if name == 'attn' else ours != theirs):
            raise UserError(f'--{name} is {ours} and the network in {path} has {theirs}; leave the '
                            f'flag out (a flag repeated after a flagfile appends to it)')


def check_facts(state, path, flags, given):
    """Refuse an output type or image size that a checkpoint contradicts, where `given(name)`."""
    for name in ('mean_type', 'img_size'):
        ours = getattr(flags, name)
        if given(name) and state.get(name, ours) != ours:
            raise UserError(f'--{name} is {ours} and {path} was trained with {state[name]}; '
                            f'set --{name}={state[name]}')


def halvings(T, until, base_ckpt):
    """[T / 2, T / 4, .., until]: the steps of all students of a teacher with T steps.

    Raises:
        UserError: halving does not lead to `until`.
    """
    steps = [T]
    while steps[-1] > until and steps[-1] % 2 == 0:
        steps.append(steps[-1] // 2)
    if steps[-1] != until or T == until:
        raise UserError(f'--until {until} is not reached by halving the steps of {base_ckpt}; it '
                        f'has {T} steps')
    return steps[1:]


def stages(T, FLAGS):
    """Yield (teacher, folder, training steps) of each halving, by --until and --total_steps.

    Students of 2 steps and 1 train twice as long, as released. The next stage comes when all
    processes are done with the one before, since it reads what the first of them has written.
    """
    if not FLAGS.until:
        yield FLAGS.base_ckpt, FLAGS.logdir, FLAGS.total_steps
        return
    before = FLAGS.base_ckpt
    for steps in halvings(T, FLAGS.until, FLAGS.base_ckpt):
        folder = str(Path(FLAGS.logdir) / str(steps))
        yield before, folder, FLAGS.total_steps * (2 if steps <= 2 else 1)
        distributed.barrier()
        before = folder
