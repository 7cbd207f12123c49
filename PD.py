"""Progressive distillation: a student with half the steps of its teacher.

One halving, on one process or under torchrun:
  python PD.py --flagfile ./config/CIFAR10_PD.txt --base_ckpt ./logs/CIFAR10/1024 \\
      --logdir ./logs/CIFAR10/512
All halvings down to 8 steps, one folder per stage (./logs/CIFAR10/512, .../256, ...):
  torchrun --nproc_per_node=4 PD.py --flagfile ./config/CIFAR10_PD.txt \\
      --base_ckpt ./logs/CIFAR10/1024 --logdir ./logs/CIFAR10 --until 8
The same command run again resumes; finished stages are skipped.
"""

import copy
from pathlib import Path

import torch
from absl import flags

from diffusion import Diffusion, distillation_loss
from runtime import checkpoint, data, distributed, options, seeding
from runtime.options import UserError
from runtime.training import (Log, Meter, Stop, adam, autocast, clip_gradient, compile_networks,
                              draw, due, ema_update, fixed_labels, fixed_noise, frozen,
                              learning_rate, make_logdir, save_samples, seed_dropout,
                              step_optimizer, strict)

FLAGS = flags.FLAGS
options.define_data_flags()
options.define_network_flags()
options.define_training_flags()
options.define_device_flags()
flags.DEFINE_string('base_ckpt', None, 'folder (or file) of the teacher')
flags.DEFINE_integer('until', 0, 'halve again and again until the student has this many steps; '
                     'every stage gets a folder --logdir/STEPS. 0: one halving into --logdir')
flags.DEFINE_enum('loss_type', 'both', ['x', 'eps', 'both'], 'error in x, in eps, or the larger of '
                  'the two per image (truncated SNR)')


def main():
    options.require(logdir='the folder this run writes to, such as ./logs/CIFAR10/512',
                    base_ckpt='the folder of the teacher, such as ./logs/CIFAR10/1024')
    device = distributed.init(FLAGS.gpu_id)
    distributed.check_batch(FLAGS.batch_size, FLAGS.grad_accum)
    teacher = checkpoint.load_teacher(FLAGS.base_ckpt, FLAGS)
    dataset = data.make_dataset(FLAGS.dataset, FLAGS.data_root, FLAGS.img_size, train=True,
                                num_workers=FLAGS.num_workers,
                                skip_bad_images=FLAGS.skip_bad_images)
    options.check_size(dataset)
    options.check_labels(dataset, teacher.conditional, teacher.class_num)
    for base_ckpt, logdir in stages(teacher.T):
        train(device, dataset, base_ckpt, logdir)
        distributed.barrier()       # the next stage reads what the first process has just written
    distributed.cleanup()


def stages(T):
    """[(teacher, folder of the student)]: one pair, or a chain of them down to --until."""
    if not FLAGS.until:
        return [(FLAGS.base_ckpt, FLAGS.logdir)]
    steps = []
    while T > FLAGS.until and T % 2 == 0:
        T //= 2
        steps.append(T)
    if T != FLAGS.until or not steps:
        raise UserError(f'--until {FLAGS.until} is not reached by halving the steps of '
                        f'{FLAGS.base_ckpt}; it has {T if not steps else steps[0] * 2} steps')
    folders = [str(Path(FLAGS.logdir) / str(T)) for T in steps]
    return list(zip([FLAGS.base_ckpt] + folders[:-1], folders))


def train(device, dataset, base_ckpt, logdir):
    # Teacher (frozen) and student, which starts as a copy with every second point of the grid
    given = checkpoint.load_teacher(base_ckpt, FLAGS)
    T, time_scale = given.T // 2, given.time_scale * 2
    teacher = frozen(given.network.to(device, memory_format=torch.channels_last))
    student = copy.deepcopy(teacher).requires_grad_(True)
    student.time_embedding.timembedding[0].requires_grad_(False)    # a table, not a parameter
    teacher_diffusion = Diffusion(given.T, given.time_scale, FLAGS.mean_type, device)
    diffusion = Diffusion(T, time_scale, FLAGS.mean_type, device)
    ema = frozen(copy.deepcopy(student)) if FLAGS.ema_decay else None
    student_ddp = distributed.wrap_ddp(student)
    compile_networks(FLAGS.compile, device, teacher, student_ddp)
    params = [p for p in student.parameters() if p.requires_grad]

    # Optimiser; the learning rate is a function of the step
    optim = adam(params, FLAGS.lr, FLAGS.wd)

    # Resume
    x_T = fixed_noise(FLAGS.seed, FLAGS.sample_size, FLAGS.img_size, device)
    y_T = fixed_labels(FLAGS.sample_size, given.class_num, given.conditional, device)
    start, state = 0, checkpoint.resume(logdir, student, 'pd', T, time_scale, base_ckpt)
    if state:
        start = state['step']
        checkpoint.restore(state, net_model=student, ema_model=ema, optim=optim)
    if start >= FLAGS.total_steps:
        return distributed.print0(f'{logdir} is finished: step {start}.')
    make_logdir(logdir)
    options.announce(device, logdir, start, images=len(dataset), teacher_steps=given.T,
                     student_steps=T)

    def save(step):
        averaged = dict(ema_model=ema.state_dict()) if ema else {}
        checkpoint.save_run(
            logdir, FLAGS.keep, net_model=student.state_dict(), x_T=x_T.cpu(), T=T,
            time_scale=time_scale, method='pd', step=step, optim=optim.state_dict(),
            meter=meter.state_dict(), **averaged, **options.facts())

    # Loop
    batches = data.batches(dataset, FLAGS.batch_size, FLAGS.seed, device, start, FLAGS.grad_accum,
                           num_workers=FLAGS.num_workers)
    meter, stop = Meter(state and state.get('meter')), Stop()
    log = Log(logdir, f'PD {given.T}->{T}', start, FLAGS.total_steps, FLAGS.batch_size)
    student.train()
    for step in range(start + 1, FLAGS.total_steps + 1):
        rng = seeding.generator(device, FLAGS.seed, seeding.NOISE, T, step)
        t_all, eps_all = draw(FLAGS.batch_size, x_T.shape[1:], 1, T, rng)
        for micro in range(FLAGS.grad_accum):
            rows = distributed.rows(FLAGS.batch_size, micro, FLAGS.grad_accum)
            x_0, y = next(batches)
            t, eps = t_all[rows] * time_scale, eps_all[rows]
            z_t = diffusion.add_noise(x_0, eps, t)
            seed_dropout(student, rows, FLAGS.batch_size, FLAGS.seed, T, step)
            with torch.no_grad(), autocast(FLAGS.amp, device):
                x_target = teacher_diffusion.two_step_target(teacher, z_t, t, y)
                eps_target = diffusion.eps_of(z_t, x_target, t)
            with distributed.no_sync(student_ddp, micro + 1 < FLAGS.grad_accum):
                with autocast(FLAGS.amp, device):
                    x_pred, eps_pred = diffusion.predict(student_ddp, z_t, t, y)
                loss = distillation_loss(x_pred, eps_pred, x_target, eps_target,
                                         FLAGS.loss_type).mean()
                (strict(loss) / FLAGS.grad_accum).backward()
            meter.add(loss=loss)

        lr = learning_rate(step, FLAGS.lr, FLAGS.warmup, FLAGS.total_steps, decay=True)
        norm = clip_gradient(params, FLAGS.grad_clip)
        finite = norm.isfinite()        # on the device: nothing waits for it
        step_optimizer(optim, finite, lr)
        if ema:
            ema_update(ema, student, FLAGS.ema_decay)
        meter.add(grad_norm=norm)
        meter.end_step(finite)

        if due(step, FLAGS.log_step, FLAGS.total_steps):
            meter.check(step, FLAGS.max_bad_steps)
            log.write(step, lr=lr, **meter.mean())
        log.bar.update()
        stopping = stop.asked()
        if due(step, FLAGS.sample_step) and not stopping:
            save_samples(log, step, logdir, diffusion, student, x_T, y_T, FLAGS.amp)
        if due(step, FLAGS.save_step, FLAGS.total_steps) or stopping:
            save(step)
        if stopping:
            break
    log.close()
    stop.leave_if_asked(logdir, step)


if __name__ == '__main__':
    options.run(main)
