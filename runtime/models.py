"""Diffusion models from their checkpoints: network, schedule and the facts stored with them."""

import copy
import os
from pathlib import Path

import torch

from diffusion import Diffusion, clean_linear
from formats import diffusers_folder, diffusers_network
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
        self.diffusion = Diffusion(**self.diffusion.arguments(), device=device)
        return self

    def student(self, flags):
        """(network, schedule) of a student: a copy to train, with every second time of the teacher.

        The flags, which the run records, become those of the student: its network, and in
        mean_type what it predicts, see `student_type`.
        """
        d, network = self.diffusion, copy.deepcopy(self.network).train().requires_grad_(True)
        if isinstance(network, UNet):
            network.time_embedding.timembedding[0].requires_grad_(False)    # no parameter: a table
        for name in ARCHITECTURE:
            setattr(flags, name, self.arch[name])
        flags.mean_type = student_type(self, flags)
        if flags.mean_type != d.mean_type:
            distributed.print0(f'note: the student predicts {flags.mean_type} (--mean_type), its '
                               f'teacher {d.mean_type}: it learns that in this stage.')
        return network, d.with_steps(d.T // 2, flags.mean_type)


def student_type(teacher, flags):
    """What a student predicts: --mean_type, if it is given; else v after eps, which diverges.

    A teacher whose checkpoint does not say what it predicts was itself read by --mean_type.
    Raises:
        UserError: eps, on a schedule that ends with alpha 0.
    """
    d, stated = teacher.diffusion, 'mean_type' in teacher.facts or 'T' not in teacher.facts
    if not stated:
        return d.mean_type
    found = flags.mean_type if given('mean_type') else d.mean_type.replace('epsilon', 'v')
    if found == 'epsilon' and d.alpha[-1] == 0:
        raise UserError(f'--mean_type is epsilon and the schedule of {teacher.file} ends with '
                        f'alpha 0, where eps says nothing about the image; set --mean_type=v')
    return found


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


def load_model(path, weights='auto', dropout=0., mean_type='xstart', img_size=32, steps=0):
    """The frozen model of a checkpoint, on the CPU; the architecture is read off the weights.

    Args:
        path: folder or file, or a folder of diffusers. weights: 'net', 'ema', or 'auto': the
            average of a base model, the raw weights of a student.
        mean_type, img_size: for a checkpoint that does not say.
        steps: DDIM steps that the model is taken to have; 0: as many as it says.
    Raises:
        UserError: not a diffusion checkpoint, or not one of so many steps.
    """
    file, state = read_model(path)
    if steps and 'T' not in state:
        state = with_clean_end(state)
    network, name = build_unet(state, file, dropout, weights)
    arch = (architecture(network.state_dict()) if isinstance(network, UNet)
            else network.architecture(state.get('N', state['T'] * state['time_scale'])))
    T, time_scale, schedule, stored_type = grid(state, arch)
    diffusion = Diffusion(T, time_scale, stored_type or mean_type, schedule=schedule,
                          N=state.get('N'))
    if steps:
        diffusion = with_steps(diffusion, steps, path)
    # published checkpoints do not say their size, but x_T of their sample grids shows it
    size = state['x_T'].shape[-1] if 'x_T' in state else img_size
    facts = {key: value for key, value in state.items() if key not in LARGE}
    return Model(network.eval().requires_grad_(False), diffusion, file, name, arch,
                 state.get('img_size', size), facts)


def read_model(path):
    """(file, checkpoint) of a path: of a run, a file, or a folder of diffusers as a checkpoint."""
    if diffusers_folder.is_folder(path):
        return diffusers_folder.main_file(path), diffusers_folder.read(path)
    file = checkpoint.find(path)
    return file, checkpoint.read(file)


def save_as_run(model, folder):
    """Write a model of any source as a run's checkpoint in a folder; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / 'ckpt.pt', dict(
        model.network.stored, net_model=model.network.state_dict(), use='net_model',
        img_size=model.img_size, **model.diffusion.arguments()))
    return folder / 'ckpt.pt'


def with_clean_end(state):
    """A checkpoint of pytorch-ddpm with an index 0 where alpha is 1, before its 1000 times."""
    state, N = dict(state), 0
    for name in ('net_model', 'ema_model'):
        if not isinstance(state.get(name), dict):
            continue
        network = state[name] = dict(state[name])
        for key in [key for key in network if key.endswith('timembedding.0.weight')]:
            N = len(network[key])
            network[key] = torch.cat([network[key][:1], network[key]])
    return dict(state, T=N, time_scale=1, schedule=clean_linear(N),
                mean_type=state.get('mean_type', 'epsilon'))


def with_steps(diffusion, steps, path):
    """The schedule in so many steps (--teacher_steps).

    Raises:
        UserError: the model was not trained at their times.
    """
    T, N = diffusion.T, diffusion.N
    if steps > T:
        raise UserError(f'--teacher_steps {steps} is more than the {T} steps of {path}; lower it, '
                        f'or set 0 for all of them')
    if T < N and T % steps:
        raise UserError(f'--teacher_steps {steps} does not divide the {T} steps of {path}, which '
                        f'knows no others; choose a divisor')
    return diffusion.with_steps(steps)


def load_teacher(path, flags, device):
    """The model to halve, on `device`, checked against the flags.

    Raises:
        UserError: not a diffusion checkpoint, an odd or single number of steps, a network or
        image size that the flags contradict.
    """
    first = path == flags.base_ckpt         # a later stage of PD.py has students as teachers
    model = load_model(path, dropout=flags.dropout, mean_type=flags.mean_type,
                       img_size=flags.img_size, steps=flags.teacher_steps if first else 0)
    file, diffusion, levels = model.file, model.diffusion, len(model.arch['ch_mult'])
    check_flags(model.arch, file, flags, given)
    if diffusion.T % 2:
        raise UserError(f'--base_ckpt {path} has {diffusion.T} sampling steps, which cannot be '
                        f'halved; an even number is needed, such as --teacher_steps 128 of a model '
                        f'of 1000 steps')
    if flags.img_size % 2 ** (levels - 1):
        raise UserError(f'--img_size is {flags.img_size}, expected a multiple of '
                        f'{2 ** (levels - 1)}: the network in {file} halves it {levels - 1} times')
    check_facts(model.facts, file, flags, lambda name: name == 'img_size')
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
        if 'unet_config' in state:
            network = diffusers_network.build(state['unet_config'], dropout, path)
        else:
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
    if 'details' in state:      # a network of diffusers
        network.set_details(**state['details'])
    network.stored = {key: state[key] for key in ('details', 'unet_config', 'origin')
                      if key in state}
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
                        f'has {T} steps (a model of diffusers can count as one of fewer, with '
                        f'--teacher_steps 128)')
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
