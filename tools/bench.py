"""Speed and memory of the training steps and of sampling; the scripts run as a user starts them.

  python tools/bench.py                               CIFAR-10: train_base, PD, train_rdd, ddim_eval
  python tools/bench.py --config DIGITS --rows base,rdd --amp bf16
  python tools/bench.py --batch_size 16 --tflops 50   on a CPU; hours on a GPU of 50 TFLOP/s
  python tools/bench.py -- --compile --grad_accum=2   further flags; paths from the root
The scripts get the flagfiles of --config, and random images and networks in a temporary folder: a
teacher of 16 steps and a classifier. CUDA_VISIBLE_DEVICES= measures the CPU.

images/s: median (smallest .. largest) of five lines of metrics.jsonl, --steps in all, after a first
    one that is left out; of the sampler, the mean over 4 batches.
MiB: the largest memory_mb: peak of the GPU, or resident memory of the process on a CPU.
GFLOP/image: torch.utils.flop_counter on one step; a multiply-add counts as two operations.
% of conv.: GFLOP/image times images/s, in percent of the same for one 3x3 convolution in the same
    precision, forward and backward: 256 channels, 32 x 32 pixels, 64 images (8 on a CPU).
hours: what the recipe takes at these images/s, or with --tflops at that rate. base: --total_steps;
    pd: from the teacher to 8 steps; rdd: from 8 steps to 1; dmd: --total_steps of a 1-step student;
    eval: --num_images with 8 steps.
"""

import json
import math
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

import numpy as np
import torch
from absl import flags
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from classifier.networks import build_classifier
from runtime import checkpoint, cli

FLAGS = flags.FLAGS
SCRIPTS = dict(base='train_base.py', pd='PD.py', rdd='train_rdd.py', dmd='train_dmd.py',
               eval='ddim_eval.py')
LINES, BATCHES = 5, 4       # what is measured of a training, of the sampler


def define_flags():
    flags.DEFINE_list('rows', ['base', 'pd', 'rdd', 'eval'], 'what to measure, of these and dmd')
    flags.DEFINE_string('config', 'CIFAR10', 'flagfiles config/CONFIG_BASE.txt and so on')
    flags.DEFINE_enum('amp', 'none', ['none', 'bf16'], 'precision of the networks')
    flags.DEFINE_integer('steps', 20, 'steps of a training that are measured', lower_bound=LINES)
    flags.DEFINE_integer('batch_size', None, 'images per step; none: as in the flagfiles', 1)
    flags.DEFINE_float('tflops', None, '1e12 operations per second, for the hours', 1e-3)
    flags.DEFINE_bool('profile', False, 'profile three more steps of every row')


def main(words):
    if not set(FLAGS.rows) <= set(SCRIPTS):
        raise cli.UserError(f'--rows {",".join(FLAGS.rows)}: choose of {", ".join(SCRIPTS)}')
    rows = [row for row in SCRIPTS if row in FLAGS.rows]        # base makes the teacher
    os.chdir(cli.ROOT)      # flagfiles name others relative to it
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    convolution = convolution_rate(device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ['XDG_CACHE_HOME'] = folder       # no image of the bench stays in a cache
        make_inputs(Path(folder), words)
        print(f'{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
              f'{FLAGS.config}, amp {FLAGS.amp}; one convolution: {convolution / 1e12:.3g} TFLOP/s'
              f'\n\n| row | batch | images/s | MiB | GFLOP/image | % of conv. | hours |\n'
              f'| :--- {"| ---: " * 6}|', flush=True)
        for row in rows:
            measure(row, Path(folder), convolution)
        for row in rows if FLAGS.profile else ():
            start(row, Path(folder), 3, inside='profile')
            print(f'\n{row}\n{Path(folder, "found.txt").read_text()}', flush=True)


def measure(row, folder, convolution):
    """Print a line of the table; `convolution`: operations per second of a convolution alone."""
    if row == 'eval':
        file, lines = start(row, folder, BATCHES) / 'results.jsonl', 1
    else:
        every = FLAGS.steps // LINES
        file, lines = start(row, folder, every * (1 + LINES), every) / 'metrics.jsonl', LINES
    found = [json.loads(line) for line in file.read_text().splitlines()[-lines:]]
    rates, memory = ([line.get(key, 0) for line in found] for key in ('images_per_s', 'memory_mb'))
    start(row, folder, 1, inside='count')
    work = int((folder / 'found.txt').read_text()) / batch_size(row)
    rate = statistics.median(rates)
    hours = recipe_images(row) / (FLAGS.tflops * 1e12 / work if FLAGS.tflops else rate) / 3600
    print(f'| {row} | {batch_size(row)} | {rate:.3g} ({min(rates):.3g} .. {max(rates):.3g}) '
          f'| {max(memory):.0f} | {work / 1e9:.3g} | {100 * work * rate / convolution:.3g} '
          f'| {hours:.3g} |', flush=True)


def convolution_rate(device):
    """Operations per second of a 3x3 convolution, forward and backward."""
    images = 64 if device.type == 'cuda' else 8
    x, weight = (torch.randn(shape, device=device).to(memory_format=torch.channels_last)
                 .requires_grad_() for shape in ((images, 256, 32, 32), (256, 256, 3, 3)))

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=FLAGS.amp == 'bf16'):
            out = torch.nn.functional.conv2d(x, weight, padding=1)
        torch.autograd.grad(out, [x, weight], torch.ones_like(out))

    timer = Timer('step()', globals=dict(step=step), num_threads=torch.get_num_threads())
    return 3 * 2 * x.numel() * 256 * 9 / timer.timeit(5).mean


def recipe(row):
    """{flag: value} of the row's flagfile; of a flag that is repeated, the last."""
    lines = FLAGS.read_flags_from_files([f'--flagfile=config/{FLAGS.config}_{row.upper()}.txt'])
    return dict(line.lstrip('-').partition('=')[::2] for line in lines)


def batch_size(row):
    return FLAGS.batch_size or int(recipe(row)['batch_size'])


def recipe_images(row):
    """Images that the recipe trains on in all its students, or samples."""
    values = recipe(row)
    if row == 'eval':
        return int(values['num_images'])
    # RDD makes students of 4, 2 and 1 steps; the last two train twice as long
    students = dict(base=1, pd=math.log2(int(recipe('base')['T']) / 8), rdd=1 + 2 + 2, dmd=1)
    return students[row] * int(values['total_steps']) * int(values['batch_size'])


def make_inputs(folder, words):
    """Random images, networks and statistics, and a flagfile that names them for all scripts."""
    classes, size = (int(recipe('base')[name]) for name in ('class_num', 'img_size'))
    for i in range(max(classes, *map(batch_size, ['base', *FLAGS.rows]))):
        file = folder / f'images/train/{i % classes:04}/{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.randint(256, size=(size, size, 3), dtype=np.uint8)).save(file)
    for name in (recipe('rdd')['classifier'], 'convnet_small'):
        network = build_classifier(name, classes)
        checkpoint.save(folder / f'{name}.pt', dict(model=network.state_dict(), name=name))
    features = network.num_features
    np.savez(folder / 'real.npz', mu=np.zeros(features), sigma=np.eye(features))
    values = dict(amp=FLAGS.amp, dataset='folder', data_root=folder / 'images', img_size=size, T=16,
                  time_scale=64, base_ckpt=folder / 'base', teacher_ckpt=folder / 'base',
                  student_steps=1, stride=2, until=0, sample_step=0, save_step=0,
                  classifier_path=folder / f'{recipe("rdd")["classifier"]}.pt',
                  feature_network=folder / 'convnet_small.pt', fid_cache=folder / 'real.npz')
    lines = [f'--{name}={value}' for name, value in values.items()]
    (folder / 'flags.txt').write_text('\n'.join(lines + words))
    if 'base' not in FLAGS.rows:
        start('base', folder, 1)


def start(row, folder, steps, log_step=1, inside=''):
    """Run a script for some steps, or batches; returns its --logdir. inside: see `run_inside`."""
    logdir = folder / ('base' if row == 'eval' else row + inside)
    words = [f'--flagfile=config/{FLAGS.config}_{row.upper()}.txt',
             f'--flagfile={folder}/flags.txt', f'--logdir={logdir}',
             f'--batch_size={batch_size(row)}']
    words += ([f'--num_images={steps * batch_size(row)}'] if row == 'eval' else
              [f'--total_steps={steps}', f'--log_step={log_step}'])
    words += ['--nocompile'] if inside == 'count' else []
    before = ['tools/bench.py', 'inside', inside, folder / 'found.txt'] if inside else []
    done = subprocess.run([sys.executable, *before, SCRIPTS[row], *words], encoding='utf-8',
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['nothing'])[-1]
        raise cli.UserError(f'{SCRIPTS[row]} {" ".join(words)} ended with: {reason}', code=1)
    return logdir


def run_inside(kind, file, *argv):
    """Run a script here, and write its number of operations (count) or the slowest (profile)."""
    sys.argv = list(argv)
    with FlopCounterMode(display=False) if kind == 'count' else torch.profiler.profile() as found:
        try:
            runpy.run_path(argv[0], run_name='__main__')
        except SystemExit as leaving:
            if leaving.code:
                raise
    key = f'self_{"cuda" if torch.cuda.is_initialized() else "cpu"}_time_total'
    Path(file).write_text(str(found.get_total_flops()) if kind == 'count' else
                          found.key_averages().table(key, 12, max_name_column_width=40))


if __name__ == '__main__':
    if sys.argv[1:2] == ['inside']:
        run_inside(*sys.argv[2:])
    else:
        define_flags()
        cli.run(main, words=True)
