"""Train the diffusion teacher: a network that predicts x_0 (or eps, or v) from z_t.

One process, on a GPU or the CPU:
  python train_base.py --flagfile ./config/CIFAR10_BASE.txt --logdir ./logs/CIFAR10/1024
Four GPUs:
  torchrun --nproc_per_node=4 train_base.py --flagfile ./config/CIFAR10_BASE.txt \\
      --logdir ./logs/CIFAR10/1024
The same command run again resumes. Results in --logdir: ckpt.pt, sample/, metrics.jsonl. The last
line of the output has the number of steps, the time they took, and the folder of the results.
"""

import torch
from absl import flags

from diffusion import Diffusion, distillation_loss
from model import UNet
from runtime import cli, distributed, seeding
from runtime.flags import check_network, given, require
from runtime.optim import learning_rate
from training import define_training_flags, images_for, noisy_parts, sample_grid, start_run

FLAGS = flags.FLAGS
define_training_flags(lr=2e-4, wd=0.001, total_steps=800000, warmup=5000, ema_decay=0.9999,
                      dropout=0.1)
flags.DEFINE_integer('T', 1024, 'sampling steps of the model', 1, 10000)
flags.DEFINE_integer('time_scale', 1, 'points of the base grid per step', 1, 2048)
flags.DEFINE_enum('loss_type', 'both', ['x', 'eps', 'both'], 'error in x_0, in eps, or the larger '
                  'of the two per image (truncated SNR)')


def main():
    require(logdir='the folder this run writes to, such as ./logs/CIFAR10/1024')
    check_network()
    loss_type = 'eps' if FLAGS.mean_type == 'epsilon' else FLAGS.loss_type      # as in DDPM
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    if loss_type != FLAGS.loss_type and given('loss_type'):
        distributed.print0('note: --loss_type has no effect with --mean_type epsilon: the loss is '
                           'the error in eps.')
    train(device, loss_type)
    distributed.cleanup()


def train(device, loss_type):
    torch.manual_seed(seeding.mix(FLAGS.seed, seeding.WEIGHTS))
    net = UNet(FLAGS.T * FLAGS.time_scale, FLAGS.ch, FLAGS.ch_mult, FLAGS.attn,
               FLAGS.num_res_blocks, FLAGS.dropout, FLAGS.conditional, FLAGS.class_num)
    net = net.to(device, memory_format=torch.channels_last)
    diffusion = Diffusion(FLAGS.T, FLAGS.time_scale, FLAGS.mean_type, device)
    run = start_run('base', net, diffusion, images_for(net), FLAGS.logdir, FLAGS.total_steps,
                    use='ema_model')
    for step in run:
        for part in noisy_parts(run, diffusion, t_min=0):
            x_0, eps, t = part.x_0, part.eps, part.t
            z_t = diffusion.add_noise(x_0, eps, t)
            with run.training(part):
                x_pred, eps_pred = diffusion.predict(run.net, z_t, t, part.y)
            loss = distillation_loss(x_pred, eps_pred, x_0, eps, loss_type).mean()
            run.backward(loss=(1., loss))
        run.update(learning_rate(step, FLAGS.lr, FLAGS.warmup, FLAGS.total_steps, decay=False))
        sample_grid(run, diffusion)


if __name__ == '__main__':
    cli.run(main)
