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


class Clock:
    """Seconds by part while `on`; otherwise nothing is measured and nothing waits."""

    def __init__(self, device):
        self.device, self.on, self.parts = device, False, {}

    @contextlib.contextmanager
    def __call__(self, part):
        since = now(self.device) if self.on else 0
        yield
        if self.on:
            self.parts[part] = self.parts.get(part, 0) + now(self.device) - since


def now(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(side, function, calls=1):
    """Of one call, averaged over `calls`."""
    with side.context():
        since = now(side.device)
        for _ in range(calls):
            function()
        return (now(side.device) - since) / calls


def peak_mib(side, function):
    """Memory a call needs beyond what is held between calls, in MiB of tensors."""
    with side.context():
        if side.device.type == 'cuda':
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                    profile_memory=True) as profile:
            function()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f'{folder}/trace.json')
        events = json.loads(Path(f'{folder}/trace.json').read_text())['traceEvents']
    sizes = [event['args']['Bytes'] for event in sorted(
        (event for event in events if event.get('name') == '[memory]'), key=lambda e: e['ts'])]
    return max(itertools.accumulate(sizes, initial=0)) / 2 ** 20


def operators(side, function, count=6):
    """[(name, share of the time of a call)] of the slowest operators."""
    with side.context(), torch.profiler.profile() as profile:
        function()
    events = profile.key_averages()
    where = 'self_cpu_time_total'
    if side.device.type == 'cuda':      # kernels alone: their operators carry the same time again
        events = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
        where = ('self_device_time_total' if hasattr(events[0], 'self_device_time_total')
                 else 'self_cuda_time_total')       # torch before 2.6
    times = sorted(((getattr(event, where), event.key) for event in events), reverse=True)
    total = sum(time for time, _ in times)
    return [(key.replace('aten::', ''), time / total) for time, key in times[:count]]


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
