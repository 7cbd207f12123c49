"""Distribution matching distillation: a student of few steps with the distribution of its teacher.

  python train_dmd.py --flagfile ./config/CIFAR10_DMD.txt --teacher_ckpt ./logs/CIFAR10/1024 \\
      --base_ckpt ./logs/CIFAR10/1 --logdir ./logs/CIFAR10/dmd
Four GPUs: the same after `torchrun --nproc_per_node=4`. The same command run again resumes.

G is a student of 1, 2 or 4 steps by any method, mu_real its teacher on the fine grid, frozen, and
mu_fake a copy of the teacher that is trained on images of G. From z_t = alpha_t x + sigma_t eps,
they predict x_real and x_fake. x_fake - x_real is along the gradient of the KL divergence between
noisy images of G and of the teacher, whose scores are (alpha_t x_pred - z_t) / sigma_t^2. A step is
(DMD, Yin et al., 2311.18828, equations 7 and 8 without alpha_t; DMD2, 2405.14867):
  --fake_updates times, with x = clip(G(x_T, y)): mu_fake learns from mean |x_fake - x|^2;
  once, with x = G(x_T, y): G learns from g = (x_fake - x_real) / mean |x - x_real|, taken as the
  gradient at x.
Images of the data set enter no loss; it gives the labels y.
"""

import functools

import torch
from absl import flags

from runtime import cli, distributed, seeding
from runtime.flags import define_teacher_steps, require
from runtime.optim import adam, clip_gradient, learning_rate, step_optimizer
from runtime.run import Trainable
from training import (define_training_flags, images_for, sample_grid, start_run,
                      student_and_teacher)

FLAGS = flags.FLAGS
define_training_flags(lr=1e-4, warmup=50)
define_teacher_steps()
flags.DEFINE_string('teacher_ckpt', None, 'folder (or file) of the teacher with its many steps')
flags.DEFINE_string('base_ckpt', None, 'where the student starts: its folder, or a teacher\'s')
flags.DEFINE_integer('student_steps', 0, 'steps of the student; 0: those of --base_ckpt', 0, 4)
flags.DEFINE_integer('fake_updates', 2, 'updates of mu_fake per update of the student', 1, 100)
flags.DEFINE_float('fake_lr', 5e-4, 'learning rate of mu_fake', 0.)
flags.DEFINE_float('adam_beta1', 0., 'first beta of Adam, of both networks', 0., .999)
flags.DEFINE_float('adam_beta2', .99, 'second beta of Adam, of both networks', 0., .9999)
flags.DEFINE_float('t_min', .02, 'smallest time drawn, as a share of the largest', 0., 1.)
flags.DEFINE_float('t_max', .98, 'largest time drawn, as a share of the largest', 0., 1.)
flags.DEFINE_bool('weighting', True, 'divide g by mean |x - x_real| of each image')
flags.DEFINE_float('regression_weight', 0., 'weight of squared error to images of --base_ckpt', 0.)


def main():
    require(teacher_ckpt='folder of the teacher, such as ./logs/CIFAR10/1024', logdir='where '
            'results go', base_ckpt='folder of the student, such as ./logs/CIFAR10/1')
    if FLAGS.t_min >= FLAGS.t_max:
        raise cli.UserError(f'--t_min {FLAGS.t_min} is not below --t_max {FLAGS.t_max}; lower it')
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    student, teacher = student_and_teacher()
    dataset = images_for(student.network)
    train(student.to(device), teacher.to(device), dataset)
    distributed.cleanup()


def train(student, teacher, dataset):
    diffusion, mu_real, teacher_diffusion = student.diffusion, teacher.network, teacher.diffusion
    optimizer = functools.partial(adam, betas=(FLAGS.adam_beta1, FLAGS.adam_beta2))
    mu_fake = Trainable(teacher.trainable(), optimizer, FLAGS.fake_lr)
    run = start_run('dmd', student.trainable(), diffusion, dataset, FLAGS.logdir,
                    FLAGS.total_steps, teacher=teacher, start=student, optimizer=optimizer,
                    also_saved=dict(fake_model=mu_fake.module, optim_fake=mu_fake.optim))
    run.prepare(mu_real, student.network)
    for step in run:
        parts, finite = list(run.parts()), True
        for k in range(FLAGS.fake_updates):
            for part in noisy(parts, run, teacher_diffusion, k):
                with torch.no_grad(), run.autocast():
                    number = (step + k) % diffusion.T       # of the sampler's evaluation
                    x = diffusion.evaluation(run.net.module, part.x_T, number, part.y).clamp(-1, 1)
                    z_t = teacher_diffusion.add_noise(x, part.eps, part.t)
                mu_fake.average_gradients = part.number + 1 == FLAGS.grad_accum
                with run.autocast():
                    x_fake, _ = teacher_diffusion.predict(mu_fake, z_t, part.t, part.y)
                loss = (x_fake - x).square().mean()
                (loss / FLAGS.grad_accum).backward()
                run.meter.add(loss_fake=loss)
            finite &= clip_gradient(mu_fake.params, FLAGS.grad_clip).isfinite()
            step_optimizer(mu_fake.optim, finite)

        for part in noisy(parts, run, teacher_diffusion, FLAGS.fake_updates):
            with run.training(part):
                x = diffusion.evaluation(run.net, part.x_T, step % diffusion.T, part.y)
            with torch.no_grad(), run.autocast():
                z_t = teacher_diffusion.add_noise(x, part.eps, part.t)
                x_real, _ = teacher_diffusion.predict(mu_real, z_t, part.t, part.y)
                x_fake, _ = teacher_diffusion.predict(mu_fake.module, z_t, part.t, part.y)
                g = x_fake - x_real
                if FLAGS.weighting:
                    g = g / (x - x_real).abs().mean((1, 2, 3), keepdim=True)
            losses = dict(loss_dmd=(1., (x - (x - g).detach()).square().mean() / 2))
            if FLAGS.regression_weight:
                with torch.no_grad(), run.autocast():
                    x_start = diffusion.evaluation(student.network, part.x_T, step % diffusion.T,
                                                   part.y)
                losses['loss_regression'] = FLAGS.regression_weight, (x - x_start).square().mean()
            run.backward(**losses)
        rate = learning_rate(step, FLAGS.lr, FLAGS.warmup, FLAGS.total_steps, decay=True)
        run.update(rate, finite)
        sample_grid(run, diffusion)


def noisy(parts, run, diffusion, k):
    """Yield the parts with x_T, eps like x_0 and t (B,) of `diffusion`, drawn anew for every k."""
    rng = run.generator(seeding.NOISE, diffusion.T, run.step, k + 1)
    low = max(1, round(FLAGS.t_min * diffusion.T))
    high = max(low, round(FLAGS.t_max * diffusion.T))
    size, shape = FLAGS.batch_size, (3, FLAGS.img_size, FLAGS.img_size)
    t_all = torch.randint(low, high + 1, (size,), generator=rng, device=rng.device)
    x_T_all, eps_all = torch.randn((2, size, *shape), generator=rng, device=rng.device)
    for part in parts:
        part.t = diffusion.visited[t_all[part.rows]]
        part.x_T, part.eps = x_T_all[part.rows], eps_all[part.rows]
        yield part


if __name__ == '__main__':
    cli.run(main)
