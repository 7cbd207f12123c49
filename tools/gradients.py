"""Which term of the objective moves the student? Gradient norms of the terms of train_rdd.py.

  python tools/gradients.py --flagfile ./config/DIGITS_RDD.txt --logits --total_steps 100
Trains as train_rdd.py does with the same flags, into a temporary folder, and at every --log_step
measures each term by itself. Prints a Markdown table with the means over these steps: value of the
term before it is weighted, norm of its gradient with respect to the student's weights, the same
times its weight, and the cosine of the angle to the gradient of the first term.
"""

import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

import torch    # noqa: E402
from absl import flags      # noqa: E402

from runtime import cli     # noqa: E402
from runtime.run import Run     # noqa: E402

FLAGS = flags.FLAGS


def main(script):
    if 'RANK' in os.environ:
        raise cli.UserError('this tool measures in one process; start it without torchrun')
    found, backward = defaultdict(list), Run.backward

    def measured_backward(run, **terms):
        if run.step % FLAGS.log_step == 0:
            measure(run.net.params, terms, found)
        backward(run, **terms)

    with tempfile.TemporaryDirectory() as folder, \
            mock.patch.object(Run, 'backward', measured_backward):
        FLAGS.logdir, FLAGS.until, FLAGS.sample_step, FLAGS.save_step = folder, 0, 0, 0
        script.main()
    print_table(found)


def measure(params, terms, found):
    """Append (value, norm, weighted norm, cosine to the first) of every term to found[name]."""
    first = None
    for name, (weight, value) in terms.items():
        parts = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        gradient = torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                              for p, g in zip(params, parts)])
        first = gradient if first is None else first
        norm = gradient.norm()
        cosine = gradient @ first / (norm * first.norm())
        found[name].append([value.item(), norm.item(), weight * norm.item(), cosine.item()])


def print_table(found):
    if not found:
        raise cli.UserError(f'--total_steps {FLAGS.total_steps} is less than --log_step '
                            f'{FLAGS.log_step}, so that nothing was measured; lower --log_step')
    print('\n| term | value | norm of its gradient | norm x weight | cosine to the first |')
    print('| :--- | ---: | ---: | ---: | ---: |')
    for name, rows in found.items():
        value, norm, weighted, cosine = torch.tensor(rows).mean(0).tolist()
        print(f'| {name} | {value:.3g} | {norm:.3g} | {weighted:.3g} | {cosine:.2f} |')


if __name__ == '__main__':
    import train_rdd    # defines the flags
    cli.run(lambda: main(train_rdd))
