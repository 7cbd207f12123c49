"""Checkpoints: plain types only, written so that a kill at any moment loses nothing."""

import hashlib
import os
import pickle
import shutil
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten

from runtime import distributed, flags
from runtime.cli import UserError, first_line
from runtime.files import replacing

WRAPPERS = ('module.', '_orig_mod.', 'ema_model.')      # prefixes that wrapped networks leave
LFS = b'version https://git-lfs'     # how a pointer begins, in place of a file
STATES = ('ema_model', 'memory', 'optim_head')      # a run either has them or does not
MOMENTS = {torch.optim.Adam: {'step', 'exp_avg', 'exp_avg_sq'},
           torch.optim.SGD: {'momentum_buffer'}}


# Files

def save(path, state):
    """Write `state` (tensors, numbers, strings, lists, dicts); UserError (code 1) if that fails."""
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:        # torch raises RuntimeError on a full disk
        reason = getattr(error, 'strerror', None) or first_line(error.__context__ or error)
        raise UserError(f'{path} could not be written ({reason}); what it held before is '
                        f'untouched; make room and run the same command again', code=1)


def find(path):
    """The file of a checkpoint given as a file or as the folder of its run."""
    path = Path(path).expanduser()
    is_folder = path.is_dir() or not path.suffix and not path.is_file()
    return path / 'ckpt.pt' if is_folder else path


def read(path):
    """A checkpoint, on the CPU; UserError if it is missing, damaged, of another kind or code."""
    path = find(path)
    if not path.is_file():
        kind = 'is no regular file' if path.exists() else 'does not exist'
        raise UserError(f'there is no checkpoint {path} (it {kind}); give the folder of a finished '
                        f'run')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except PermissionError:
        raise UserError(f'{path} cannot be read: permission denied; make it readable')
    except pickle.UnpicklingError:
        with open(path, 'rb') as file:
            if file.read(len(LFS)) == LFS:
                raise UserError(f'{path} is a pointer of Git LFS, not the file itself; fetch it '
                                f'with: git lfs pull')
        raise UserError(f'{path} is refused as a checkpoint: it is damaged, or holds objects that '
                        f'could run code (a snapshot of EDM: see convert.py)')
    except Exception:       # the bytes of a file of another kind decide what is raised
        raise UserError(f'{path} is truncated or not a checkpoint; make it again or restore a copy')
    if not isinstance(state, dict):
        raise UserError(f'{path} holds a {type(state).__name__}, expected a checkpoint dictionary')
    return state


def save_run(logdir, keep, **state):
    """Write `<logdir>/ckpt.pt` on the first process; `state` has at least step.

    With `keep`, it then gets the name ckpt_<step>.pt as well, and as many earlier ones stay.
    """
    if not distributed.is_main():
        return
    newest = Path(logdir) / 'ckpt.pt'
    save(newest, state)
    if not keep:
        return
    numbered = newest.with_name(f'ckpt_{state["step"]}.pt')
    with replacing(numbered) as temporary:
        try:
            os.link(newest, temporary)
        except OSError:         # a file system without hard links
            shutil.copyfile(newest, temporary)
    files = history(logdir)
    here = files.index(numbered)        # later ones could not be read, or the run had gone on
    for other in files[:here] + files[here + keep + 1:]:
        other.unlink()


def history(logdir):
    """The files ckpt_<step>.pt of a run, the newest first."""
    steps = [file.stem[len('ckpt_'):] for file in Path(logdir).glob('ckpt_*.pt')]
    steps = sorted((step for step in steps if step.isdigit()), key=int, reverse=True)
    return [Path(logdir) / f'ckpt_{step}.pt' for step in steps]


def read_newest(logdir):
    """The newest readable checkpoint of a run, None without any; UserError if none is readable."""
    files, problem = [Path(logdir) / 'ckpt.pt', *history(logdir)], None
    for file in filter(Path.exists, files):
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


def not_finite(state):
    """Names of the entries of `state` (nested dicts) that hold NaN or inf."""
    found = []
    for name, value in state.items():
        leaves, _ = tree_flatten(value)
        tensors = [v for v in leaves if torch.is_tensor(v) and v.is_floating_point() and v.numel()]
        if tensors and not torch.stack([v.isfinite().all() for v in tensors]).all():
            found.append(name)
    return found


# Resuming

def read_run(logdir, key, fixed, inputs):
    """The state that a run left in its folder, or None; UserError if it is none to go on from.

    Args:
        key: of the weights.
        fixed: {key: value} of the checkpoint that must be the same now.
        inputs: {name: digest} of what the run builds on; `data` may change with a note.
    """
    def refuse(found):
        raise UserError(f'{logdir} holds {found}, or choose another {flags.folder_flag()}')

    state = read_newest(logdir)
    step = state.get('step', 0) if state else 0
    if type(step) is not int or step < 0:
        refuse(f'a checkpoint whose step is {step!r}, expected a whole number; restore a copy')
    if distributed.broadcast_object(step) != step:
        raise UserError(f'process {distributed.rank()} finds step {step} in {logdir}, the first '
                        f'one another; all machines must see the same folder', code=1)
    if state is None:
        return None
    lacking = [name for name in (key, 'optim', 'step', 'flags') if name not in state]
    if lacking:
        refuse(f'a checkpoint without {", ".join(lacking)}, so it cannot be continued and would be '
               f'overwritten; move it away')
    if not isinstance(state[key], dict) or not_finite({key: state[key]}):
        refuse('a checkpoint whose weights are missing or not finite; replace its ckpt.pt by an '
               'earlier ckpt_STEP.pt')
    flags.compare_with(state['flags'], logdir)
    for name, value in fixed.items():
        if state.get(name) != value:
            refuse(f'a run with {name} {str(state.get(name))[:60]}, and this one has '
                   f'{str(value)[:60]}; give the same')
    before = dict(inputs, **(state.get('inputs') or {}))
    for name in inputs:
        if name != 'data' and before[name] != inputs[name]:
            refuse(f'a run with another {name} than the one given now; give the same')
    if before['data'] != inputs['data']:
        distributed.print0('note: resuming with other images than before (names, sizes or times '
                           'of change differ, or they were read by an earlier version).')
    return state


def digest(state_dict):
    """First 16 hex digits of the SHA-256 of names and values of a state dict."""
    found = hashlib.sha256()
    for key in sorted(state_dict):
        found.update(key.encode())
        if torch.is_tensor(state_dict[key]):
            found.update(state_dict[key].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def restore(state, parts, logdir):
    """Load the parts of a resumed run, {key: module or optimiser}, of optimisers the moments alone.

    UserError: the file lacks a part, has one that is not used now, or has it in other shapes.
    """
    unused = [name for name in STATES if name in state and name not in parts]
    lacking = [name for name in parts if name not in state]
    if unused or lacking:
        raise UserError(f'the checkpoint in {logdir} {"has" if unused else "lacks"} '
                        f'{", ".join(unused or lacking)}, so its run was started with other flags '
                        f'(as --ema_decay); give the same, or choose another {flags.folder_flag()}')
    for name, part in parts.items():
        try:
            if isinstance(part, torch.optim.Optimizer):
                part.load_state_dict(moments(part, state[name]))
            else:
                for key, found, expected in differences(state[name], part.state_dict()):
                    raise ValueError(f'{key} is {found}, expected {expected}')
                part.load_state_dict(state[name])
        except Exception as error:      # the content of the file decides what is raised
            raise UserError(f'{name} of the checkpoint in {logdir} does not fit this run '
                            f'({first_line(error)}); give its flags, or choose another '
                            f'{flags.folder_flag()}')


def moments(optim, saved):
    """The state dict `saved` with the hyperparameters of `optim`; ValueError if it does not fit.

    Fused kernels trust the layout of moments: another one would let them write beyond their end.
    """
    params = [p for group in optim.param_groups for p in group['params']]
    state = {}
    for i, values in saved['state'].items():
        if i not in range(len(params)) or set(values) != MOMENTS[type(optim)]:
            raise ValueError(f'parameter {i} of {len(params)} has the moments {some_of(values)}')
        state[i] = {}
        for name, value in values.items():
            like = torch.zeros(()) if name == 'step' else params[i].detach()
            if not (torch.is_tensor(value) and value.layout == torch.strided
                    and value.shape == like.shape and value.dtype == torch.float32):
                raise ValueError(f'{name} of parameter {i} is not float32 {tuple(like.shape)}')
            state[i][name] = torch.empty_like(like).copy_(value)
    groups = [dict(now, params=before['params'])
              for now, before in zip(optim.param_groups, saved['param_groups'])]
    return dict(state=state, param_groups=groups)


# State dicts

def plain_keys(state_dict):
    """A state dict without the prefixes that wrapped networks leave on all names."""
    for prefix in WRAPPERS:
        if state_dict and all(str(key).startswith(prefix) for key in state_dict):
            return plain_keys({key[len(prefix):]: value for key, value in state_dict.items()})
    return state_dict


def some_of(state):
    """The first keys of a dict, for messages about the contents of a file."""
    keys = [str(key) for key in state]
    return ', '.join(keys[:5] + (['..'] if len(keys) > 5 else [])) or 'nothing in it'


def differences(found, expected):
    """(name, shape found, shape expected) wherever two state dicts differ."""
    shapes = [{key: tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
               for key, value in state_dict.items()} for state_dict in (found, expected)]
    for key in {**shapes[1], **shapes[0]}:
        pair = [shape.get(key, 'absent') for shape in shapes]
        if pair[0] != pair[1]:
            yield (key, *pair)
