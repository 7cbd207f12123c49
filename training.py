"""What the diffusion scripts share: their flags, times and noise, sample grids, students."""

from pathlib import Path

import torch
from absl import flags

from formats.load import check_flags, load_model, load_teacher
from runtime import checkpoint, distributed, seeding
from runtime.cli import UserError
from runtime.flags import (adopt, define_data_flags, define_device_flags, define_network_flags,
                           define_run_flags, define_teacher_steps, given)
from runtime.guard import stop
from runtime.optim import adam
from runtime.precision import choose
from runtime.run import Run, due, training_data

FLAGS = flags.FLAGS
LEAST_STEPS = 16        # of a teacher that counts as not distilled
START_LEFT = .01        # share of its start in an average that is worth a note


# Flags

def define_training_flags(lr=5e-5, wd=0., total_steps=10000, warmup=0, ema_decay=0., dropout=0.):
    """All that the diffusion scripts share: data, network, optimisation, log, devices."""
    define_data_flags()
    define_network_flags(dropout)
    define_device_flags()
    define_run_flags(lr, wd)
    flags.DEFINE_integer('total_steps', total_steps, 'optimiser steps', 1)
    flags.DEFINE_integer('warmup', warmup, 'steps of linear warm-up', 0)
    flags.DEFINE_float('ema_decay', ema_decay, 'decay of averaged weights; 0: none', 0., 1 - 1e-9)
    flags.DEFINE_string('logdir', None, 'folder of this run: checkpoint, samples, log')
    flags.DEFINE_integer('sample_size', 64, 'images in the sample grid', 1, 4096)
    flags.DEFINE_integer('sample_step', 1000, 'steps between sample grids; 0: none', 0)


def define_distillation_flags():
    """What PD.py and train_rdd.py share in addition: the teacher, and how far to halve."""
    define_training_flags()
    define_teacher_steps()
    flags.DEFINE_string('base_ckpt', None, 'folder or file of the teacher, or folder of diffusers')
    flags.DEFINE_integer('until', 0, 'halve down to so many steps, each stage into --logdir/STEPS '
                         '(for 2 and 1, twice the --total_steps); 0: one halving into --logdir', 0)


def halvings(T, until, base_ckpt):
    """[T / 2, T / 4, .., until]: the steps of all students of a teacher with T steps."""
    steps = [T]
    while steps[-1] > until and steps[-1] % 2 == 0:
        steps.append(steps[-1] // 2)
    if steps[-1] != until or T == until:
        raise UserError(f'--until {until} is not reached by halving the {T} steps of {base_ckpt}; '
                        f'choose another, or let it count as fewer, as with --teacher_steps 128')
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
        total_steps = FLAGS.total_steps * (2 if steps <= 2 else 1)
        later = Path(FLAGS.logdir) / str(steps // 2)
        done = checkpoint.read_newest(folder) if (later / 'ckpt.pt').exists() else None
        if done and done.get('step') in range(total_steps):
            raise UserError(f'--total_steps {FLAGS.total_steps} would go on with the training of '
                            f'the student in {folder}, but {later} holds a student of it already; '
                            f'give the --total_steps of before, or choose another --logdir')
        yield before, folder, total_steps
        distributed.barrier()
        before = folder


# Data and networks

def images_for(network):
    """The training images; a class-conditional network must have as many classes as they have."""
    dataset = training_data()
    if network.conditional and dataset.num_classes != network.class_num:
        raise UserError(f'--dataset {dataset.name} has {dataset.num_classes} classes and the '
                        f'network is for {network.class_num} (--class_num); use its own data set')
    return dataset


def teacher_and_images():
    """The `Model` in --base_ckpt, on the CPU, and the training images.

    Flags that describe the network, which the run records, take the values of the teacher.
    """
    teacher = load_teacher(FLAGS.base_ckpt, torch.device('cpu'))
    adopt(img_size=teacher.img_size, **teacher.arch)
    return teacher, images_for(teacher.network)


def student_and_teacher():
    """The `Model`s in --base_ckpt, with few steps, and in --teacher_ckpt, with many, on the CPU.

    Both must make images of one kind, at times on one grid; what they predict may differ.
    """
    how = dict(dropout=FLAGS.dropout, mean_type=FLAGS.mean_type, img_size=FLAGS.img_size)
    student = load_model(FLAGS.base_ckpt, steps=FLAGS.student_steps, **how)
    teacher = load_model(FLAGS.teacher_ckpt, steps=FLAGS.teacher_steps, **how)
    if student.diffusion.T not in (1, 2, 4):
        raise UserError(f'--base_ckpt {FLAGS.base_ckpt} has {student.diffusion.T} steps, expected '
                        f'a student of 1, 2 or 4; halve it by PD.py, or set --student_steps 1')
    if FLAGS.student_steps and student.diffusion.mean_type == 'epsilon':
        raise UserError(f'--base_ckpt {FLAGS.base_ckpt} predicts eps, from which one step makes no '
                        f'image; halve it by PD.py first, whose students predict v')
    if teacher.diffusion.T < LEAST_STEPS:
        raise UserError(f'--teacher_ckpt {FLAGS.teacher_ckpt} has {teacher.diffusion.T} steps, '
                        f'expected the teacher before it was distilled, with {LEAST_STEPS} or more')
    for name in ('img_size', 'conditional', 'class_num', 'schedule', 'N'):
        ours, theirs = ({**vars(model), **model.arch, **vars(model.diffusion)}[name]
                        for model in (student, teacher))
        if ours != theirs:
            raise UserError(f'{name} is {str(ours)[:60]} in --base_ckpt and {str(theirs)[:60]} in '
                            f'--teacher_ckpt; give its student, and --teacher_steps as it was made')
    check_flags(student)
    adopt(img_size=student.img_size, mean_type=student.diffusion.mean_type, **student.arch)
    return student, teacher


def new_student(teacher):
    """(network, schedule) of a student: a copy of the teacher, with every second of its times.

    It predicts --mean_type, if that is given; else v after a teacher of eps, with which students
    diverge, or what its teacher does. The run records it as --mean_type.
    """
    d, entries = teacher.diffusion, teacher.entries
    if 'mean_type' not in entries and 'T' in entries:
        mean_type = d.mean_type     # the teacher does not name its output: it is --mean_type
    elif given('mean_type'):
        mean_type = FLAGS.mean_type
    else:
        mean_type = d.mean_type.replace('epsilon', 'v')
    if mean_type == 'epsilon' and d.alpha[-1] == 0:
        raise UserError(f'--mean_type is epsilon and the schedule of {teacher.file} ends with '
                        f'alpha 0, where eps does not determine the image; set --mean_type=v')
    if mean_type != d.mean_type:
        distributed.print0(f'note: the student predicts {mean_type} (--mean_type), its teacher '
                           f'{d.mean_type}: it learns that in this stage.')
    adopt(mean_type=mean_type)
    return teacher.trainable(), d.with_steps(d.T // 2, mean_type)


# A run of a diffusion model

def start_run(method, net, diffusion, dataset, logdir, total_steps, *, use='net_model',
              teacher=None, start=None, classifier=None, memory=None, also_saved=None,
              optimizer=adam):
    """A `Run` that trains `net` on the schedule `diffusion`; for other arguments see `Run`.

    Args:
        teacher: `Model` to distil; its file must not be the one that this run writes.
        start: `Model` whose weights the student starts from, if it is not the teacher; likewise.
        classifier: frozen network whose features are compared.
        memory: `MemoryP2P`, whose head is trained.
    """
    device, inputs = diffusion.alpha.device, {}
    title = f'{method} T={diffusion.T}'
    amp = choose(FLAGS.amp, device, steps=diffusion.T if teacher else 0)
    for name, model in dict(teacher=teacher, start=start).items():
        if model is None:
            continue
        if Path(model.file).resolve() == (Path(logdir) / 'ckpt.pt').resolve():
            raise UserError(f'--logdir {logdir} is the folder of the {name} that is given '
                            f'(--base_ckpt or --teacher_ckpt); choose another, to keep it')
        inputs[name] = checkpoint.digest(model.network.state_dict())
    if teacher:
        inputs['teacher_steps'] = teacher.diffusion.T
        title = f'{method.upper()} {teacher.diffusion.T}->{diffusion.T}'
        if amp != choose(FLAGS.amp, device):
            distributed.print0(f'note: --amp auto means float32 here: a student with {diffusion.T} '
                               f'steps needs its precision.')
    if classifier:
        inputs['classifier'] = checkpoint.digest(classifier.state_dict())
    start_left = FLAGS.ema_decay ** total_steps
    if start_left > START_LEFT:
        distributed.print0(f'note: after {total_steps} steps, the average will hold '
                           f'{100 * start_left:.0f} % of the weights it starts from; for 1 % set '
                           f'--ema_decay {START_LEFT ** (1 / total_steps):.3g}.')
    if FLAGS.warmup > total_steps / 2:
        distributed.print0(f'note: --warmup {FLAGS.warmup} is more than half of the {total_steps} '
                           f'steps: --lr is reached late or never; lower it.')
    x_T = seeding.noise_of_images(FLAGS.seed, range(FLAGS.sample_size),
                                  (3, FLAGS.img_size, FLAGS.img_size), 'cpu')
    entries = dict(net.entries, x_T=x_T)
    if use != 'net_model':
        entries['use'] = use
    return Run(method, net, dataset, logdir, total_steps, title=title, ema_decay=FLAGS.ema_decay,
               use=use, head=memory and memory.project_head,
               also_saved={'memory': memory} if memory else also_saved, optimizer=optimizer,
               fixed=diffusion.arguments(), entries=entries, inputs=inputs, amp=amp)


def noisy_parts(run, diffusion, t_min=1):
    """Yield the parts of a step with `part.t` (B,) on the base grid and `part.eps` like x_0.

    t is uniform in t_min .. T steps of the model, eps standard normal. A row of the total batch is
    a function of (seed, step, row) alone, whatever the number of processes and parts.
    """
    rng = run.generator(seeding.NOISE, diffusion.T, run.step)
    size, shape = FLAGS.batch_size, (3, FLAGS.img_size, FLAGS.img_size)
    t_all = torch.randint(t_min, diffusion.T + 1, (size,), generator=rng, device=rng.device)
    eps_all = torch.randn((size, *shape), generator=rng, device=rng.device)
    for part in run.parts():
        part.t, part.eps = diffusion.visited[t_all[part.rows]], eps_all[part.rows]
        yield part


@torch.no_grad()
def sample_grid(run, diffusion):
    """Let the first process draw a grid from fixed noise and labels, every --sample_step steps."""
    if not due(run.step, FLAGS.sample_step):
        return
    if distributed.is_main() and not stop.received:     # a run that is asked to stop saves first
        draw_grid(run, diffusion)
    distributed.barrier()       # on the hosts, which wait for hours; NCCL gives up earlier


def draw_grid(run, diffusion):
    """Draw by the network itself while the average still holds much of what it started from.

    14 % of untrained weights, as after 2,000 steps with --ema_decay 0.999, give noise.
    """
    average = run.use == 'ema_model' and FLAGS.ema_decay ** run.step < START_LEFT
    network = run.ema if average else run.net.module
    x_T = run.entries['x_T'].to(run.device)
    y = torch.arange(len(x_T), device=run.device) % network.class_num
    training = network.training
    network.eval()
    # four micro-batches at once, which fit as no activations are kept
    size = 4 * distributed.share(FLAGS.batch_size, FLAGS.grad_accum)
    with run.autocast():
        images = torch.cat([
            diffusion.sample(network, z, y=labels if network.conditional else None)
            for z, labels in zip(x_T.split(size), y.split(size))])
    network.train(training)
    run.log.grid(run.step, f'{run.logdir}/sample/{run.step}.png', images)
