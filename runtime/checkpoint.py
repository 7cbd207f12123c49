"""Checkpoints: plain types only, written so that a kill at any moment loses nothing."""

import contextlib
import os
import pickle
import shutil
import warnings
from pathlib import Path

import torch

from runtime import distributed
from runtime.cli import UserError


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
        reason = reasons[0] or reasons[1] or str(error).split('\n')[0]
        raise UserError(f'{path} could not be written ({reason}); what it held before is '
                        f'untouched; make room and run the same command again', code=1)


def not_finite(state):
    """Names of the entries of `state` (nested dicts) that hold values which are not finite.

    Computed where the tensors are; the host waits once per entry.
    """
    found = []
    for name, value in state.items():
        tensors = [v for v in _tensors(value) if v.is_floating_point() and v.numel()]
        if tensors and not torch.stack([v.isfinite().all() for v in tensors]).all():
            found.append(name)
    return found


def _tensors(value):
    """The tensors in nested dicts and lists."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def check_finite(state, step, last_good, remedy):
    """Refuse to save weights, averages or moments that are lost.

    Args:
        state: what would be saved. last_good: file or folder of the last good checkpoint, to name.
        remedy: what to change.
    Raises:
        UserError: naming the entries (code 1).
    """
    names = not_finite(state)
    if names:
        raise UserError(f'at step {step} {", ".join(names)} hold values that are not finite, so '
                        f'nothing was saved and {last_good} is as it was; {remedy}', code=1)


def find(path):
    """The file of a checkpoint given as a file or as the folder of its run."""
    path = Path(path).expanduser()
    is_folder = path.is_dir() or not path.suffix and not path.is_file()
    return path / 'ckpt.pt' if is_folder else path


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
    except pickle.UnpicklingError:
        raise UserError(f'{path} is refused as a checkpoint: it is damaged, or it holds more than '
                        f'tensors, numbers and text, which could run code; give a file that this '
                        f'project or a published one like it has written')
    except Exception:       # the bytes of a file of another kind decide what is raised
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
    newest, files, problem = Path(logdir) / 'ckpt.pt', history(logdir), None
    if newest.exists():
        files.insert(0, newest)
    for file in files:
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


def resume(logdir, network, method, T, time_scale, base_ckpt=None, same=None):
    """The state a run left in its folder, or None for a fresh start.

    Args:
        network: about to be trained, by `method` ('base', 'pd', 'rdd'); T, time_scale: its grid.
        base_ckpt: its teacher, if any. same: {flag: value} that must not change in a run.
    Raises:
        UserError: a checkpoint that this project did not write, or of another network, stage or
        data than those about to be trained; the folder of the teacher.
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
    if type(step) is not int or step < 0:
        raise UserError(f'--logdir {logdir} holds a checkpoint whose step is {step}, expected a '
                        f'whole number; restore a copy, or choose another --logdir')
    lost = not_finite({'net_model': state.get('net_model')})
    if lost:
        raise UserError(f'--logdir {logdir} holds a checkpoint whose weights are not finite; '
                        f'replace its ckpt.pt by an earlier ckpt_STEP.pt, or choose another '
                        f'--logdir')
    for name, found, expected in differences(state['net_model'], network.state_dict()):
        raise UserError(f'--logdir {logdir} holds a run of another network ({name} is {found}, '
                        f'here it is {expected}); choose another --logdir')
    if (state.get('method'), state['T'], state['time_scale']) != (method, T, time_scale):
        raise UserError(f'--logdir {logdir} holds a {state.get("method")} model with {state["T"]} '
                        f'steps of {state["time_scale"]} grid points, and this run makes a '
                        f'{method} model with {T} of {time_scale}; choose another --logdir')
    for name, value in (same or {}).items():
        if state.get(name, value) != value:
            raise UserError(f'--{name} is {value} and the run in --logdir {logdir} was started '
                            f'with {state[name]}, which cannot change; give the same, or choose '
                            f'another --logdir')
    return state


def restore(state, **parts):
    """Load the parts of a resumed run: `restore(state, net_model=net, ema_model=None, ...)`.

    A part that is None is not used now. An optimiser takes its moments from the file; its rate,
    weight decay and implementation stay those it was made with.
    Raises:
        UserError: a part the run does not have, has although it is not used, or has in other
        shapes.
    """
    flags = dict(ema_model='--ema_decay', memory='--loss_type, --queue_size, --contrast_size or '
                 '--queue_layout')
    for name, part in parts.items():
        try:
            if (part is None) != (name not in state):
                raise ValueError
            if isinstance(part, torch.optim.Optimizer):
                part.load_state_dict(_with_groups_of(part, state[name]))
            elif part is not None:
                part.load_state_dict(state[name])
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError):
            if name not in flags:
                raise UserError(f'{name} in the checkpoint of the run is incomplete or of other '
                                f'parameters; restore a copy, or choose another --logdir')
            raise UserError(f'the run to be continued was started with another '
                            f'{flags.get(name, name)}; give the same, or choose another --logdir')


def _with_groups_of(optim, state):
    """The state dict of an optimiser with the hyperparameters that `optim` has now."""
    groups = [dict(now, params=saved['params'])
              for now, saved in zip(optim.param_groups, state['param_groups'])]
    return dict(state, param_groups=groups)


def plain_keys(state_dict):
    """A state dict without the `module.` prefixes that wrapped networks leave."""
    return {key[len('module.'):] if key.startswith('module.') else key: value
            for key, value in state_dict.items()}


def some_of(state):
    """The first keys of a dict, for messages that say what a file holds."""
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
