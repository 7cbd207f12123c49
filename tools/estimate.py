"""Hours that the chains in config/ take: counted operations over a sustained rate."""

import statistics
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from classifier import build_classifier
from model import UNet
from runtime.cli import anchored
from tools.bench_rows import N
from tools.measure import table

# runs of each stage: 1024 steps; to 8; to 4, and twice as long to 2 and to 1
HALVINGS = dict(BASE=1, PD=7, RDD=5)


def estimate(tflops, measure):
    """Print and return the estimate of both data sets.

    Args:
        tflops: sustained 1e12 operations per second, or None for what a CIFAR-10 step reaches
            here. measure: `measure(row)` -> a result of the bench.
    """
    rates, rows = [], []
    for stage in HALVINGS:
        rate = tflops
        if not rate:
            found = measure(stage.lower())
            seconds = statistics.median(found['sides']['fast']['seconds'])
            rate = found['images'] / seconds * operations('CIFAR10', stage) / 1e12
        rates.append(rate)
    for data_set in ('CIFAR10', 'IMAGENET64'):
        work = []
        for stage, times in HALVINGS.items():
            words = flagfile(data_set, stage)
            images = int(words['total_steps']) * int(words['batch_size']) * times
            work.append(images * operations(data_set, stage) / 1e18)
        hours = [1e6 * w / rate / 3600 for w, rate in zip(work, rates)]
        rows += [[f'{data_set}, {unit}', *(f'{v:.3g}' for v in values + [sum(values)])]
                 for unit, values in (('1e18 operations', work), ('hours', hours))]
    print(f'\nESTIMATE, not measured: hours on one device that sustains '
          f'{", ".join(f"{rate:.3g}" for rate in rates)} TFLOP/s (base, PD, RDD; '
          f'{"supposed" if tflops else "measured here at CIFAR-10 width"}):\n\n'
          + table(['', 'base', 'PD 1024 to 8', 'RDD 8 to 1', 'all'], rows), flush=True)
    return [dict(row='estimate', tflops=rates, rows=rows)]


def flagfile(data_set, stage):
    """{flag: value} of a file in config/."""
    lines = Path(anchored(f'config/{data_set}_{stage}.txt')).read_text().splitlines()
    pairs = [line.lstrip('-').partition('=')[::2] for line in lines]
    return dict(pairs, **{name: [int(value) for key, value in pairs if key == name]
                          for name in ('ch_mult', 'attn')})


def operations(data_set, stage):
    """Floating-point operations per image of a training step; counted without data."""
    words = flagfile(data_set, stage)
    with torch.device('meta'):
        x, t = torch.empty(1, 3, *[int(words['img_size'])] * 2), torch.zeros(1, dtype=torch.int64)
        network = UNet(N, int(words['ch']), words['ch_mult'], words['attn'],
                       int(words['num_res_blocks']))
    classifier = 0
    if stage == 'RDD':
        network_C = build_classifier(words.get('classifier', 'densenet201'), 10)
        classifier = counted(network_C.eval().to('meta'), x)
    return of_step(stage.lower(), counted(network, x, t), classifier)


def of_step(row, unet, classifier):
    """Operations per image of a step, from those of a forward pass of the networks."""
    # a backward pass costs two forward passes, and PD and RDD have two of the teacher as well
    found = (3 if row == 'base' else 5) * unet
    # images of teacher and student; weights that are frozen: one backward
    return found + (3 * classifier if row == 'rdd' else 0)


@torch.no_grad()
def counted(network, *inputs):
    """Operations of a forward pass."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops()
