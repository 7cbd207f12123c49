"""Verbs of a training loop, a dozen lines each; the loop itself stays in the script."""

import errno
import fcntl
import json
import math
import os
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import Dropout
from runtime import distributed, options, seeding
from runtime.options import UserError

TORCH = tuple(int(number) for number in torch.__version__.split('.')[:2])


def learning_rate(step, lr, warmup, total_steps, decay):
    """Rate of step 1, 2, ..: linear warm-up, then constant, or a cosine to 0 if `decay`.

    A pure function of the step: nothing to save, nothing to restore.
    """
    rate = lr * min(1., step / warmup) if warmup else lr
    if decay:
        rate *= 0.5 * (1 + math.cos(math.pi * (step - 1) / total_steps))
    return rate


def adam(params, lr, wd):
    """Adam as one fused kernel, where this torch has it for the device of `params`."""
    try:
        return torch.optim.Adam(params, lr=lr, weight_decay=wd, fused=True)
    except RuntimeError:        # torch before 2.4 on a CPU
        return torch.optim.Adam(params, lr=lr, weight_decay=wd)


def strict(loss):
    """The same loss, whose gradient is NaN if the loss is infinite or NaN."""
    return loss * (1 + 0 * loss.detach())


def clip_gradient(params, grad_clip):
    """Scale the gradient to a norm of at most `grad_clip` (0: leave it); returns its norm."""
    limit = grad_clip if grad_clip > 0 else math.inf
    return torch.nn.utils.clip_grad_norm_(params, limit)


def step_optimizer(optim, finite, lr=None):
    """One update, left out where `finite` (a bool tensor) is False; then empties the gradient.

    The fused kernels decide that on the device, so that the host need not wait for it.
    """
    for group in optim.param_groups:
        group['lr'] = group['lr'] if lr is None else lr
    if optim.param_groups[0]['fused']:
        optim.found_inf = (~finite).float()
        optim.step()
    elif finite:
        optim.step()
    optim.zero_grad(set_to_none=True)


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, over the trained parameters."""
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_([e for e, _ in pairs], [p for _, p in pairs], 1 - decay)


def frozen(module):
    """`module` in eval mode, without gradients."""
    return module.eval().requires_grad_(False)


def due(step, every, last=None):
    """Whether something done every `every` steps is due (0: never), or `step` is the `last`."""
    return step == last or (every > 0 and step % every == 0)


def draw(batch_size, shape, low, high, generator):
    """t (B,) uniform in low..high (inclusive) and eps (B, *shape) standard normal.

    Drawn for the total batch, so that a sample's draw does not depend on the number of processes.
    """
    device = generator.device
    t = torch.randint(low, high + 1, (batch_size,), generator=generator, device=device)
    return t, torch.randn((batch_size, *shape), generator=generator, device=device)


def autocast(amp, device):
    """Autocast context for the networks: 'none', 'bf16', or 'auto': bf16 where it is fast."""
    wanted = amp == 'bf16' or (amp == 'auto' and has_fast_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def has_fast_bf16(device):
    """Whether the hardware multiplies bfloat16 matrices: tensor cores, or AMX on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        return 'amx_bf16' in Path('/proc/cpuinfo').read_text()
    except OSError:
        return False


def compile_networks(wanted, device, *networks):
    """With `wanted`, torch.compile `networks` in place: their parameters keep their names.

    Compiling happens in the first call; shapes are fixed, so that a grid of another size compiles
    its own and does not slow down training.
    Raises:
        UserError: this machine cannot compile, found out with one number (code 1).
    """
    if not wanted:
        return
    try:
        if TORCH < (2, 2):      # graphs in pieces, and dropout of its own
            raise RuntimeError('it needs torch 2.2')
        from torch._inductor import config
        config.fallback_random = True       # masks are drawn whole, so that rows of them agree
        torch.compile(torch.exp, dynamic=False)(torch.zeros(1, device=device))
        for network in networks:
            network.compile(dynamic=False)
    except Exception as error:      # what it raises depends on what is missing, and on the version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f'--compile does not work here, with torch {torch.__version__} ({reason}); '
                        f'leave it out', code=1)


class Meter:
    """Means of named scalars between two log lines, and a count of steps that are not finite.

    Adds on the device; `mean` and `check` alone wait for it.
    """

    def __init__(self, state=None):
        """state: a `state_dict` to go on from, so that resuming changes no log line."""
        state = state or dict(sums={}, bad=0, streak=0)
        self.sums, self.before = {}, dict(state['sums'])
        self.bad, self.streak = torch.tensor(state['bad']), torch.tensor(state['streak'])

    def add(self, **terms):
        """Add values; those that are not finite count apart, and do not spoil the mean."""
        for name, value in terms.items():
            value = torch.as_tensor(value).detach().float()
            finite = value.isfinite()
            parts = torch.stack([value.where(finite, value.new_zeros(())), finite.float(),
                                 (~finite).float()])
            if name in self.before:
                parts = parts + torch.tensor(self.before.pop(name), device=parts.device)
            self.sums[name] = self.sums[name] + parts if name in self.sums else parts

    def end_step(self, finite):
        """Whether the step that ends here was applied (a bool tensor, alike on all processes)."""
        self.bad = self.bad.to(finite.device) + ~finite
        self.streak = (self.streak.to(finite.device) + 1) * ~finite

    def _reduce(self):
        """{name: [sum, finite values, others]} over all processes, on the host."""
        names = sorted(self.sums)
        sums = distributed.all_reduce_sum(torch.stack([self.sums[name] for name in names]))
        return dict(zip(names, sums.tolist()))

    def state_dict(self):
        """Numbers for a checkpoint; afterwards all processes hold the same part of the sums."""
        sums = self._reduce() if self.sums else {}
        share = {name: [v / distributed.world_size() for v in values]
                 for name, values in sums.items()}
        self.sums, self.before = {}, dict(share)
        return dict(sums=share, bad=int(self.bad), streak=int(self.streak))

    def mean(self):
        """{name: float} over all processes and finite values, and bad_steps; then empty."""
        means = {name: s / n if n else math.nan for name, (s, n, _) in self._reduce().items()}
        means['bad_steps'] = int(self.bad)
        self.sums, self.before, self.bad = {}, {}, torch.zeros_like(self.bad)
        return means

    def check(self, step, max_bad_steps):
        """Stop the run if too many steps in a row were not finite.

        Raises:
            UserError: with the step, the terms that were not finite and what to try (code 1).
        """
        if not 0 < max_bad_steps <= self.streak:
            return
        broken = [name for name, (_, _, bad) in self._reduce().items() if bad]
        terms = [name for name in broken if name not in ('loss', 'grad_norm')] or broken
        raise UserError(
            f'at step {step} the last {int(self.streak)} steps in a row had a value that is not '
            f'finite ({", ".join(terms)}) and were not applied; lower --lr or --grad_clip, or '
            f'raise --max_bad_steps, and run again: the checkpoint is a good one', code=1)


class Stop:
    """SIGTERM or SIGINT, on any process, asks the run to end after the step it is in."""

    received, since = 0, 0.     # of the process: a signal between two stages counts as well

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        now = time.monotonic()
        if not Stop.received:
            Stop.received, Stop.since = number, now
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # loader workers may be told as well
        elif now - Stop.since > 2:      # not the same request, sent on by a launcher
            os._exit(128 + number)

    def asked(self):
        """Whether any process has been asked; a collective of one number, off the device."""
        self.signal = distributed.largest(Stop.received)
        return self.signal > 0

    def leave_if_asked(self, folder, step):
        """After the loop: say that it was stopped, and end with the exit code of the signal."""
        if not self.signal:
            return
        distributed.print0(f'{signal.Signals(self.signal).name}: stopped after step {step}, saved '
                           f'in {folder}; run the same command again to go on.')
        distributed.cleanup()
        options.leave(128 + self.signal)


class _PlainLines:
    """Standard error for a log file: tqdm's output without control characters."""

    def write(self, text):
        text = text.replace('\r', '').strip()
        if text:
            sys.stderr.write(text + '\n')

    def flush(self):
        sys.stderr.flush()


def progress(total=None, desc='', initial=0, unit='step'):
    """A tqdm bar on a terminal; in a log file one plain line every half minute at most."""
    watched = sys.stderr.isatty()
    every = 0.5 if watched else 30
    return tqdm(total=total, initial=initial, desc=desc, unit=unit, dynamic_ncols=watched,
                mininterval=every, maxinterval=2 * every, leave=watched, ascii=not watched,
                disable=not distributed.is_main(), file=None if watched else _PlainLines(),
                bar_format=None if watched else '{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}'
                ', {rate_fmt}{postfix}]')


def _lines_until(path, step):
    """Whole lines of a metrics.jsonl up to `step`; half a line, left by a full disk, is dropped."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            if json.loads(line)['step'] <= step:
                yield line
        except (ValueError, KeyError):
            continue


class Log:
    """Where a run can be watched: a bar, `metrics.jsonl` and TensorBoard; first process only."""

    def __init__(self, logdir, desc, step, total_steps, images_per_step):
        self.bar = progress(total_steps, desc, step)
        self.images_per_step, self.since = images_per_step, (time.perf_counter(), step)
        self.file = self.board = None
        if distributed.is_main():
            from tensorboardX import SummaryWriter
            path = Path(logdir) / 'metrics.jsonl'
            keep = ''.join(line + '\n' for line in _lines_until(path, step))
            path.with_suffix('.tmp').write_text(keep)       # no step twice after resuming
            path.with_suffix('.tmp').replace(path)
            self.file = path.open('a')
            self.board = SummaryWriter(str(logdir), purge_step=step + 1)
            self.board.add_text('flags', textwrap.indent(options.resolved(), '    '), step)

    def write(self, step, **scalars):
        """One line of scalars, with images/s since the last line and the memory in use."""
        now = time.perf_counter()
        scalars['images_per_s'] = (step - self.since[1]) * self.images_per_step / (
            now - self.since[0])
        scalars['memory_mb'] = memory_mb()
        self.since = (now, step)
        if self.file:
            finite = {name: v if math.isfinite(v) else None for name, v in scalars.items()}
            self.file.write(json.dumps(dict(step=step, **finite)) + '\n')
            self.file.flush()
            for name, value in finite.items():
                if value is not None:
                    self.board.add_scalar(f'train/{name}', value, step)     # one section
            self.board.flush()      # so that a kill takes no line that metrics.jsonl has
        self.bar.set_postfix_str(f'loss {scalars["loss"]:.4g}, {scalars["images_per_s"]:.0f} img/s',
                                 refresh=False)

    def grid(self, step, path, images):
        """Images (B, 3, H, W) in [-1, 1] as a PNG and in TensorBoard."""
        if self.file:
            side = max(1, round(len(images) ** 0.5))
            picture = save_grid(images, path, nrow=side, scale=max(1, 64 // images.shape[-1]))
            self.board.add_image('samples', picture, step, dataformats='HWC')

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()
            self.board.close()


def memory_mb():
    """Peak of the GPU memory in use, or the memory of this process now, in MiB; 0: unknown."""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2 ** 20, 1)
    try:
        pages = int(Path('/proc/self/statm').read_text().split()[1])
    except OSError:
        return 0
    return round(pages * os.sysconf('SC_PAGE_SIZE') / 2 ** 20, 1)


def save_grid(images, path, nrow=8, scale=1):
    """Write images (B, 3, H, W) in [-1, 1] as one PNG grid, enlarged `scale` times.

    Returns the picture, uint8 (height, width, 3).
    """
    import runtime.torchvision_cpu  # noqa: F401
    from torchvision.utils import make_grid
    from PIL import Image
    grid = make_grid(images.detach().float().cpu(), nrow=nrow, padding=1, pad_value=1)
    grid = grid.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(grid)
    size = (picture.width * scale, picture.height * scale)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture = picture.resize(size, Image.NEAREST)
    picture.save(path)
    return np.asarray(picture)


@torch.no_grad()
def save_samples(log, step, folder, diffusion, network, x_T, y, amp='none'):
    """Draw a grid from fixed x_T and labels on the first process; takes no random number."""
    if not distributed.is_main():
        return
    training = network.training
    network.eval()
    with autocast(amp, x_T.device):
        images = diffusion.sample(network, x_T, y=y)
    network.train(training)
    log.grid(step, f'{folder}/sample/{step}.png', images)


def seed_dropout(network, rows, total, seed, T, step):
    """Make the dropout masks of a step a function of (seed, T, step, place in the total batch).

    Args:
        rows: slice of the `total` images of the batch that the next forward pass works on.
    """
    torch.manual_seed(seeding.mix(seed, seeding.DROPOUT, T, step))
    for module in network.modules():
        if isinstance(module, Dropout):
            module.total, module.rows = total, rows


def make_logdir(logdir, flag='--logdir'):
    """Create the folder of a run, take it for this process and write its flagfile.

    Raises:
        UserError: it cannot be written to, or another run is at work in it.
    """
    problem = None
    if distributed.is_main():
        try:
            Path(logdir).mkdir(parents=True, exist_ok=True)
            problem = lock(Path(logdir) / '.lock')
            if not problem:
                options.save_flagfile(logdir)
        except OSError as error:
            problem = f'cannot be written to ({error.strerror})'
    problem = distributed.broadcast_object(problem)
    if problem:
        raise UserError(f'{flag} {logdir} {problem}; choose another')


_locks = []         # open files: closing one would give its lock back


def lock(path):
    """Hold `path` until this process ends, however it ends; or return who holds it."""
    file = open(path, 'a+')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None     # a file system without locks
        file.seek(0)
        return f'is in use by {file.read().strip() or "another run"}'
    _locks.append(file)
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    return None


def fixed_noise(seed, count, img_size, device):
    """x_T of the sample grids: the same images at every step and in every run of this seed."""
    return seeding.noise_of_images(seed, range(count), (3, img_size, img_size), device)


def fixed_labels(count, class_num, conditional, device):
    """Labels 0, 1, 2, .. of a sample grid, in turn; None for an unconditional network."""
    return torch.arange(count, device=device) % class_num if conditional else None
