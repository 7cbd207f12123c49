"""What a run reports: means of its losses, metrics.jsonl, TensorBoard and the progress bar."""

import contextlib
import json
import math
import re
import resource
import sys
import textwrap
import time
from pathlib import Path

import torch
from absl import flags
from tqdm import tqdm

from runtime import distributed, pictures
from runtime.cli import UserError
from runtime.files import replacing

FLAGS = flags.FLAGS


class Meter:
    """Means of named scalars between two log lines; only `means` waits for the device."""

    def __init__(self):
        # steps not applied, counted on the device: since the last line; in a row up to now
        self.values, self.bad_steps, self.streak = {}, 0, 0

    def add(self, **terms):
        for name, value in terms.items():
            self.values.setdefault(name, []).append(torch.as_tensor(value).detach().float())

    def count(self, applied):
        """Count a step; applied: bool tensor on the device, alike on all processes."""
        self.bad_steps = self.bad_steps + ~applied
        self.streak = (self.streak + 1) * ~applied

    def means(self, step, total_steps):
        """{name: float} over all processes and finite values, and bad_steps; then empty.

        UserError (code 1): --max_bad_steps in a row, or all up to total_steps, were not applied.
        """
        rows = {name: torch.stack(values) for name, values in sorted(self.values.items())}
        sums = [row.nan_to_num(0., 0., 0.).sum() for row in rows.values()]
        counts = [row.isfinite().float().sum() for row in rows.values()]
        found = torch.stack([torch.stack(sums), torch.stack(counts)])
        sums, counts = distributed.all_reduce_sum(found).tolist()
        streak, bad_steps = int(self.streak), int(self.bad_steps)
        learnt_nothing = streak >= step
        if 0 < FLAGS.max_bad_steps <= streak or learnt_nothing and step == total_steps:
            broken = [name for name, count in zip(rows, counts)
                      if count < len(rows[name]) * distributed.world_size()]
            remedy = ('run again: no step was applied, and nothing saved' if learnt_nothing else
                      'run again, or raise --max_bad_steps: it goes on from the last checkpoint')
            raise UserError(f'the last {streak} steps in a row up to {step} had values that '
                            f'are not finite ({", ".join(broken) or "a gradient"}) and were not '
                            f'applied; lower the learning rate or --grad_clip and {remedy}', code=1)
        self.values, self.bad_steps = {}, 0
        means = {name: s / n if n else math.nan for name, s, n in zip(rows, sums, counts)}
        return dict(means, bad_steps=bad_steps)


class _PlainLines:
    """Standard error for a log file: the output of tqdm without control characters."""

    def write(self, text):
        with contextlib.suppress(BrokenPipeError):
            if text.strip():
                print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        """`write` has done so."""


def progress(total=None, desc='', initial=0, unit='step'):
    """A tqdm bar on a terminal; in a log file one plain line every half minute at most."""
    how = dict(mininterval=.5, dynamic_ncols=True)
    if not sys.stderr.isatty():
        how = dict(mininterval=30, maxinterval=60, leave=False, ascii=True, file=_PlainLines(),
                   bar_format='{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}'
                              '{postfix}]')
    return tqdm(total=total, initial=initial, desc=desc, unit=unit,
                disable=not distributed.is_main(), **how)


class Log:
    """Progress bar, `metrics.jsonl` and TensorBoard of a run; the first process alone writes.

    Args:
        step: steps that are done already; later lines of an earlier start are dropped.
        flags_text: the resolved flags, shown in TensorBoard.
    """

    def __init__(self, logdir, desc, step, total_steps, images_per_step, flags_text):
        self.bar = progress(total_steps, desc, step)
        self.images_per_step = images_per_step
        self.start = self.since = (time.perf_counter(), step)
        self.file = self.board = None
        if distributed.is_main():
            from tensorboardX import SummaryWriter
            path = Path(logdir) / 'metrics.jsonl'
            text = path.read_text(errors='replace') if path.exists() else ''
            lines = re.findall(r'^({"step": (\d+)\b.*}\n)', text, re.MULTILINE)
            with replacing(path) as temporary:      # no step twice, no line that was cut
                temporary.write_text(''.join(line for line, n in lines if int(n) <= step))
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
            with self._full_disk_ends_the_log(step):
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
        """Images (B, 3, H, W) in [-1, 1] as a PNG and in TensorBoard; NaN is drawn grey."""
        if self.file:
            with self._full_disk_ends_the_log(step):
                pixels = pictures.to_uint8(images.nan_to_num(0.)).cpu()
                rows, _ = pictures.rows_by_class(pixels, None, 0)
                picture = pictures.save_labelled(path, f'step {step}', rows)
                self.board.add_image('samples', picture, step, dataformats='HWC')

    @contextlib.contextmanager
    def _full_disk_ends_the_log(self, step):
        try:
            yield
        except OSError as error:
            distributed.print0(f'note: the log in {self.file.name} ends at step {step} '
                               f'({error.strerror}); the training goes on.')
            self.close()

    def summary(self, step, folder):
        """The last line of a run: steps of this start up to `step`, time, speed, folder."""
        steps, seconds = step - self.start[1], time.perf_counter() - self.start[0]
        minutes, rest = divmod(round(seconds), 60)
        time_taken = f'{minutes} min {rest} s' if minutes else f'{seconds:.1f} s'
        rate = steps * self.images_per_step / max(seconds, 1e-9)
        return (f'finished: {steps:,} step{"s" if steps > 1 else ""} in {time_taken}, '
                f'{rate:.0f} images/s; checkpoint and log are in {folder}')

    def close(self):
        self.bar.close()
        for file in filter(None, (self.file, self.board)):
            with contextlib.suppress(OSError):
                file.close()
        self.file = self.board = None


def memory_mb():
    """Peak of the memory of the GPU, or of this process without one, in MiB."""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2 ** 20, 1)
    unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10      # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
