"""Train the diffusion teacher.

One process, on a GPU or the CPU:
  python train_base.py --flagfile ./config/CIFAR10_BASE.txt --logdir ./logs/CIFAR10/1024
Four GPUs:
  torchrun --nproc_per_node=4 train_base.py --flagfile ./config/CIFAR10_BASE.txt \\
      --logdir ./logs/CIFAR10/1024
The same command run again resumes. Results in --logdir: ckpt.pt, sample/, metrics.jsonl.
"""

import copy

import torch
from absl import flags

from diffusion import Diffusion, distillation_loss
from model import UNet
from runtime import checkpoint, data, distributed, options, seeding
from runtime.training import (Log, Meter, Stop, adam, autocast, clip_gradient, compile_networks,
                              draw, due, ema_update, fixed_labels, fixed_noise, frozen,
                              learning_rate, make_logdir, save_samples, seed_dropout,
                              step_optimizer, strict)

FLAGS = flags.FLAGS
options.define_data_flags()
options.define_network_flags(dropout=0.1)
options.define_training_flags(lr=2e-4, wd=0.001, total_steps=800000, warmup=5000,
                              ema_decay=0.9999)
options.define_device_flags()
flags.DEFINE_integer('T', 1024, 'sampling steps of the model', lower_bound=1)
flags.DEFINE_integer('time_scale', 1, 'points of the base grid per step', lower_bound=1)
flags.DEFINE_enum('loss_type', 'both', ['x', 'eps', 'both'], 'error in x_0, in eps, or the larger '
                  'of the two per image (truncated SNR)')


def main():
    options.require(logdir='the folder this run writes to, such as ./logs/CIFAR10/1024')
    device = distributed.init(FLAGS.gpu_id)
    train(device)
    distributed.cleanup()


def train(device):
    # Data
    distributed.check_batch(FLAGS.batch_size, FLAGS.grad_accum)
    options.check_network()
    dataset = data.make_dataset(FLAGS.dataset, FLAGS.data_root, FLAGS.img_size, train=True,
                                num_workers=FLAGS.num_workers,
                                skip_bad_images=FLAGS.skip_bad_images)
    options.check_size(dataset)
    options.check_labels(dataset, FLAGS.conditional, FLAGS.class_num)

    # Network and its moving average
    torch.manual_seed(seeding.mix(FLAGS.seed, seeding.WEIGHTS))
    diffusion = Diffusion(FLAGS.T, FLAGS.time_scale, FLAGS.mean_type, device)
    net = UNet(diffusion.N, FLAGS.ch, FLAGS.ch_mult, FLAGS.attn, FLAGS.num_res_blocks,
               FLAGS.dropout, FLAGS.conditional, FLAGS.class_num)
    net = net.to(device, memory_format=torch.channels_last)
    ema = frozen(copy.deepcopy(net))
    net_ddp = distributed.wrap_ddp(net)
    compile_networks(FLAGS.compile, device, net_ddp, ema)
    params = [p for p in net.parameters() if p.requires_grad]

    # Optimiser; the learning rate is a function of the step
    optim = adam(params, FLAGS.lr, FLAGS.wd)

    # Resume
    x_T = fixed_noise(FLAGS.seed, FLAGS.sample_size, FLAGS.img_size, device)
    y_T = fixed_labels(FLAGS.sample_size, FLAGS.class_num, FLAGS.conditional, device)
    start, state = 0, checkpoint.resume(FLAGS.logdir, net, 'base', FLAGS.T, FLAGS.time_scale)
    if state:
        start = state['step']
        checkpoint.restore(state, net_model=net, ema_model=ema, optim=optim)
    if start >= FLAGS.total_steps:
        return distributed.print0(f'{FLAGS.logdir} is finished: step {start}.')
    make_logdir(FLAGS.logdir)
    options.announce(device, FLAGS.logdir, start, images=len(dataset),
                     parameters=sum(p.numel() for p in params))
    # With eps as output the loss is the plain error in eps, as in DDPM and the released code.
    loss_type = FLAGS.loss_type if FLAGS.mean_type == 'xstart' else 'eps'
    if loss_type != FLAGS.loss_type and options.given('loss_type'):
        distributed.print0('note: --loss_type has no effect with --mean_type epsilon: the loss is '
                           'the error in eps.')

    def save(step):
        checkpoint.save_run(
            FLAGS.logdir, FLAGS.keep, net_model=net.state_dict(), ema_model=ema.state_dict(),
            x_T=x_T.cpu(), T=FLAGS.T, time_scale=FLAGS.time_scale, method='base', use='ema_model',
            step=step, optim=optim.state_dict(), meter=meter.state_dict(), **options.facts())

    # Loop
    batches = data.batches(dataset, FLAGS.batch_size, FLAGS.seed, device, start, FLAGS.grad_accum,
                           num_workers=FLAGS.num_workers)
    meter, stop = Meter(state and state.get('meter')), Stop()
    log = Log(FLAGS.logdir, f'base T={FLAGS.T}', start, FLAGS.total_steps, FLAGS.batch_size)
    net.train()
    for step in range(start + 1, FLAGS.total_steps + 1):
        rng = seeding.generator(device, FLAGS.seed, seeding.NOISE, FLAGS.T, step)
        t_all, eps_all = draw(FLAGS.batch_size, x_T.shape[1:], 0, FLAGS.T, rng)
        for micro in range(FLAGS.grad_accum):
            rows = distributed.rows(FLAGS.batch_size, micro, FLAGS.grad_accum)
            x_0, y = next(batches)
            t, eps = t_all[rows] * FLAGS.time_scale, eps_all[rows]
            z_t = diffusion.add_noise(x_0, eps, t)
            seed_dropout(net, rows, FLAGS.batch_size, FLAGS.seed, FLAGS.T, step)
            with distributed.no_sync(net_ddp, micro + 1 < FLAGS.grad_accum):
                with autocast(FLAGS.amp, device):
                    x_pred, eps_pred = diffusion.predict(net_ddp, z_t, t, y)
                loss = distillation_loss(x_pred, eps_pred, x_0, eps, loss_type).mean()
                (strict(loss) / FLAGS.grad_accum).backward()
            meter.add(loss=loss)

        lr = learning_rate(step, FLAGS.lr, FLAGS.warmup, FLAGS.total_steps, decay=False)
        norm = clip_gradient(params, FLAGS.grad_clip)
        finite = norm.isfinite()        # on the device: nothing waits for it
        step_optimizer(optim, finite, lr)
        ema_update(ema, net, FLAGS.ema_decay)
        meter.add(grad_norm=norm)
        meter.end_step(finite)

        if due(step, FLAGS.log_step, FLAGS.total_steps):
            meter.check(step, FLAGS.max_bad_steps)
            log.write(step, lr=lr, **meter.mean())
        log.bar.update()
        stopping = stop.asked()
        if due(step, FLAGS.sample_step) and not stopping:
            save_samples(log, step, FLAGS.logdir, diffusion, ema, x_T, y_T, FLAGS.amp)
        if due(step, FLAGS.save_step, FLAGS.total_steps) or stopping:
            save(step)
        if stopping:
            break
    log.close()
    stop.leave_if_asked(FLAGS.logdir, step)


if __name__ == '__main__':
    options.run(main)
