"""Progressive distillation: a student with half the steps of its teacher.

One halving, on one process or under torchrun:
  python PD.py --flagfile ./config/CIFAR10_PD.txt --base_ckpt ./logs/CIFAR10/1024 \\
      --logdir ./logs/CIFAR10/512
All halvings down to 8 steps, one folder per stage (./logs/CIFAR10/512, .../256, ...):
  torchrun --nproc_per_node=4 PD.py --flagfile ./config/CIFAR10_PD.txt \\
      --base_ckpt ./logs/CIFAR10/1024 --logdir ./logs/CIFAR10 --until 8
The same command run again resumes; finished stages are skipped.
"""

from pathlib import Path

import torch
from absl import flags

from diffusion import distillation_loss
from runtime import cli, distributed
from runtime.flags import define_training_flags, require
from runtime.models import load_teacher
from runtime.optim import learning_rate
from runtime.run import Run, training_data

FLAGS = flags.FLAGS
define_training_flags()
flags.DEFINE_string('base_ckpt', None, 'folder (or file) of the teacher')
flags.DEFINE_integer('until', 0, 'halve until the student has this many steps, each stage into '
                     'a folder --logdir/STEPS; 0: one halving into --logdir')
flags.DEFINE_enum('loss_type', 'both', ['x', 'eps', 'both'], 'error in x, in eps, or the larger of '
                  'the two per image (truncated SNR)')


def main():
    require(logdir='the folder this run writes to, such as ./logs/CIFAR10/512',
            base_ckpt='the folder of the teacher, such as ./logs/CIFAR10/1024')
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    teacher = load_teacher(FLAGS.base_ckpt, FLAGS, torch.device('cpu'))
    dataset = training_data(FLAGS, teacher.network)
    for base_ckpt, logdir, total_steps in stages(teacher.diffusion.T):
        train(device, dataset, base_ckpt, logdir, total_steps)
        distributed.barrier()       # the next stage reads what the first process has just written
    distributed.cleanup()


def stages(T):
    """[(teacher, folder, training steps)]; twice the steps for T = 2 and 1, as released."""
    if not FLAGS.until:
        return [(FLAGS.base_ckpt, FLAGS.logdir, FLAGS.total_steps)]
    steps = [T]
    while steps[-1] > FLAGS.until and steps[-1] % 2 == 0:
        steps.append(steps[-1] // 2)
    if steps[-1] != FLAGS.until or T == FLAGS.until:
        raise cli.UserError(f'--until {FLAGS.until} is not reached by halving the steps of '
                            f'{FLAGS.base_ckpt}; it has {T} steps')
    folders = [str(Path(FLAGS.logdir) / str(T)) for T in steps[1:]]
    totals = [FLAGS.total_steps * (2 if T <= 2 else 1) for T in steps[1:]]
    return list(zip([FLAGS.base_ckpt] + folders[:-1], folders, totals))


def train(device, dataset, base_ckpt, logdir, total_steps):
    teacher = load_teacher(base_ckpt, FLAGS, device)
    student, diffusion = teacher.student()      # a copy, with every second point of the grid
    run = Run(FLAGS, 'pd', student, diffusion, dataset, logdir, base_ckpt, total_steps=total_steps)
    run.prepare(teacher.network)
    for step in run:
        for part in run.parts():
            x_0, y, t, eps = part
            z_t = diffusion.add_noise(x_0, eps, t)
            with torch.no_grad(), run.autocast():
                x_target = teacher.diffusion.two_step_target(teacher.network, z_t, t, y)
                eps_target = diffusion.eps_of(z_t, x_target, t)
            with run.forward(part):
                x_pred, eps_pred = diffusion.predict(run.net, z_t, t, y)
            loss = distillation_loss(x_pred, eps_pred, x_target, eps_target, FLAGS.loss_type).mean()
            run.backward(loss=(1., loss))
        run.update(learning_rate(step, FLAGS.lr, FLAGS.warmup, total_steps, decay=True))


if __name__ == '__main__':
    cli.run(main)
