"""Measure the fast forms against plain ones: the same mathematics in float32, eager, unfused.

  python tools/bench.py --json bench.json       training steps, sampling, scoring, losses
  python tools/bench.py --rows memory           memory of the relational losses at 256 images
  python tools/bench.py --rows growth           step time over batch, width, size and processes
  python tools/bench.py --rows estimate         hours the full chains would take here; --tflops
                                                50: on a device that sustains 50 TFLOP/s
  git worktree add ../before COMMIT
  python tools/bench.py --against ../before     training steps here and in another checkout
The rows base, pd and rdd are steps of train_base.py, PD.py and train_rdd.py as they are. Weights
and images are random, the width is that of CIFAR-10. Fast and plain (tools/plain.py) take turns in
one process, two checkouts in a process per turn; ratios are those of one turn, as median
(smallest .. largest).
"""

import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

import numpy as np      # noqa: E402
import torch    # noqa: E402
from absl import flags      # noqa: E402

from classifier import build_classifier     # noqa: E402
from runtime import checkpoint, cli, distributed    # noqa: E402
from runtime.cli import UserError       # noqa: E402
from runtime.flags import check_network, define_device_flags, define_network_flags  # noqa: E402
from tools import bench_rows, convolutions      # noqa: E402
from tools.bench_rows import CHANNELS, N    # noqa: E402
from tools.measure import Peak, compare, device_name, free_bytes, spread, table     # noqa: E402
from tools.plain import plain       # noqa: E402

FLAGS = flags.FLAGS
STEPS = ('base', 'pd', 'rdd')
SPEED = dict({name: [name] for name in STEPS}, sample=['sample 1', 'sample 4', 'sample 8'],
             score=['features', 'frechet'], losses=['IS_P2P', 'M_P2P'])
EXTRA = ('memory', 'growth', 'estimate')
PARTS = ('data wait', 'teacher', 'student', 'classifier', 'losses', 'backward', 'optimiser')
HANDED_ON = ('ch', 'ch_mult', 'attn', 'num_res_blocks', 'dropout', 'conditional', 'class_num',
             'img_size', 'amp', 'compile', 'batch_size', 'repeats', 'profile')


def define_flags():
    define_network_flags()
    define_device_flags()
    flags.DEFINE_list('rows', list(SPEED), f'what to measure: {", ".join((*SPEED, *EXTRA))}')
    flags.DEFINE_enum('device', 'auto', ['auto', 'cpu', 'cuda'], 'auto: a GPU if there is one')
    flags.DEFINE_integer('batch_size', None, 'images per step; none: 128 on a GPU, 16 on a CPU',
                         lower_bound=4)
    flags.DEFINE_integer('repeats', 5, 'turns of fast and plain', lower_bound=1)
    flags.DEFINE_integer('processes', 1, 'processes that share a training step', lower_bound=1)
    flags.DEFINE_string('classifier', 'densenet201', 'classifier of the RDD row')
    flags.DEFINE_bool('plain', True, 'measure the plain side as well')
    flags.DEFINE_string('against', None, 'another checkout of this repository, whose training '
                        'steps are measured in place of the plain side')
    flags.DEFINE_bool('profile', False, 'print the slowest operators of every row as well')
    flags.DEFINE_integer('group', 256, 'images of --rows memory, 8x8 maps', lower_bound=1)
    flags.DEFINE_float('tflops', None, 'sustained 1e12 operations per second that --rows estimate '
                       'supposes; none: what base, PD and RDD steps reach here')
    flags.DEFINE_string('json', None, 'file for all numbers')


def main():
    check_rows()
    if FLAGS.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    if FLAGS.device == 'cuda' and device.type != 'cuda':
        raise UserError('--device cuda: torch finds no GPU; leave it out to measure the CPU')
    FLAGS.batch_size = FLAGS.batch_size or (128 if device.type == 'cuda' else 16)
    check_network()
    if FLAGS.batch_size % FLAGS.processes:
        raise UserError(f'--batch_size {FLAGS.batch_size} cannot be shared out equally over '
                        f'--processes {FLAGS.processes}')
    print(environment(device), flush=True)
    results = []
    for row in itertools.chain(*(SPEED.get(name, []) for name in FLAGS.rows)):
        results.append(measure(row, device))
        print(f'{row}: done', file=sys.stderr, flush=True)
    if results:
        report(results)
        report_shares(results, device)
    if 'memory' in FLAGS.rows:
        results += memory(device)
    if 'growth' in FLAGS.rows:
        results += growth(device)
    if 'estimate' in FLAGS.rows:
        from tools.estimate import estimate
        results += estimate(FLAGS.tflops, lambda row: measure(row, device, plain_too=False))
    if FLAGS.json:
        text = json.dumps(dict(environment=environment(device), rows=results), indent=1)
        Path(FLAGS.json).write_text(text)


def check_rows():
    unknown = sorted(set(FLAGS.rows) - {*SPEED, *EXTRA})
    if unknown:
        raise UserError(f'--rows {",".join(unknown)} is unknown; choose of {", ".join(SPEED)}, '
                        f'{", ".join(EXTRA)}')
    if 'estimate' in FLAGS.rows and (FLAGS.ch, FLAGS.img_size) != (128, 32):
        raise UserError('--rows estimate measures the network of CIFAR-10; leave --ch and '
                        '--img_size out')
    if 'WORLD_SIZE' in os.environ:
        raise UserError('the bench starts processes itself, and was started by a launcher; use '
                        'plain python, and --processes for training steps on several')
    if FLAGS.against:
        if not Path(FLAGS.against, 'tools/bench_steps.py').is_file():
            raise UserError(f'--against {FLAGS.against} has no tools/bench_steps.py; expected the '
                            f'folder of another checkout of this repository')
        if not FLAGS['rows'].present:
            FLAGS.rows = list(STEPS)
        if not set(STEPS).issuperset(FLAGS.rows):
            raise UserError(f'--rows {",".join(FLAGS.rows)} with --against: only '
                            f'{", ".join(STEPS)} are compared with another checkout')
    if FLAGS.processes > 1 and not set(STEPS).issuperset(FLAGS.rows):
        raise UserError(f'--rows {",".join(FLAGS.rows)} with --processes {FLAGS.processes}: only '
                        f'{", ".join(STEPS)} share their work; leave --processes out')


def environment(device):
    return (f'{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
            f'batch {FLAGS.batch_size}, ch {FLAGS.ch}, {FLAGS.img_size} px, amp {FLAGS.amp}, '
            f'compile {FLAGS.compile}, {FLAGS.repeats} turns, {FLAGS.processes} processes'
            + (f', against {Path(FLAGS.against).resolve()}' if FLAGS.against else ''))


# Speed

def measure(row, device, plain_too=None):
    """dict(row, images, sides={name: dict(seconds=[one per turn], parts, peak_mib)})."""
    plain_too = FLAGS.plain if plain_too is None else plain_too
    if FLAGS.against:
        found = two_checkouts(row)
    elif row in STEPS:
        found = training_steps(row, FLAGS.processes, plain=plain_too)
    else:
        found = compare(functools.partial(bench_rows.work_on, row), sides(plain_too), device,
                        FLAGS.repeats, FLAGS.profile)
    return dict(row=row, images=bench_rows.images_of(row), sides=found)


def sides(plain_too):
    """{name: function that makes the context of this side} for `bench_rows`."""
    found = dict(fast=contextlib.nullcontext)
    if plain_too:
        found['plain'] = functools.partial(plain, bench_rows)
    return found


def two_checkouts(row):
    """What `training_steps` finds, with this checkout and --against taking turns."""
    found = {}
    for _ in range(FLAGS.repeats):
        for side, root in (('here', cli.ROOT), ('against', FLAGS.against)):
            turn = training_steps(row, FLAGS.processes, root, plain=False, repeats=1)['fast']
            before = found.get(side, dict(seconds=[]))['seconds']
            found[side] = dict(turn, seconds=before + turn['seconds'])
    return found


def training_steps(row, processes, root=cli.ROOT, **changes):
    """Measure a row in processes of its own: see `bench_steps.py`. changes: flags for it."""
    script = str(Path(root, 'tools/bench_steps.py'))
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    threads = max(1, torch.get_num_threads() // processes)
    with tempfile.TemporaryDirectory() as folder:
        values = dict({name: FLAGS[name].value for name in HANDED_ON}, num_workers=0,
                      sample_size=1, logdir=f'{folder}/run', json=f'{folder}/found.json',
                      **stand_ins(row, Path(folder)))
        values.update(changes)
        words = [f'--{name}={value}' for name, given in values.items()
                 for value in (given if isinstance(given, list) else [given])]
        done = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), script, row, *words],
            env=dict(os.environ, OMP_NUM_THREADS=str(threads)), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, universal_newlines=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ['nothing'])[-1]
            raise UserError(f'the measurement of {row} by {script} with {values} ended with: '
                            f'{said}', code=1)
        return json.loads(Path(folder, 'found.json').read_text())


def stand_ins(row, folder):
    """Flags for a teacher with 8 steps and a classifier, which are made of random numbers."""
    if row == 'base':
        return dict(T=N)
    checkpoint.save(folder / 'teacher.pt', dict(
        net_model=bench_rows.random_unet().state_dict(), T=8, time_scale=N // 8,
        img_size=FLAGS.img_size))
    if row == 'pd':
        return dict(base_ckpt=folder / 'teacher.pt')
    network = build_classifier(FLAGS.classifier, FLAGS.class_num)
    checkpoint.save(folder / 'classifier.pt', dict(model=network.state_dict(),
                                                   name=FLAGS.classifier))
    return dict(base_ckpt=folder / 'teacher.pt', classifier=FLAGS.classifier,
                classifier_path=folder / 'classifier.pt')


def report(results):
    """Tables of speed, of the parts of a training step and of operators."""
    speed, parts, slowest = [], [], []
    this, other_side = ('here', 'against') if FLAGS.against else ('fast', 'plain')
    for result in results:
        row, found = result['row'], result['sides']
        fast, other = (found.get(name, dict(seconds=[], parts={})) for name in (this, other_side))
        ratios = [p / f for p, f in zip(other['seconds'], fast['seconds'])]
        rates = [[result['images'] / s for s in side['seconds']] for side in (fast, other)]
        speed.append([row, *map(spread, rates), spread(ratios),
                      *(f'{side["peak_mib"]:.0f}' if 'peak_mib' in side and row != 'frechet'
                        else '-' for side in (fast, other))])     # numpy's is not seen
        parts += [[f'{row}, {name}', *(f'{1000 * side["parts"].get(part, 0):.1f}'
                                       for part in PARTS)]
                  for name, side in found.items() if side['parts']]
        slowest += [[f'{row}, {name}', ', '.join(f'{key} {100 * share:.0f} %'
                                                 for key, share in side['operators'])]
                    for name, side in found.items() if 'operators' in side]
    head = ['row', f'images/s {this}', f'images/s {other_side}', f'{other_side} / {this}',
            f'MiB {this}', f'MiB {other_side}']
    print('\n' + table(head, speed), flush=True)
    if parts:
        print('\n' + table(['ms', *PARTS], parts), flush=True)
    if slowest:
        print('\n' + table(['row', 'slowest operators'], slowest), flush=True)


def report_shares(results, device):
    """How near training steps come to the rate of the convolutions that they are made of."""
    results, rows = [result for result in results if result['row'] in STEPS], []
    reached = convolutions.rate(FLAGS, device) if results else 0
    for result in results:
        work, (ours, *_) = convolutions.operations(result['row'], FLAGS), result['sides'].values()
        rates = [work / s for s in ours['seconds']]
        result['convolution_share'] = [value / reached for value in rates]
        rows.append([result['row'], spread([r / 1e12 for r in rates]),
                     spread([100 * share for share in result['convolution_share']])])
    if rows:
        print(f'\n3x3 convolutions alone, forward and backward: {reached / 1e12:.3g} TFLOP/s\n\n'
              + table(['row', 'TFLOP/s', '% of convolutions alone'], rows), flush=True)


# Memory

def memory(device):
    """Peak of the relational losses beyond maps and gradient, and what travels per step."""
    map_mib = FLAGS.group * 64 * CHANNELS * 4 / 2 ** 20
    rows = [memory_row(name, width, map_mib, device)
            for name, width in (('IS_P2P', FLAGS.group * 64), ('M_P2P', 4096))]
    head = ['MiB', 'fast', 'plain', 'value differs by', 'gradient differs by']
    sent, queue = 128 * CHANNELS * 4 / 1e6, 20000 * CHANNELS * 4 / 1e6
    print(f'\nBeyond two maps of {FLAGS.group} x {CHANNELS} x 8 x 8 and the gradient of one '
          f'({map_mib:.0f} MiB each):\n\n{table(head, rows)}\n\n'
          f'Of the maps, 128 pixels travel between processes, {sent:.2f} MB per step (computed); '
          f'of the queue of {queue:.1f} MB, nothing.', flush=True)
    return [dict(row='memory', mib=rows, sent_mb=sent, queue_mb=queue)]


def memory_row(name, width, map_mib, device):
    """A line of the table: peaks of a loss with `width` keys, and how far the sides differ."""
    found, results = dict(fast='-', plain='-'), []
    for side, context in sides(FLAGS.plain).items():
        needed = 8 * (FLAGS.group * 64 * width * 4 + map_mib * 2 ** 20)
        if side == 'plain' and 0 < free_bytes(device) < needed:
            print(f'{name}, plain: left out, it needs about {needed / 2 ** 30:.0f} GiB and '
                  f'{free_bytes(device) / 2 ** 30:.0f} are free.')
            continue
        with context():
            function = bench_rows.relational_loss(name, device, FLAGS.group, 8)
            with Peak(device) as peak:
                results.append(function())
        found[side] = f'{peak.mib - map_mib:.0f}'
    differences = ['-', '-']
    if len(results) > 1:
        differences = [f'{(one - other).abs().max() / other.abs().max():.1e}'
                       for one, other in zip(*results)]
    return [name, *found.values(), *differences]


# Growth

def growth(device):
    """Time of a base step along four axes, with slopes."""
    small, size = max(4, FLAGS.batch_size // 4), FLAGS.img_size
    most = torch.cuda.device_count() if device.type == 'cuda' else os.cpu_count()
    axes = dict(batch_size=[small, 2 * small, 4 * small], ch=[32, 64, 128],
                img_size=[size // 2, size, 2 * size],
                processes=[n for n in (1, 2, 4) if n <= most and 4 * small % n == 0])
    rows, results = [], []
    for axis, points in axes.items():
        times = []
        for value in points:
            changes = dict(processes=1, batch_size=4 * small if axis == 'processes' else small)
            changes[axis] = value
            found = training_steps('base', plain=False, profile=False, **changes)
            times.append(statistics.median(found['fast']['seconds']))
        slope = np.polyfit(np.log(points), np.log(times), 1)[0] if len(points) > 1 else 0.
        results.append(dict(row=axis, points=points, seconds=times, slope=slope))
        cells = [f'{value}: {time:.3g} s' for value, time in zip(points, times)]
        rows.append([axis, *(cells + ['', ''])[:3], f'{slope:.2f}'])
    print('\nTime of a base step; slope of log time over log size:\n\n'
          + table(['over', '', '', '', 'slope'], rows), flush=True)
    return results


if __name__ == '__main__':
    define_flags()
    cli.run(main)
