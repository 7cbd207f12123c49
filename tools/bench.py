"""Measure the fast paths against plain ones: the same mathematics in float32, eager, unfused.

  python bench.py --json bench.json       training steps, sampling, scoring, relational losses
  python bench.py --rows memory           memory of the relational losses at 256 images
  python bench.py --rows growth           step time over batch, width, image size and processes
  python bench.py --rows estimate         hours the full chains would take here; --tflops 50: on
                                          a device that sustains 50 TFLOP/s
Weights and images are random, the width is that of CIFAR-10. Fast and plain (`runtime/plain.py`)
take turns in one process; ratios are those of one turn, as median (smallest .. largest).
"""

import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from absl import flags

from classifier import build_classifier
from diffusion import Diffusion, distillation_loss
from losses import feature_kl
from model import UNet
from runtime import data, distributed, options, seeding
from runtime.measure import (Clock, device_name, free_bytes, operators, peak_mib, seconds, spread,
                             table)
from runtime.cli import UserError
from runtime.plain import Fast, Plain
from runtime.training import draw, frozen

FLAGS = flags.FLAGS
N, CHANNELS = 1024, 1920            # base grid; channels of DenseNet-201's maps
SPEED = dict(base=['base'], pd=['pd'], rdd=['rdd'], sample=['sample 1', 'sample 4', 'sample 8'],
             score=['features', 'frechet'], losses=['IS_P2P', 'M_P2P'])
EXTRA = ('memory', 'growth', 'estimate')
PARTS = ('data wait', 'teacher', 'student', 'classifier', 'losses', 'backward', 'optimiser')


def define_flags():
    options.define_network_flags()
    options.define_device_flags()
    flags.DEFINE_list('rows', list(SPEED), f'what to measure: {", ".join((*SPEED, *EXTRA))}')
    flags.DEFINE_enum('device', 'auto', ['auto', 'cpu', 'cuda'], 'auto: a GPU if there is one')
    flags.DEFINE_integer('batch_size', None, 'images per step; none: 128 on a GPU, 16 on a CPU',
                         lower_bound=4)
    flags.DEFINE_integer('repeats', 5, 'turns of fast and plain', lower_bound=1)
    flags.DEFINE_string('classifier', 'densenet201', 'classifier of the RDD row')
    flags.DEFINE_bool('plain', True, 'measure the plain side as well')
    flags.DEFINE_bool('profile', False, 'print the slowest operators of every row as well')
    flags.DEFINE_integer('group', 256, 'images of --rows memory, 8x8 maps', lower_bound=1)
    flags.DEFINE_float('tflops', None, 'sustained 1e12 operations per second that --rows estimate '
                       'supposes; none: what base, PD and RDD steps reach here')
    flags.DEFINE_string('json', None, 'file for all numbers')


def main():
    unknown = sorted(set(FLAGS.rows) - {*SPEED, *EXTRA})
    if unknown:
        raise UserError(f'--rows {",".join(unknown)} is unknown; choose of {", ".join(SPEED)}, '
                        f'{", ".join(EXTRA)}')
    if 'estimate' in FLAGS.rows and (FLAGS.ch, FLAGS.img_size) != (128, 32):
        raise UserError('--rows estimate measures the network of CIFAR-10; leave --ch and '
                        '--img_size out')
    if FLAGS.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    device = distributed.init(FLAGS.gpu_id)
    if distributed.world_size() > 1 and not {'base', 'pd', 'rdd'}.issuperset(FLAGS.rows):
        raise UserError(f'--rows {",".join(FLAGS.rows)} on {distributed.world_size()} processes: '
                        f'only base, pd and rdd share their work; start it in one process')
    if FLAGS.device == 'cuda' and device.type != 'cuda':
        raise UserError('--device cuda: torch finds no GPU; leave it out to measure the CPU')
    FLAGS.batch_size = FLAGS.batch_size or (128 if device.type == 'cuda' else 16)
    options.check_network()
    distributed.check_batch(FLAGS.batch_size)
    distributed.print0(environment(device))
    results = []
    for row in itertools.chain(*(SPEED.get(name, []) for name in FLAGS.rows)):
        results.append(measure(row, device))
        if distributed.is_main():
            print(f'{row}: done', file=sys.stderr, flush=True)
    if results:
        report(results)
    results += memory(device) if 'memory' in FLAGS.rows else []
    results += growth(device) if 'growth' in FLAGS.rows else []
    results += estimate(device) if 'estimate' in FLAGS.rows else []
    if FLAGS.json and distributed.is_main():
        text = json.dumps(dict(environment=environment(device), rows=results), indent=1)
        Path(FLAGS.json).write_text(text)
    distributed.cleanup()


def environment(device):
    return (f'{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
            f'batch {FLAGS.batch_size}, ch {FLAGS.ch}, {FLAGS.img_size} px, amp {FLAGS.amp}, '
            f'compile {FLAGS.compile}, {FLAGS.repeats} turns, {distributed.world_size()} processes')


def sides(device):
    return [Fast(device, FLAGS.amp, FLAGS.compile)] + [Plain(device)] * FLAGS.plain


# Work: each function prepares a side and returns one that does a unit of work

def unet():
    torch.manual_seed(0)
    return UNet(N, FLAGS.ch, FLAGS.ch_mult, FLAGS.attn, FLAGS.num_res_blocks, FLAGS.dropout)


def random_images():
    count, size = 4 * FLAGS.batch_size, FLAGS.img_size
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    return data.Images('random', 'train', size, [0] * count, 10, images)


class Training:
    """A step of train_base.py, PD.py or train_rdd.py, from 8 to 4 steps, without meters and logs.

    Dropout is that of --dropout, 0 by default.
    """

    def __init__(self, side, clock, stage):
        self.side, self.clock, device = side, clock, side.device
        self.T = N if stage == 'base' else 4
        self.teacher_diffusion = Diffusion(8, N // 8, device=device)
        self.diffusion = Diffusion(self.T, N // self.T, device=device)
        student, self.teacher, self.ema, self.relations = unet().train(), None, None, None
        if stage == 'base':
            self.ema = frozen(side.network(copy.deepcopy(student)))
        else:
            self.teacher = frozen(side.network(copy.deepcopy(student)))
        if stage == 'rdd':
            self.relations = Relations(side, clock)
        self.student = side.network(student)
        self.student_ddp = distributed.wrap_ddp(self.student)
        self.params = [p for p in self.student.parameters() if p.requires_grad]
        self.optim = side.adam(self.params, 5e-5, 0.)
        self.batches = data.batches(random_images(), FLAGS.batch_size, 0, device)

    def __call__(self):
        side, clock = self.side, self.clock
        with clock('data wait'):
            x_0, _ = next(self.batches)
        rng = seeding.generator(side.device, 0, seeding.NOISE)
        t, eps = (v[distributed.rows(FLAGS.batch_size)] for v in draw(
            FLAGS.batch_size, x_0.shape[1:], 1, self.T, rng))
        t, target = t * (N // self.T), (x_0, eps)
        z_t = self.diffusion.add_noise(x_0, eps, t)
        if self.teacher:
            with clock('teacher'), torch.no_grad(), side.autocast():
                x_target = self.teacher_diffusion.two_step_target(self.teacher, z_t, t)
                target = x_target, self.diffusion.eps_of(z_t, x_target, t)
        with clock('student'), side.autocast():
            pred = self.diffusion.predict(self.student_ddp, z_t, t)
        loss = self.loss(pred, target, rng)
        with clock('backward'):
            loss.backward()
        with clock('optimiser'):
            self.update()

    def loss(self, pred, target, rng):
        if self.relations:
            return self.relations.loss(pred[0], target[0], rng)
        with self.clock('losses'):
            return distillation_loss(*pred, *target).mean()

    def update(self):
        self.side.update(self.optim, self.params, 1.)
        if self.relations:
            self.side.update(self.relations.optim, self.relations.params, 0)
        if self.ema:
            self.side.ema(self.ema, self.student, .9999)


class Relations:
    """Classifier, queue and losses of RDD."""

    def __init__(self, side, clock):
        self.side, self.clock = side, clock
        torch.manual_seed(0)
        self.classifier = frozen(side.network(build_classifier(FLAGS.classifier, 10)))
        self.memory = side.Memory(self.classifier.num_features).to(side.device)
        self.params = list(self.memory.parameters())
        self.optim = side.adam(self.params, 5e-5, 0.)

    def loss(self, x_pred, x_target, rng):
        with self.clock('classifier'), self.side.autocast():
            with torch.no_grad():
                _, feature_T, map_T = self.classifier(x_target)
            _, feature_S, map_S = self.classifier(x_pred)
        with self.clock('losses'):
            self.refill(map_T, rng)
            return (feature_kl(feature_S, feature_T, .9)
                    + self.side.intra(map_S, map_T, group=self.group(len(map_S)))
                    + .1 * self.memory(map_S, map_T))

    def group(self, share):
        """As in train_rdd.py: a quarter of the total batch where that divides the share."""
        quarter = FLAGS.batch_size // 4
        return share if share % quarter else quarter

    def refill(self, map_T, rng):
        B, _, H, W = map_T.shape
        numbers = self.memory.choose_pixels(B * H * W, rng)
        self.memory.enqueue(self.memory.pixels_at(map_T, numbers, 0, B))
        self.memory.choose_contrast(rng)


def sampling(side, steps):
    diffusion, network = Diffusion(8, N // 8, device=side.device), frozen(side.network(unet()))
    x_T = torch.randn(FLAGS.batch_size, 3, FLAGS.img_size, FLAGS.img_size, device=side.device)

    @torch.no_grad()
    def sample():
        with side.autocast():
            diffusion.sample(network, x_T, 8 // steps)
    return sample


def feature_extraction(side):
    """Inception as score/ runs it, in float32 on both sides; random weights."""
    import runtime.torchvision_cpu  # noqa: F401
    from torchvision.models import inception_v3
    network = inception_v3(weights=None, aux_logits=False, num_classes=1008, init_weights=False)
    network = frozen(network.to(side.device))
    images = random_images().images[:FLAGS.batch_size].to(side.device)

    @torch.no_grad()
    def extract():
        x = F.interpolate(images / 255, (299, 299), mode='bilinear', align_corners=False)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            network(2 * x - 1)
    return extract


def frechet(side, count=4096, dim=2048):
    """Statistics of `count` images and their distance to a reference."""
    features = torch.rand(count, dim, device=side.device)
    probs = torch.full((count, 1008), 1 / 1008, device=side.device)
    return lambda: side.frechet(features, probs, (np.zeros(dim), np.eye(dim)))


def relational_loss(side, name, B, size=4):
    """A relational loss and its gradient, all images in one group; maps as the classifier's are."""
    torch.manual_seed(0)
    map_T, map_S = (torch.randn(B, CHANNELS, size, size, device=side.device).relu_().to(
        memory_format=torch.channels_last) for _ in range(2))
    loss = side.intra if name == 'IS_P2P' else side.Memory(CHANNELS).to(side.device)
    map_S.requires_grad_()

    def value_and_gradient():
        value = loss(map_S, map_T)
        return (value.detach(), *torch.autograd.grad(value, [map_S]))
    return value_and_gradient


def work(row, side, clock):
    """(function, images it works on) of a row of the table."""
    name, _, steps = row.partition(' ')
    if row == 'frechet':
        return frechet(side, 4096), 4096
    if name == 'sample':
        return sampling(side, int(steps)), FLAGS.batch_size
    if row == 'features':
        return feature_extraction(side), FLAGS.batch_size
    if row.endswith('_P2P'):
        return relational_loss(side, row, FLAGS.batch_size), FLAGS.batch_size
    return Training(side, clock, row), FLAGS.batch_size


def measure(row, device):
    """dict(row, images, sides={name: dict(seconds=[one per turn], parts, peak_mib)})."""
    runs, found = [], {}
    for side in sides(device):
        clock = Clock(device)
        function, images = work(row, side, clock)
        first = seconds(side, function)                 # compiles, fills caches
        again = seconds(side, function) if FLAGS.compile or first < 2 else first
        found[side.name] = dict(seconds=[], calls=max(1, round(.3 / again)))
        runs.append((side, function, clock))
    for _ in range(FLAGS.repeats):
        for side, function, _ in runs:
            numbers = found[side.name]
            numbers['seconds'].append(seconds(side, function, numbers['calls']))
    for side, function, clock in runs:
        clock.on = True
        seconds(side, function)
        clock.on = False
        found[side.name].update(parts=clock.parts, peak_mib=peak_mib(side, function))
        if FLAGS.profile:
            found[side.name]['operators'] = operators(side, function)
    return dict(row=row, images=images, sides=found)


def report(results):
    """Tables of speed, of the parts of a training step and of operators."""
    speed, parts, slowest = [], [], []
    for result in results:
        row, found = result['row'], result['sides']
        fast, plain = (found.get(name, dict(seconds=[], parts={})) for name in ('fast', 'plain'))
        ratios = [p / f for p, f in zip(plain['seconds'], fast['seconds'])]
        rates = [[result['images'] / s for s in side['seconds']] for side in (fast, plain)]
        speed.append([row, *map(spread, rates), spread(ratios),
                      *(f'{side["peak_mib"]:.0f}' if 'peak_mib' in side and row != 'frechet'
                        else '-' for side in (fast, plain))])     # numpy's is not seen
        parts += [[f'{row}, {name}', *(f'{1000 * side["parts"].get(part, 0):.1f}'
                                       for part in PARTS)]
                  for name, side in found.items() if side['parts']]
        slowest += [[f'{row}, {name}', ', '.join(f'{key} {100 * share:.0f} %'
                                                 for key, share in side['operators'])]
                    for name, side in found.items() if 'operators' in side]
    distributed.print0('\n' + table(['row', 'images/s fast', 'images/s plain', 'plain / fast',
                                     'MiB fast', 'MiB plain'], speed))
    if parts:
        distributed.print0('\n' + table(['ms', *PARTS], parts))
    if slowest:
        distributed.print0('\n' + table(['row', 'slowest operators'], slowest))


def memory(device):
    """Peak of the relational losses beyond maps and gradient, and what travels per step."""
    rows, map_mib = [], FLAGS.group * 64 * CHANNELS * 4 / 2 ** 20
    for name, width in (('IS_P2P', FLAGS.group * 64), ('M_P2P', 4096)):
        found, results = {}, []
        for side in sides(device):
            wanted = 8 * (FLAGS.group * 64 * width * 4 + map_mib * 2 ** 20)
            if side.name == 'plain' and 0 < free_bytes(device) < wanted:
                print(f'{name}, plain: left out, it needs about {wanted / 2 ** 30:.0f} GiB and '
                      f'{free_bytes(device) / 2 ** 30:.0f} are free.')
                continue
            function = relational_loss(side, name, FLAGS.group, 8)
            found[side.name] = peak_mib(side, function) - map_mib
            results.append(function())
        differences = [f'{(one - other).abs().max() / other.abs().max():.1e}'
                       for one, other in zip(results[0], results[-1])]
        rows.append([name, *(f'{found[side]:.0f}' if side in found else '-'
                             for side in ('fast', 'plain')),
                     *(differences if len(results) > 1 else '--')])
    head = ['MiB', 'fast', 'plain', 'value differs by', 'gradient differs by']
    sent, queue = 128 * CHANNELS * 4 / 1e6, 20000 * CHANNELS * 4 / 1e6
    print(f'\nBeyond two maps of {FLAGS.group} x {CHANNELS} x 8 x 8 and the gradient of one '
          f'({map_mib:.0f} MiB each):\n\n{table(head, rows)}\n\n'
          f'Of the maps, 128 pixels travel between processes, {sent:.2f} MB per step (computed); '
          f'of the queue of {queue:.1f} MB, nothing.', flush=True)
    return [dict(row='memory', mib=rows, sent_mb=sent, queue_mb=queue)]


# Growth

def in_child(device, processes=1, **changes):
    """Seconds of a base step (median, fast side) in processes of their own."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    names = ('ch', 'num_res_blocks', 'img_size', 'batch_size', 'amp', 'compile', 'repeats')
    values = dict({name: FLAGS[name].value for name in names}, device=device.type, **changes)
    words = [f'--{name}={value}' for name, value in values.items()]
    words += [f'--{name}={value}' for name in ('ch_mult', 'attn') for value in FLAGS[name].value]
    threads = str(max(1, torch.get_num_threads() // processes))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *launcher * (processes > 1), __file__, '--rows=base', '--noplain',
             f'--json={folder}/json', *words], env=dict(os.environ, OMP_NUM_THREADS=threads),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, universal_newlines=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ['nothing'])[-1]
            raise UserError(f'the measurement with {values} ended with: {said}', code=1)
        found = json.loads(Path(f'{folder}/json').read_text())['rows'][0]
    return statistics.median(found['sides']['fast']['seconds'])


def growth(device):
    """Time of a base step along four axes, with slopes."""
    small, size = max(4, FLAGS.batch_size // 4), FLAGS.img_size
    most = torch.cuda.device_count() if device.type == 'cuda' else os.cpu_count()
    axes = dict(batch_size=[small, 2 * small, 4 * small], ch=[32, 64, 128],
                img_size=[size // 2, size, 2 * size],
                processes=[n for n in (1, 2, 4) if n <= most and 4 * small % n == 0])
    rows, results = [], []
    for axis, points in axes.items():
        batch = dict(batch_size=4 * small if axis == 'processes' else small)
        times = [in_child(device, **dict(batch, **{axis: value})) for value in points]
        slope = np.polyfit(np.log(points), np.log(times), 1)[0] if len(points) > 1 else 0.
        results.append(dict(row=axis, points=points, seconds=times, slope=slope))
        cells = [f'{value}: {time:.3g} s' for value, time in zip(points, times)]
        rows.append([axis, *(cells + ['', ''])[:3], f'{slope:.2f}'])
    print('\nTime of a base step; slope of log time over log size:\n\n'
          + table(['over', '', '', '', 'slope'], rows), flush=True)
    return results


def flagfile(data_set, stage):
    lines = Path(options.anchored(f'config/{data_set}_{stage}.txt')).read_text().splitlines()
    pairs = [line.lstrip('-').partition('=')[::2] for line in lines]
    return dict(pairs, **{name: [int(value) for key, value in pairs if key == name]
                          for name in ('ch_mult', 'attn')})


def flops(data_set, stage):
    """Floating-point operations per image of a training step; counted without data."""
    from torch.utils.flop_counter import FlopCounterMode
    words, counts = flagfile(data_set, stage), []
    with torch.device('meta'), torch.no_grad():
        x, t = torch.empty(1, 3, *[int(words['img_size'])] * 2), torch.zeros(1, dtype=torch.int64)
        network = UNet(N, int(words['ch']), words['ch_mult'], words['attn'],
                       int(words['num_res_blocks']))
        classifier = build_classifier(words.get('classifier', 'densenet201'), 10).eval().to('meta')
        for module, inputs in ((network, (x, t)), (classifier, (x,))):
            with FlopCounterMode(display=False) as counter:
                module(*inputs)
            counts.append(counter.get_total_flops())
    # backward costs two forwards; one in the classifier, whose weights get no gradient
    return counts[0] * (3 if stage == 'BASE' else 5) + counts[1] * (3 if stage == 'RDD' else 0)


def estimate(device):
    """Hours of the chains in config/ on one device: counted operations over a sustained rate."""
    halvings, rates, rows = dict(BASE=1, PD=7, RDD=3), [], []   # 1024 steps; to 8; to 1
    for stage in halvings:
        rate = FLAGS.tflops
        if not rate:
            found = measure(stage.lower(), device)
            seconds_per_step = statistics.median(found['sides']['fast']['seconds'])
            rate = found['images'] / seconds_per_step * flops('CIFAR10', stage) / 1e12
        rates.append(rate)
    for data_set in ('CIFAR10', 'IMAGENET64'):
        work = []
        for stage, times in halvings.items():
            words = flagfile(data_set, stage)
            images = int(words['total_steps']) * int(words['batch_size']) * times
            work.append(images * flops(data_set, stage) / 1e18)
        hours = [1e6 * w / rate / 3600 for w, rate in zip(work, rates)]
        rows += [[f'{data_set}, {unit}', *(f'{v:.3g}' for v in values + [sum(values)])]
                 for unit, values in (('1e18 operations', work), ('hours', hours))]
    print(f'\nESTIMATE, not measured: hours on one device that sustains '
          f'{", ".join(f"{rate:.3g}" for rate in rates)} TFLOP/s (base, PD, RDD; '
          f'{"supposed" if FLAGS.tflops else "measured here at CIFAR-10 width"}):\n\n'
          + table(['', 'base', 'PD 1024 to 8', 'RDD 8 to 1', 'all'], rows), flush=True)
    return [dict(row='estimate', tflops=rates, rows=rows)]


if __name__ == '__main__':
    define_flags()
    options.run(main)
