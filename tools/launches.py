"""Count what a step starts on a GPU, without one: operations on a simulated device.

  python tools/launches.py                base, PD and RDD at CIFAR-10 width, float32 and bfloat16
  python tools/launches.py compiled       the same with --compile: kernels of Inductor (inductor.py)
                                          [option ..]: those of Inductor to switch on
  python tools/launches.py scale          an RDD step of one process of 1, 8, 64 and 512
  python tools/launches.py rdd --flagfile config/CIFAR10_RDD.txt --amp bf16 [flags]
                                          a step of one script, by operation, in a process that
                                          simulated_gpu.start has started; --ranks 4: in a group
The scripts' own `train` runs. The loop of `Run`, images, teacher and classifier are stand-ins. See
simulated_gpu.py for what such a count cannot see.
"""

import contextlib
import importlib
import itertools
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

import torch    # noqa: E402
from absl import flags      # noqa: E402

import runtime.run      # noqa: E402
from classifier import build_classifier     # noqa: E402
from classifier.frozen import fold_batch_norms      # noqa: E402
from diffusion import Diffusion     # noqa: E402
from model import UNet      # noqa: E402
from runtime import cli, data, pictures, precision     # noqa: E402
from runtime.models import ARCHITECTURE, Model        # noqa: E402
from runtime.optim import frozen        # noqa: E402
from tools import inductor, simulated_gpu     # noqa: E402
from tools.measure import table     # noqa: E402
from tools.simulated_gpu import GPU     # noqa: E402

FLAGS = flags.FLAGS
SCRIPTS = dict(base='train_base', pd='PD', rdd='train_rdd', eval='ddim_eval')
STEPS = 2       # the first one makes the state of the optimisers
T = 8           # of the teachers
SCALES = (1, 8, 64, 512)


def count(row, script, ranks, steps=STEPS):
    """[(operations, bytes drawn, bytes sent)] of the steps of a script, on the last process."""
    found = []
    with simulated_gpu.simulated_gpu(ranks, ranks - 1) as counter, contextlib.ExitStack() as stack:
        for owner, name, form in stand_ins(script, counter, steps, found):
            stack.enter_context(mock.patch.object(owner, name, form))
        if 'compile' in FLAGS and FLAGS.compile:
            form = stack.enter_context(inductor.lowering(counter, FLAGS.inductor))
            for owner in (runtime.run, precision):
                stack.enter_context(mock.patch.object(owner, 'compile_networks', form))
        if row == 'eval':
            sample_and_score(script, counter, found)
        elif row == 'base':
            script.train(GPU, FLAGS.loss_type)
        else:
            script.train(GPU, random_images(), 'teacher', 'folder', FLAGS.total_steps)
    return found


def stand_ins(script, counter, steps, found):
    """(owner, name, form) of what would read or write files, and of the loop of `Run`."""
    def loop(run):
        run.net.module.train()
        s = run.settings
        run.batches = data.batches(run.dataset, s.batch_size, s.seed, run.device,
                                   accum=s.grad_accum)
        counter.take()
        for run.step in range(1, steps + 1):
            run._parts_done = 0
            yield run.step
            found.append(counter.take())

    yield runtime.run.Run, '__iter__', loop
    yield runtime.run.Run, '_resume', no_checkpoint
    forms = dict(new_unet=lambda *_: random_unet(), load_teacher=lambda *_: random_teacher(),
                 training_data=lambda *_: random_images(),
                 load_frozen=lambda *args: fold_batch_norms(random_classifier(*args)))
    for name, form in forms.items():
        if hasattr(script, name):
            yield script, name, form


def sample_and_score(script, counter, found):
    """The loop of ddim_eval.py, which scores with a small convolutional network."""
    class Counted(script.ActivationStats):
        def update(self, *batch):
            super().update(*batch)
            found.append(counter.take())

        def reduce(self):
            return self

    network = random_classifier('convnet_small', None, random_images(), None, GPU)
    y = torch.zeros(FLAGS.num_images, dtype=torch.int64, device=GPU) if FLAGS.conditional else None
    clock = itertools.count()
    forms = dict(ActivationStats=Counted, synchronised_time=lambda device: next(clock))
    with mock.patch.multiple(script, **forms), mock.patch.object(pictures, 'refuse_unless'), \
            torch.no_grad():
        script.sample_and_score(random_teacher(), y, lambda x: network(x.float())[1::-1])


def no_checkpoint(run, base_ckpt):
    run.start, run.meter = 0, runtime.run.Meter()


def random_unet():
    base_grid = FLAGS.T * FLAGS.time_scale if 'T' in FLAGS else 1024
    with GPU:
        network = UNet(base_grid, FLAGS.ch, FLAGS.ch_mult, FLAGS.attn, FLAGS.num_res_blocks,
                       FLAGS.dropout, FLAGS.conditional, FLAGS.class_num)
    return network.to(memory_format=torch.channels_last)


def random_teacher():
    network = frozen(random_unet())
    arch = {name: getattr(FLAGS, name) for name in ARCHITECTURE}
    return Model(network, Diffusion(T, 1024 // T), 'teacher', 'net_model', arch, FLAGS.img_size,
                 {}).to(GPU)


def random_classifier(name, path, dataset, normalisation, device):
    network = frozen(build_classifier(name, dataset.num_classes))
    return network.to(device, memory_format=torch.channels_last)


def random_images():
    size, number = FLAGS.img_size, 2 * FLAGS.batch_size
    images = torch.zeros(number, 3, size, size, dtype=torch.uint8)
    labels = torch.zeros(number, dtype=torch.int64)
    return data.Images('random', 'train', size, labels, FLAGS.class_num, images)


def one_row(row, script):
    """Print the last step of a script, as JSON."""
    operations, drawn, sent = count(row, script, FLAGS.ranks)[-1]
    print(json.dumps(dict(total=sum(operations.values()), drawn=drawn, sent=sent,
                          operations=dict(operations.most_common()))))


def measured(library, row, *words):
    """What `one_row` prints, from a process of its own."""
    done = simulated_gpu.start(library, [__file__, row, *words])
    if done.returncode:
        raise cli.UserError(f'the simulation of {row} {" ".join(words)} ended with:\n{done.stderr}',
                            code=1)
    return json.loads(done.stdout.strip().splitlines()[-1])


def cifar10(row):
    return f'--flagfile=config/CIFAR10_{row.upper()}.txt'


def print_counts(library):
    rows = [[row, *(f'{measured(library, row, cifar10(row), f"--amp={amp}")["total"]:,}'
                    for amp in ('none', 'bf16'))] for row in ('base', 'pd', 'rdd')]
    print(table(['operations on the device per step', 'float32', 'bfloat16'], rows))


def print_compiled(library, *options):
    if not inductor.has_triton():
        raise cli.UserError('Inductor writes code for GPUs with Triton; run pip install triton')
    rows = []
    for row, amp in itertools.product(('base', 'pd', 'rdd'), ('none', 'bf16')):
        found = measured(library, row, cifar10(row), f'--amp={amp}', '--compile',
                         f'--inductor={",".join(options)}')
        inside = [found['operations'].get(name, 0) for name in inductor.KINDS]
        rows.append([f'{row} {amp}', *(f'{n:,}' for n in (*inside, found['total'] - sum(inside),
                                                         found['total']))])
    print(table(['with --compile', 'Triton kernels', 'library calls', 'other operations', 'all'],
                rows))


def print_scale(library):
    rows = []
    for ranks in SCALES:
        found = measured(library, 'rdd', cifar10('rdd'), '--amp=bf16', '--dropout=0.1',
                         '--batch_size=512', f'--ranks={ranks}')
        rows.append([f'{ranks}', *(f'{found[name] / 1e6:.2f}' for name in ('drawn', 'sent')),
                     f'{found["total"]:,}'])
    print(table(['processes', 'MB drawn', 'MB sent', 'operations'], rows))


def print_tables(words):
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = simulated_gpu.build(folder)
        except simulated_gpu.NotHere as error:
            raise cli.UserError(f'no GPU can be simulated here: {error}', code=1)
        if words[:1] == ['compiled']:
            print_compiled(library, *words[1:])
        elif words in ([], ['scale']):
            (print_scale if words else print_counts)(library)
        else:
            raise cli.UserError(f'unknown words "{" ".join(words)}"; expected nothing, scale, or '
                                f'compiled and options of Inductor')


if __name__ == '__main__':
    if len(sys.argv) > 1 and sys.argv[1] in SCRIPTS:
        this_row = sys.argv.pop(1)
        flags.DEFINE_integer('ranks', 1, 'processes in the group, of which the last is simulated')
        flags.DEFINE_list('inductor', [], 'options of Inductor to switch on')
        this_script = importlib.import_module(SCRIPTS[this_row])
        cli.run(lambda: one_row(this_row, this_script))
    cli.run(print_tables, words=True)
