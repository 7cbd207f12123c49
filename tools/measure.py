"""Time, memory and tables of measurements."""

import contextlib
import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from runtime import distributed


def compare(work, sides, device, turns, profile=False):
    """{side: dict(seconds=[one per turn], parts, peak_mib, operators)}; the sides take turns.

    Args:
        work: `work(turn)` prepares, then works once per step of the `Turn`.
        sides: {name: function that makes the context in which this side works}.
    """
    found = {name: dict(seconds=[]) for name in sides}
    for number in range(turns):
        last = number == turns - 1
        for name, side in sides.items():
            turn = Turn(device, last, last and profile)
            with side():
                work(turn)
            found[name]['seconds'].append(turn.seconds)
            if last:
                found[name].update(parts=turn.clock.parts, peak_mib=turn.peak_mib)
            if last and profile:
                found[name]['operators'] = turn.operators
    return found


class Turn:
    """Measures work that is done once per step: `for _ in turn: work()`.

    The first steps warm up, then so many are timed that they take 0.3 s together.
    Args:
        details: further steps measure `parts`, `peak_mib` and, with `profile`, `operators`.
    Attributes, when the loop is over:
        seconds: of a step. clock: see `Clock`. peak_mib: memory that a step needs beyond what is
        held between steps. operators: [(name, share of the time)] of the slowest ones.
    """

    def __init__(self, device, details=False, profile=False):
        self.device, self.details, self.profile = device, details, profile
        self.clock = Clock(device)

    def __iter__(self):
        found = yield from self._timed(1)           # compiles, fills caches
        if found < 2:
            found = yield from self._timed(1)
        self.seconds = yield from self._timed(max(1, round(.3 / found)))
        if self.details:
            self.clock.on = True
            yield
            self.clock.on = False
            with Peak(self.device) as peak:
                yield
            self.peak_mib = peak.mib
        if self.profile:
            with torch.profiler.profile() as profile:
                yield
            self.operators = slowest_operators(profile, self.device)

    def _timed(self, steps):
        """Seconds per step, alike on all processes, so that they do equally many steps."""
        since = now(self.device)
        for _ in range(steps):
            yield
        taken = now(self.device) - since
        return distributed.largest(round(1e9 * taken))[0] / 1e9 / steps


class Clock:
    """Seconds by part while `on`: `with clock('backward'): ...`. Otherwise nothing is measured.

    Time in a part within another part counts for the inner one alone.
    """

    def __init__(self, device):
        self.device, self.on, self.parts = device, False, {}
        self.part, self.since = None, 0.

    @contextlib.contextmanager
    def __call__(self, part):
        if not self.on:
            yield
            return
        outer = self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, part):
        """From now on time counts for `part`; returns the part before."""
        time_now, before = now(self.device), self.part
        if before:
            self.parts[before] = self.parts.get(before, 0.) + time_now - self.since
        self.part, self.since = part, time_now
        return before


class Peak:
    """Memory that is needed inside beyond what is held before, as `mib` of tensors afterwards."""

    def __init__(self, device):
        self.cuda = device.type == 'cuda'

    def __enter__(self):
        if self.cuda:
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()
        return self

    def __exit__(self, *error):
        if self.cuda:
            self.mib = (torch.cuda.max_memory_allocated() - self.before) / 2 ** 20
            return
        self.profile.__exit__(*error)
        with tempfile.TemporaryDirectory() as folder:
            self.profile.export_chrome_trace(f'{folder}/trace.json')
            events = json.loads(Path(f'{folder}/trace.json').read_text())['traceEvents']
        events = [event for event in events if event.get('name') == '[memory]']
        sizes = [event['args']['Bytes'] for event in sorted(events, key=lambda e: e['ts'])]
        self.mib = max(itertools.accumulate(sizes, initial=0)) / 2 ** 20


def now(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def slowest_operators(profile, device, count=6):
    """[(name, share of the whole time)] of a finished torch.profiler.profile."""
    events, where = profile.key_averages(), 'self_cpu_time_total'
    if device.type == 'cuda':       # kernels alone: their operators carry the same time again
        events = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
        where = ('self_device_time_total' if hasattr(events[0], 'self_device_time_total')
                 else 'self_cuda_time_total')       # torch before 2.6
    times = sorted(((getattr(event, where), event.key) for event in events), reverse=True)
    total = sum(taken for taken, _ in times)
    return [(key.replace('aten::', ''), taken / total) for taken, key in times[:count]]


def free_bytes(device):
    """Memory that can be had now; 0: unknown."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info()[0]
    try:
        return int(_line('/proc/meminfo', 'MemAvailable').split()[0]) * 1024
    except OSError:
        return 0


def device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name()
    try:
        return _line('/proc/cpuinfo', 'model name')
    except OSError:
        return platform.processor() or platform.machine()


def _line(file, name):
    for line in Path(file).read_text().splitlines():
        if line.startswith(name):
            return line.split(':', 1)[1].strip()
    raise OSError(f'no {name} in {file}')


def spread(values):
    """median (smallest .. largest)"""
    if not values:
        return '-'
    return f'{statistics.median(values):.3g} ({min(values):.3g} .. {max(values):.3g})'


def table(head, rows):
    """Markdown."""
    lines = [head, [':---'] + ['---:'] * (len(head) - 1), *rows]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)
