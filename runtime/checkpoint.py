"""Checkpoints: plain types only, written so that a kill at any moment loses nothing."""

import contextlib
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import torch

from model import UNet
from runtime import distributed
from runtime.options import UserError

ARCH = ('T', 'ch', 'ch_mult', 'attn', 'num_res_blocks', 'conditional', 'class_num')


def save(path, state):
    """Write `state` (tensors, numbers, strings, lists, dicts) to a temporary file, then rename.

    Raises:
        UserError: it cannot be written (code 1); what was there before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:        # torch raises RuntimeError on a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        reasons = [getattr(e, 'strerror', None) for e in (error, error.__context__)]
        reason = reasons[0] or reasons[1] or str(error).splitlines()[0]
        raise UserError(f'{path} could not be written ({reason}); what it held before is '
                        f'untouched; make room and run the same command again', code=1)


def find(path):
    """The file of a checkpoint given as a file or as the folder of its run."""
    path = Path(path).expanduser()
    return path / 'ckpt.pt' if path.is_dir() or not path.suffix else path


def read(path):
    """A checkpoint, on the CPU. Executes nothing from the file (`weights_only`).

    Raises:
        UserError: the file is missing, truncated, of another kind, or holds code.
    """
    path = find(path)
    if not path.is_file():
        raise UserError(f'there is no checkpoint {path}; give the folder of a finished run')
    try:
        with warnings.catch_warnings():     # torch 2.1 warns of its own TypedStorage
            warnings.simplefilter('ignore', UserWarning)
            state = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if 'Unsupported' in str(error) else 'it is not one of '\
            'plain tensors and numbers, or it is damaged'
        raise UserError(f'{path} is refused as a checkpoint: {reason}')
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile):
        raise UserError(f'{path} is truncated or not a checkpoint; make it again or restore a copy')
    if not isinstance(state, dict):
        raise UserError(f'{path} holds a {type(state).__name__}, expected a checkpoint dictionary')
    return state


def save_run(logdir, keep, **state):
    """Write `<logdir>/ckpt.pt` on the first process; `state` has at least step.

    With `keep`, it is also ckpt_<step>.pt (one file, two names), and as many earlier ones stay.
    """
    if not distributed.is_main():
        return
    newest = Path(logdir) / 'ckpt.pt'
    if not keep:
        return save(newest, state)
    numbered = newest.with_name(f'ckpt_{state["step"]}.pt')
    save(numbered, state)
    second_name(numbered, newest)
    files = history(logdir)
    here = files.index(numbered)        # later ones could not be read, or the run had gone on
    for other in files[:here] + files[here + keep + 1:]:
        other.unlink()


def second_name(file, name):
    """Let `name` mean `file` as well, replacing what it meant in one go."""
    temporary = name.with_name(name.name + '.tmp')
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(file, temporary)
    except OSError:         # a file system without hard links
        shutil.copyfile(file, temporary)
    os.replace(temporary, name)


def history(logdir):
    """The files ckpt_<step>.pt of a run, the newest first."""
    files = [f for f in Path(logdir).glob('ckpt_*.pt') if f.stem[len('ckpt_'):].isdigit()]
    return sorted(files, key=lambda f: -int(f.stem[len('ckpt_'):]))


def read_newest(logdir):
    """The newest readable checkpoint of a run, or None; names those it passes over.

    Raises:
        UserError: there are checkpoints, and none can be read.
    """
    newest, problem = Path(logdir) / 'ckpt.pt', None
    for file in [newest] * newest.exists() + history(logdir):
        try:
            state = read(file)
            if problem:
                distributed.print0(f'note: {problem}; going on from {file} instead.')
            return state
        except UserError as error:
            problem = problem or error
    if problem:
        raise problem
    return None


def resume(logdir, network, method, T, time_scale, base_ckpt=None):
    """The state a run left in its folder, or None for a fresh start.

    Args:
        network: about to be trained, by `method` ('base', 'pd', 'rdd'); T, time_scale: its grid.
        base_ckpt: its teacher, if any.
    Raises:
        UserError: a checkpoint that this project did not write, or of another network or stage
        than the one about to be trained; the folder of the teacher.
    """
    if base_ckpt and find(base_ckpt).resolve() == (Path(logdir) / 'ckpt.pt').resolve():
        raise UserError(f'--logdir {logdir} is the folder of the teacher (--base_ckpt), which '
                        f'would be overwritten; choose another --logdir')
    state = read_newest(logdir)
    step = state.get('step') if state else 0
    if distributed.broadcast_object(step) != step:
        raise UserError(f'process {distributed.rank()} finds step {step} in --logdir {logdir}, the '
                        f'first one another; all machines must see the same folder', code=1)
    if state is None:
        return None
    if not {'net_model', 'optim', 'step', 'T', 'time_scale'} <= set(state):
        raise UserError(f'--logdir {logdir} holds a checkpoint without optimiser and step, so it '
                        f'cannot be continued and would be overwritten; choose another --logdir')
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    if {key: value.shape for key, value in state['net_model'].items()} != shapes:
        raise UserError(f'--logdir {logdir} holds a run of another network '
                        f'({architecture(state["net_model"])}); choose another --logdir')
    if (state.get('method'), state['T'], state['time_scale']) != (method, T, time_scale):
        raise UserError(f'--logdir {logdir} holds a {state.get("method")} model with {state["T"]} '
                        f'steps of {state["time_scale"]} grid points, and this run makes a '
                        f'{method} model with {T} of {time_scale}; choose another --logdir')
    return state


def restore(state, **parts):
    """Load the parts of a resumed run: `restore(state, net_model=net, ema_model=None, ...)`.

    A part that is None is not wanted now.
    Raises:
        UserError: a part the run does not have, has without being wanted, or has in other shapes.
    """
    flags = dict(ema_model='--ema_decay', memory='--queue_size, --contrast_size or --queue_layout')
    for name, part in parts.items():
        try:
            if (part is None) != (name not in state):
                raise ValueError
            if part is not None:
                part.load_state_dict(state[name])
        except (ValueError, RuntimeError, KeyError):
            raise UserError(f'the run to be continued was started with another '
                            f'{flags.get(name, name)}; give the same, or choose another --logdir')


def plain_keys(state_dict):
    """A state dict without the `module.` prefixes that wrapped networks leave."""
    return {key[len('module.'):] if key.startswith('module.') else key: value
            for key, value in state_dict.items()}


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
        blocks += level == 0
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


def some_of(state):
    """The first keys of a dict, for messages that say what a file holds."""
    keys = [str(key) for key in state]
    return ', '.join(keys[:5] + ['..'] * (len(keys) > 5)) or 'nothing in it'


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
    network.load_state_dict(state_dict)
    if 'details' in state:      # a network of diffusers, see export.py
        network.set_details(**state['details'])
    return network, name


def differences(found, expected):
    """(name, shape found, shape expected) wherever two state dicts differ."""
    shapes = [{key: tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
               for key, value in state_dict.items()} for state_dict in (found, expected)]
    for key in {**shapes[1], **shapes[0]}:
        pair = [shape.get(key, 'absent') for shape in shapes]
        if pair[0] != pair[1]:
            yield (key, *pair)


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
    return (T, state.get('time_scale', arch['T'] // T), state.get('schedule', 'cosine'),
            state.get('mean_type'))


def check_flags(arch, path, flags, given):
    """Refuse flags that contradict the network in a checkpoint.

    Args:
        arch: from `architecture`. flags: the values. given: name -> whether the user wrote it.
    """
    for name in ARCH[1:]:
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


class Teacher:
    """The network to distil from, with its grid: network, T, time_scale, conditional, class_num."""

    def __init__(self, network, state, arch):
        self.network = network
        self.T, self.time_scale, self.schedule, _ = grid(state, arch)
        self.conditional, self.class_num = arch['conditional'], arch['class_num']


def load_teacher(path, flags):
    """A checkpoint to halve, checked against the flags given.

    Raises:
        UserError: not a diffusion checkpoint, an odd or single number of steps, a network or
        output type that the flags contradict.
    """
    from runtime.options import given
    file = find(path)
    state = read(file)
    network, _ = build_unet(state, file, flags.dropout)
    arch = architecture(network.state_dict())
    check_flags(arch, file, flags, given)
    teacher = Teacher(network, state, arch)
    if teacher.schedule != 'cosine':
        raise UserError(f'{file} was trained on the linear schedule of pytorch-ddpm, and students '
                        f'here live on the cosine one; train a teacher with train_base.py')
    if 'details' in state:
        raise UserError(f'{file} is a network of diffusers with {state["details"]}, which students '
                        f'here would not have; train a teacher with train_base.py')
    if teacher.T % 2:
        raise UserError(f'--base_ckpt {path} has {teacher.T} sampling steps, which cannot be '
                        f'halved; an even number is needed')
    halvings = 2 ** (len(arch['ch_mult']) - 1)
    if flags.img_size % halvings:
        raise UserError(f'--img_size is {flags.img_size}, expected a multiple of {halvings}: the '
                        f'network in {file} halves it {len(arch["ch_mult"]) - 1} times')
    check_facts(state, file, flags, lambda name: True)
    return teacher
