"""Progressive distillation: a student with half the steps of its teacher.

One halving, on one process or under torchrun:
  python PD.py --flagfile ./config/CIFAR10_PD.txt --base_ckpt ./logs/CIFAR10/1024 \\
      --logdir ./logs/CIFAR10/512
All halvings down to 8 steps, one folder per stage (./logs/CIFAR10/512, .../256, ...):
  torchrun --nproc_per_node=4 PD.py --flagfile ./config/CIFAR10_PD.txt \\
      --base_ckpt ./logs/CIFAR10/1024 --logdir ./logs/CIFAR10 --until 8
The same command run again resumes; finished stages are skipped.
"""

import torch
from absl import flags

from diffusion import distillation_loss
from formats.load import load_teacher
from runtime import cli, distributed
from runtime.flags import require
from runtime.optim import learning_rate
from training import (define_distillation_flags, new_student, noisy_parts, sample_grid, stages,
                      start_run, teacher_and_images)

FLAGS = flags.FLAGS
define_distillation_flags()
flags.DEFINE_enum('loss_type', 'both', ['x', 'eps', 'both'], 'error in x, in eps, or the larger of '
                  'the two per image (truncated SNR)')


def main():
    require(logdir='the folder this run writes to, such as ./logs/CIFAR10/512',
            base_ckpt='the folder of the teacher, such as ./logs/CIFAR10/1024')
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    teacher, dataset = teacher_and_images()
    for stage in stages(teacher.diffusion.T):
        train(device, dataset, *stage)
    distributed.cleanup()


def train(device, dataset, base_ckpt, logdir, total_steps):
    teacher = load_teacher(base_ckpt, device)
    student, diffusion = new_student(teacher)       # a copy, with every second time
    run = start_run('pd', student, diffusion, dataset, logdir, total_steps, teacher=teacher)
    run.prepare(teacher.network)
    for step in run:
        for part in noisy_parts(run, diffusion):
            t, y = part.t, part.y
            z_t = diffusion.add_noise(part.x_0, part.eps, t)
            with torch.no_grad(), run.autocast():
                x_target = teacher.diffusion.two_step_target(teacher.network, z_t, t, y)
                eps_target = diffusion.eps_of(z_t, x_target, t)
            with run.training(part):
                x_pred, eps_pred = diffusion.predict(run.net, z_t, t, y)
            loss = distillation_loss(x_pred, eps_pred, x_target, eps_target, FLAGS.loss_type).mean()
            run.backward(loss=(1., loss))
        run.update(learning_rate(step, FLAGS.lr, FLAGS.warmup, total_steps, decay=True))
        sample_grid(run, diffusion)


if __name__ == '__main__':
    cli.run(main)
