"""What the three diffusion scripts share: their flags, times and noise, sample grids, students."""

from pathlib import Path

import torch
from absl import flags

from formats.load import load_teacher
from runtime import checkpoint, distributed, seeding
from runtime.cli import UserError
from runtime.flags import (adopt, define_data_flags, define_device_flags, define_network_flags,
                           define_run_flags, define_teacher_steps, given)
from runtime.guard import stop
from runtime.precision import choose
from runtime.run import Run, due, training_data

FLAGS = flags.FLAGS


# Flags

def define_training_flags(lr=5e-5, wd=0., total_steps=10000, warmup=0, ema_decay=0., dropout=0.):
    """All that the three diffusion scripts share: data, network, optimisation, log, devices."""
    define_data_flags()
    define_network_flags(dropout)
    define_device_flags()
    define_run_flags(lr, wd)
    flags.DEFINE_integer('total_steps', total_steps, 'optimiser steps', lower_bound=1)
    flags.DEFINE_integer('warmup', warmup, 'steps of linear warm-up', lower_bound=0)
    flags.DEFINE_float('ema_decay', ema_decay, 'decay of the averaged weights; 0: none',
                       lower_bound=0., upper_bound=1 - 1e-9)
    flags.DEFINE_string('logdir', None, 'folder of this run: checkpoint, samples, log')
    flags.DEFINE_integer('sample_size', 64, 'images in the sample grid', lower_bound=1,
                         upper_bound=4096)
    flags.DEFINE_integer('sample_step', 1000, 'steps between sample grids; 0: none',
                         lower_bound=0)


def define_distillation_flags():
    """What PD.py and train_rdd.py share in addition: the teacher, and how far to halve."""
    define_training_flags()
    define_teacher_steps()
    flags.DEFINE_string('base_ckpt', None, 'folder (or file) of the teacher, or a folder of '
                        'diffusers')
    flags.DEFINE_integer('until', 0, 'halve until the student has this many steps, each stage into '
                         'a folder --logdir/STEPS; students of 2 steps and 1 train twice as long; '
                         '0: one halving into --logdir', lower_bound=0)


def halvings(T, until, base_ckpt):
    """[T / 2, T / 4, .., until]: the steps of all students of a teacher with T steps.

    Raises:
        UserError: halving does not lead to `until`.
    """
    steps = [T]
    while steps[-1] > until and steps[-1] % 2 == 0:
        steps.append(steps[-1] // 2)
    if steps[-1] != until or T == until:
        raise UserError(f'--until {until} is not reached by halving the steps of {base_ckpt}; it '
                        f'has {T} steps (a model of diffusers can count as one of fewer, with '
                        f'--teacher_steps 128)')
    return steps[1:]


def stages(T):
    """Yield (teacher, folder, training steps) of each halving, by --until and --total_steps.

    Students of 2 steps and 1 train twice as long, as released. The next stage comes when all
    processes are done with the one before, since it reads what the first of them has written.
    """
    if not FLAGS.until:
        yield FLAGS.base_ckpt, FLAGS.logdir, FLAGS.total_steps
        return
    before = FLAGS.base_ckpt
    for steps in halvings(T, FLAGS.until, FLAGS.base_ckpt):
        folder = str(Path(FLAGS.logdir) / str(steps))
        yield before, folder, FLAGS.total_steps * (2 if steps <= 2 else 1)
        distributed.barrier()
        before = folder


# Data and networks

def images_for(network):
    """The training images; a class-conditional network must have as many classes as they have."""
    dataset = training_data()
    if network.conditional and dataset.num_classes != network.class_num:
        raise UserError(f'--dataset {dataset.name} has {dataset.num_classes} classes and the '
                        f'network is for {network.class_num} (--class_num); use the data set the '
                        f'network is meant for')
    return dataset


def teacher_and_images():
    """The `Model` in --base_ckpt, on the CPU, and the training images.

    Flags that describe the network, which the run records, take the values of the teacher.
    """
    teacher = load_teacher(FLAGS.base_ckpt, torch.device('cpu'))
    adopt(img_size=teacher.img_size, **teacher.arch)
    return teacher, images_for(teacher.network)


def new_student(teacher):
    """(network, schedule) of a student: a copy of the teacher, with every second of its times.

    Its output type becomes the value of --mean_type, which the run records.
    """
    mean_type = student_type(teacher)
    if mean_type != teacher.diffusion.mean_type:
        distributed.print0(f'note: the student predicts {mean_type} (--mean_type), its teacher '
                           f'{teacher.diffusion.mean_type}: it learns that in this stage.')
    adopt(mean_type=mean_type)
    return teacher.student(mean_type)


def student_type(teacher):
    """What a student predicts: --mean_type, if it is given; else v after eps, which diverges.

    A teacher whose checkpoint does not name its output was itself read by --mean_type.
    Raises:
        UserError: eps, on a schedule that ends with alpha 0.
    """
    d, entries = teacher.diffusion, teacher.entries
    if 'mean_type' not in entries and 'T' in entries:
        return d.mean_type
    found = FLAGS.mean_type if given('mean_type') else d.mean_type.replace('epsilon', 'v')
    if found == 'epsilon' and d.alpha[-1] == 0:
        raise UserError(f'--mean_type is epsilon and the schedule of {teacher.file} ends with '
                        f'alpha 0, where eps does not determine the image; set --mean_type=v')
    return found


# A run of a diffusion model

def start_run(method, net, diffusion, dataset, logdir, total_steps, *, use='net_model',
              teacher=None, classifier=None, memory=None, facts=None):
    """A `Run` that trains `net` on the schedule `diffusion`.

    Args:
        method, net, dataset, logdir, total_steps, use, facts: see `Run`.
        teacher: `Model` to distil; its file must not be the one that this run writes.
        classifier: frozen network whose features are compared.
        memory: `MemoryP2P`, whose head is trained.
    """
    device, inputs, facts = diffusion.alpha.device, {}, dict(facts or {})
    title, amp = f'{method} T={diffusion.T}', choose(FLAGS.amp, device)
    if teacher:
        if Path(teacher.file).resolve() == (Path(logdir) / 'ckpt.pt').resolve():
            raise UserError(f'--logdir {logdir} is the folder of the teacher (--base_ckpt), which '
                            f'would be overwritten; choose another --logdir')
        title = f'{method.upper()} {2 * diffusion.T}->{diffusion.T}'
        facts.update(teacher_steps=2 * diffusion.T, student_steps=diffusion.T)
        inputs['teacher'] = checkpoint.digest(teacher.network.state_dict())
        if amp != choose(FLAGS.amp, device, diffusion.T):
            amp = choose(FLAGS.amp, device, diffusion.T)
            distributed.print0(f'note: --amp auto means float32 here: a student with {diffusion.T} '
                               f'steps needs its precision.')
    if classifier:
        inputs['classifier'] = checkpoint.digest(classifier.state_dict())
    start_left = FLAGS.ema_decay ** total_steps
    if start_left > .01:
        distributed.print0(f'note: the average (--ema_decay {FLAGS.ema_decay}) will hold '
                           f'{100 * start_left:.0f} % of the weights it starts from after '
                           f'{total_steps} steps; for 1 % set --ema_decay '
                           f'{.01 ** (1 / total_steps):.3g}.')
    x_T = seeding.noise_of_images(FLAGS.seed, range(FLAGS.sample_size),
                                  (3, FLAGS.img_size, FLAGS.img_size), 'cpu')
    entries = dict(net.entries, x_T=x_T)
    if use != 'net_model':
        entries['use'] = use
    return Run(method, net, dataset, logdir, total_steps, title=title, ema_decay=FLAGS.ema_decay,
               use=use, head=memory and memory.project_head,
               also_saved={'memory': memory} if memory else None, fixed=diffusion.arguments(),
               entries=entries, inputs=inputs, amp=amp, facts=facts)


def draw(batch_size, shape, low, high, generator):
    """t (B,) uniform in low..high (inclusive) and eps (B, *shape) standard normal.

    Drawn for the total batch, so that a sample's draw does not depend on the number of processes.
    """
    device = generator.device
    t = torch.randint(low, high + 1, (batch_size,), generator=generator, device=device)
    return t, torch.randn((batch_size, *shape), generator=generator, device=device)


def noisy_parts(run, diffusion, t_min=1):
    """Yield the parts of a step with `part.t` (B,) on the base grid and `part.eps` like x_0.

    A row of the total batch is a function of (seed, step, row) alone.
    Args:
        t_min: smallest time, in steps of the model; the largest is T.
    """
    rng = run.generator(seeding.NOISE, diffusion.T, run.step)
    shape = 3, FLAGS.img_size, FLAGS.img_size
    t_all, eps_all = draw(FLAGS.batch_size, shape, t_min, diffusion.T, rng)
    for part in run.parts():
        part.t, part.eps = diffusion.visited[t_all[part.rows]], eps_all[part.rows]
        yield part


@torch.no_grad()
def sample_grid(run, diffusion):
    """Draw a grid from fixed noise and labels on the first process, every --sample_step steps."""
    if not due(run.step, FLAGS.sample_step) or not distributed.is_main() or stop.received:
        return      # a run that is asked to stop saves first
    network, x_T = run.sampled, run.entries['x_T'].to(run.device)
    y = torch.arange(len(x_T), device=run.device) % network.class_num
    training = network.training
    network.eval()
    with run.autocast():
        images = diffusion.sample(network, x_T, y=y if network.conditional else None)
    network.train(training)
    run.log.grid(run.step, f'{run.logdir}/sample/{run.step}.png', images)
