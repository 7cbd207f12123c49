"""The training rows of the bench: steps of train_base.py, PD.py or train_rdd.py as they are.

  python tools/bench_steps.py pd --base_ckpt FOLDER --logdir FOLDER --json FILE
bench.py starts it. The first word is the row; then come flags of its script and those defined
below. One process measures one row, because the scripts define the same flags.

The script's own `train` runs. Only the loop of `Run` is replaced by one that measures and writes
nothing, and the data set by random images.
"""

import contextlib
import functools
import importlib
import json
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

import torch    # noqa: E402
from absl import flags      # noqa: E402

import runtime.run      # noqa: E402
from classifier.networks import Classifier      # noqa: E402
from diffusion import Diffusion     # noqa: E402
from runtime import cli, data, distributed      # noqa: E402
from runtime.run import Run     # noqa: E402
from tools.bench_rows import random_images      # noqa: E402
from tools.measure import compare       # noqa: E402
from tools.plain import plain       # noqa: E402

FLAGS = flags.FLAGS
SCRIPTS = dict(base='train_base', pd='PD', rdd='train_rdd')


def define_flags():
    flags.DEFINE_integer('repeats', 5, 'turns of fast and plain', lower_bound=1)
    flags.DEFINE_bool('plain', True, 'measure the plain side as well')
    flags.DEFINE_bool('profile', False, 'find the slowest operators as well')
    flags.DEFINE_string('json', None, 'file for what was measured', required=True)


def main(row, script):
    device, dataset = distributed.init(FLAGS.gpu_id, FLAGS.tf32), random_images()

    def work(turn):
        if FLAGS.compile:
            torch._dynamo.reset()       # every turn compiles networks of its own
        with measured(turn, script, dataset):
            if row == 'base':
                script.train(device, FLAGS.loss_type)
            else:
                script.train(device, dataset, FLAGS.base_ckpt, FLAGS.logdir, FLAGS.total_steps)

    sides = dict(fast=contextlib.nullcontext)
    if FLAGS.plain:
        sides['plain'] = functools.partial(plain, script, runtime.run)
    found = compare(work, sides, device, FLAGS.repeats, FLAGS.profile)
    if distributed.is_main():
        Path(FLAGS.json).write_text(json.dumps(found))
    distributed.cleanup()


@contextlib.contextmanager
def measured(turn, script, dataset):
    """Inside, a run makes the steps of `turn`, whose clock is told the parts of each.

    'losses' are what is left of a step beside the other parts: the losses proper, the memory
    queue, noise.
    """
    clock, parts, forward = turn.clock, Run.parts, Run.forward

    def steps(run):
        run.net.module.train()
        run.batches = data.batches(run.dataset, run.settings.batch_size, run.settings.seed,
                                   run.device, accum=run.settings.grad_accum)
        for run.step, _ in enumerate(turn, 1):
            run._parts_done = 0
            with clock('losses'):
                yield run.step

    def clocked_parts(*args, **how):
        found = parts(*args, **how)
        while True:
            with clock('data wait'):
                part = next(found, None)
            if part is None:
                return
            yield part

    @contextlib.contextmanager
    def clocked_forward(*args):
        with clock('student'), forward(*args):
            yield

    replaced = [(Run, '__iter__', steps), (Run, 'parts', clocked_parts),
                (Run, 'forward', clocked_forward), (script, 'training_data', lambda *_: dataset)]
    for owner, name, part in ((Diffusion, 'two_step_target', 'teacher'),
                              (Classifier, '__call__', 'classifier'),
                              (Run, 'backward', 'backward'), (Run, 'update', 'optimiser')):
        replaced.append((owner, name, clocked(clock, part, getattr(owner, name))))
    with contextlib.ExitStack() as stack:
        for owner, name, form in replaced:
            stack.enter_context(mock.patch.object(owner, name, form))
        yield


def clocked(clock, part, function):
    """`function`, whose time counts for `part`."""
    @functools.wraps(function)
    def call(*args, **how):
        with clock(part):
            return function(*args, **how)
    return call


if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        sys.exit(__doc__)
    this_row = sys.argv.pop(1)
    define_flags()
    this_script = importlib.import_module(SCRIPTS[this_row])      # defines the other flags
    cli.run(lambda: main(this_row, this_script))
