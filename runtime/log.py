"""What a run reports: means of its losses, metrics.jsonl, TensorBoard and the progress bar."""

import itertools
import json
import math
import os
import sys
import textwrap
import time
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import distributed, pictures
from runtime.cli import UserError


MOST_RECENT = 100       # values of a term that are kept before they are added up


class Meter:
    """Means of named scalars between two log lines, and a count of steps that are not finite.

    Adds on the device; `mean` and `check` alone wait for it. Values are kept as they come and added
    up now and then, so that a GPU has few small operations to start in a step.
    """

    def __init__(self, state=None):
        """state: a `state_dict` to go on from, so that resuming changes no log line."""
        state = state or dict(sums={}, bad=0, streak=0)
        self.recent, self.sums, self.before = {}, {}, dict(state['sums'])
        self.bad, self.streak = torch.tensor(state['bad']), torch.tensor(state['streak'])

    def add(self, **terms):
        """Add values; those that are not finite count apart, and do not spoil the mean."""
        values = torch.stack([torch.as_tensor(v).detach().float() for v in terms.values()])
        recent = self.recent.setdefault(tuple(terms), [])
        recent.append(values)
        if len(recent) == MOST_RECENT:
            self._add_up(tuple(terms))

    def _add_up(self, names):
        """Move what was added lately under `names` into `sums`: [sum, finite values, others]."""
        values = torch.stack(self.recent.pop(names), 1)
        finite = values.isfinite()
        parts = torch.stack([values.where(finite, values.new_zeros(())).sum(1), finite.sum(1),
                             (~finite).sum(1)], 1)
        if not self.before.keys().isdisjoint(names):
            before = [self.before.pop(name, [0., 0., 0.]) for name in names]
            parts = parts + torch.tensor(before, device=parts.device)
        self.sums[names] = self.sums[names] + parts if names in self.sums else parts

    def end_step(self, finite):
        """Whether the step that ends here was applied (a bool tensor, alike on all processes)."""
        self.bad = self.bad.to(finite.device) + ~finite
        self.streak = (self.streak.to(finite.device) + 1) * ~finite

    def _reduce(self):
        """{name: [sum, finite values, others]} over all processes, on the host."""
        for names in list(self.recent):
            self._add_up(names)
        groups = sorted(self.sums)
        sums = distributed.all_reduce_sum(torch.cat([self.sums[names] for names in groups]))
        found = {}
        for name, values in zip(itertools.chain(*groups), sums.tolist()):
            found[name] = [a + b for a, b in zip(values, found.get(name, [0., 0., 0.]))]
        return dict(sorted(found.items()))

    def state_dict(self):
        """Plain values for a checkpoint; each process then holds an equal share of the sums."""
        sums = self._reduce() if self.sums or self.recent else {}
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
            f'raise --max_bad_steps, and run again: a checkpoint that was saved is a good one',
            code=1)


class _PlainLines:
    """Standard error for a log file: the output of tqdm without control characters."""

    def write(self, text):
        text = text.replace('\r', '').strip()
        if text:
            sys.stderr.write(text + '\n')

    def flush(self):
        sys.stderr.flush()


def progress(total=None, desc='', initial=0, unit='step'):
    """A tqdm bar on a terminal; in a log file one plain line every half minute at most."""
    terminal = sys.stderr.isatty()
    every = 0.5 if terminal else 30
    return tqdm(total=total, initial=initial, desc=desc, unit=unit, dynamic_ncols=terminal,
                mininterval=every, maxinterval=2 * every, leave=terminal, ascii=not terminal,
                disable=not distributed.is_main(), file=None if terminal else _PlainLines(),
                bar_format=None if terminal else '{desc}: {n_fmt}/{total_fmt} [{elapsed}<'
                '{remaining}, {rate_fmt}{postfix}]')


def summary(steps, seconds, images, folder):
    """The line that a training ends with: steps of this start, time, speed, folder."""
    minutes, rest = divmod(round(seconds), 60)
    time_taken = f'{minutes} min {rest} s' if minutes else f'{seconds:.1f} s'
    rate, unit = images / max(seconds, 1e-9), 'step' if steps == 1 else 'steps'
    return (f'finished: {steps:,} {unit} in {time_taken}, {rate:.0f} images/s; checkpoint and log '
            f'are in {folder}')


def _lines_until(path, step):
    """Whole lines of a metrics.jsonl up to `step`; incomplete lines (full disk) are dropped."""
    text = path.read_text(errors='replace') if path.exists() else ''
    for line in text.splitlines():
        try:
            if json.loads(line)['step'] <= step:
                yield line
        except (ValueError, KeyError, TypeError):
            continue


class Log:
    """Progress bar, `metrics.jsonl` and TensorBoard of a run; the first process alone writes.

    Args:
        step: steps that are done already; later lines of an earlier start are dropped.
        flags_text: the resolved flags, shown in TensorBoard.
    """

    def __init__(self, logdir, desc, step, total_steps, images_per_step, flags_text):
        self.bar = progress(total_steps, desc, step)
        self.images_per_step, self.start = images_per_step, (time.perf_counter(), step)
        self.since = self.start
        self.file = self.board = None
        if distributed.is_main():
            from tensorboardX import SummaryWriter
            path = Path(logdir) / 'metrics.jsonl'
            keep = ''.join(line + '\n' for line in _lines_until(path, step))
            path.with_suffix('.tmp').write_text(keep)       # no step twice after resuming
            path.with_suffix('.tmp').replace(path)
            self.file = path.open('a')
            self.board = SummaryWriter(str(logdir), purge_step=step + 1)
            self.board.add_text('flags', textwrap.indent(flags_text, '    '), step)

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
            picture = pictures.save_grid(images, path, nrow=side,
                                         scale=max(1, 64 // images.shape[-1]))
            self.board.add_image('samples', picture, step, dataformats='HWC')

    def summary(self, step, folder):
        """The last line of a run that has done `step` steps."""
        steps, seconds = step - self.start[1], time.perf_counter() - self.start[0]
        return summary(steps, seconds, steps * self.images_per_step, folder)

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()
            self.board.close()


def memory_mb():
    """Peak of the GPU memory, or the resident memory of this process now, in MiB; 0: unknown."""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2 ** 20, 1)
    try:
        pages = int(Path('/proc/self/statm').read_text().split()[1])
    except OSError:
        return 0
    return round(pages * os.sysconf('SC_PAGE_SIZE') / 2 ** 20, 1)
