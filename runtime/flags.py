"""Flags that several scripts share, with the defaults of each, and checks of their values."""

import sys
import textwrap
from pathlib import Path

from absl import flags

from runtime.cli import UserError, own_flags, print0

FLAGS = flags.FLAGS
MEAN_TYPES = ['xstart', 'epsilon', 'v']
DATASETS = ['digits', 'fashion_mnist', 'cifar10', 'imagenet64', 'folder']


def given(name):
    """Whether the user set the flag, on the command line or in a flagfile."""
    return FLAGS[name].present > 0


def require(**names):
    """Refuse to start without these flags: `require(logdir='where results go')`."""
    for name, meaning in names.items():
        if not getattr(FLAGS, name):
            raise UserError(f'--{name} is missing: {meaning}')


# Flags of the released code and of old launchers that are ignored, and the reason
IGNORED = dict(
    num_gpus='the launcher decides how many processes run',
    distributed='the launcher decides how many processes run',
    local_rank='the environment that the launcher sets counts',
    var_type='DDIM sampling is deterministic and has no variance')


def without_effect(**reasons):
    """Name the flags that the user set and that change nothing: `without_effect(name=reason)`."""
    for name, reason in reasons.items():
        if name in FLAGS and given(name) and name != 'local_rank':      # not set by the user
            print0(f'note: --{name} has no effect: {reason}.')


def without_switch(**switches):
    """Name the flags that are set while their switch is off: `without_switch(beta='alpha')`."""
    for name, switch in switches.items():
        if given(name) and not FLAGS[switch].value:
            print0(f'note: --{name} has no effect without --{switch}.')


def folder_flag():
    """The flag that names the folder of a run in this script, for messages."""
    return '--logdir' if 'logdir' in FLAGS else '--result_path'


def resolved(apart=()):
    """The resolved configuration, without the flags `apart`, as the text of a flagfile."""
    lines = [flag.serialize() for flag in own_flags() if flag.name not in (*IGNORED, *apart)]
    return '\n'.join(filter(None, lines))


def adopt(**values):
    """Set flags, where this script has them, to the values of a checkpoint, for the record."""
    for name, value in values.items():
        if name in FLAGS:
            setattr(FLAGS, name, value)


# Flags that a resumed run cannot change, and those that it may change without a note: paths,
# intervals, and flags whose effect other checks cover.
FIXED = {'dataset', 'img_size', 'mean_type', 'batch_size', 'seed', 'model', 'epoch', 'recipe',
         'normalize05'}
FREE = {'logdir', 'base_ckpt', 'teacher_ckpt', 'teacher_steps', 'classifier_path', 'data_root',
        'result_path', 'num_workers', 'gpu_id', 'sample_size', 'sample_step', 'save_step',
        'log_step', 'keep', 'until', 'max_bad_steps', 'max_steps', 'skip_bad_images', 'ch',
        'ch_mult', 'attn', 'num_res_blocks', 'conditional', 'class_num', 'T', 'time_scale'}


def parsed(text):
    """{name: value} of the text of resolved flags; of booleans 'true' or 'false'."""
    found = {}
    for line in text.splitlines():
        name, equals, value = line.lstrip('-').partition('=')
        if not equals:
            value = 'true' if name in FLAGS else 'false'
            name = name if name in FLAGS else name[2:]
        found[name] = value
    return found


def compare_with(text, logdir):
    """Compare the resolved flags of a run with those of now; UserError if a `FIXED` one differs."""
    before, now = parsed(text), parsed(resolved())
    changed = [name for name in now if now[name] != before.get(name, now[name])]
    for name in changed:
        if name in FIXED:
            raise UserError(f'--{name} is {now[name]} and the run in {logdir} was started with '
                            f'{before[name]}; give the same, or choose another {folder_flag()}')
    changed = [name for name in changed if name not in FREE]
    if changed:
        print0('note: resuming with other flags than before: ' + ', '.join(
            f'--{name}={now[name]} (was {before[name]})' for name in changed))


def check_network():
    """Refuse network flags that no U-Net can have."""
    levels, halvings = len(FLAGS.ch_mult), 2 ** (len(FLAGS.ch_mult) - 1)
    if FLAGS.ch % 32:
        raise UserError(f'--ch is {FLAGS.ch}, expected a multiple of 32 (group norm has 32 groups)')
    if FLAGS.img_size % halvings:
        raise UserError(f'--img_size is {FLAGS.img_size}, expected a multiple of {halvings}: the '
                        f'network halves it {levels - 1} times (--ch_mult {FLAGS.ch_mult})')
    if max(FLAGS.attn, default=0) >= levels:
        raise UserError(f'--attn is {FLAGS.attn}, expected resolutions from 0 to {levels - 1}, as '
                        f'many as --ch_mult has (a flag repeated after a flagfile appends to it)')


def announce(device, start, title, images):
    """Print the resolved configuration, and which run starts where, on how many images."""
    words = ' '.join(resolved().split('\n'))
    print0(textwrap.fill(f'{Path(sys.argv[0]).name} on {device}: {words}', 100,
                         subsequent_indent='  ', break_on_hyphens=False, break_long_words=False))
    without_effect(**IGNORED)
    print0(f'{"resuming" if start else "starting"} at step {start}; {title}, {images:,} images')


def define_device_flags():
    """Which devices; and the flags that launchers and old command lines carry."""
    flags.DEFINE_string('gpu_id', None, 'GPUs to use, as in 0,1,2,3; none: all that are visible')
    flags.DEFINE_alias('gpu-id', 'gpu_id')
    for name, reason in IGNORED.items():
        define = flags.DEFINE_bool if name == 'distributed' else flags.DEFINE_string
        define(name, None, f'ignored: {reason}')
    flags.DEFINE_alias('local-rank', 'local_rank')
    flags.DEFINE_enum('amp', 'none', ['none', 'bf16', 'auto'], 'networks in float32 or bfloat16; '
                      'auto: bfloat16 where the hardware has units for it (GPUs since Ampere, CPUs '
                      'with AMX or AVX512-BF16), but not for students with more than 64 steps')
    flags.DEFINE_enum('tf32', 'conv', ['none', 'conv', 'all'], 'GPUs since Ampere: round inputs to '
                      'TF32 in nothing, convolutions, or matrix products as well; never in scores')
    flags.DEFINE_bool('compile', False, 'torch.compile the networks: a slow start; the gain on '
                      'GPUs is not measured; needs torch 2.2 and a C++ compiler')


def define_network_flags(dropout=0.):
    """The U-Net. A checkpoint brings its own; what is given here is checked against it."""
    flags.DEFINE_integer('ch', 128, 'base channels of the U-Net', 1, 4096)
    flags.DEFINE_multi_integer('ch_mult', [1, 2, 2, 2], 'channel multiplier, one per resolution '
                               '(repeat the flag; it appends to a flagfile)', 1, 64)
    flags.DEFINE_multi_integer('attn', [1], 'resolutions with attention, counted from 0', 0)
    flags.DEFINE_integer('num_res_blocks', 2, 'residual blocks per resolution', 1, 64)
    flags.DEFINE_float('dropout', dropout, 'dropout rate', 0., .999)
    flags.DEFINE_integer('img_size', 32, 'height and width of the images', 1, 4096)
    flags.DEFINE_bool('conditional', False, 'class-conditional network')
    flags.DEFINE_integer('class_num', 10, 'number of classes', 1, 100000)
    flags.DEFINE_enum('mean_type', 'xstart', MEAN_TYPES, 'what the network predicts: x_0, eps or '
                      'v = alpha eps - sigma x_0; students: as their teacher, but v after eps')


def define_teacher_steps():
    flags.DEFINE_integer('teacher_steps', 0, 'DDIM steps that the given model (in trainings, the '
                         'teacher) is taken to have, as 128 of 1000; 0: all', 0)


def define_data_flags():
    """Where images come from and how many make a step."""
    flags.DEFINE_enum('dataset', 'cifar10', DATASETS, 'images to use')
    flags.DEFINE_string('data_root', './data', 'folder of the data set; for "folder" and '
                        '"imagenet64" the folder that holds train/<class>/ or <class>/')
    flags.DEFINE_integer('batch_size', 128, 'images per step, over all processes; '
                         'in score/get_npz.py of each', 1, 1000000)
    flags.DEFINE_integer('num_workers', 4, 'processes that read images ahead; 0: none, and '
                         'one process decodes image files, else all cores do', 0)
    flags.DEFINE_bool('skip_bad_images', False, 'name and leave out images that cannot be read')


def define_image_size(least):
    flags.DEFINE_integer('img_size', None, 'height and width of the images; none: 8 for digits, 28 '
                         'for fashion_mnist, 64 for imagenet64, 32 for others', least, 4096)


def define_run_flags(lr, wd, grad_clip=1., save_step=1000, keep=1, log_step=50, seed=0):
    """What every training has: rate, parts, checkpoints, log, seed."""
    flags.DEFINE_float('lr', lr, 'learning rate', 0.)
    flags.DEFINE_float('wd', wd, 'weight decay', 0.)
    flags.DEFINE_float('grad_clip', grad_clip, 'largest norm of the gradient; 0: any', 0.)
    flags.DEFINE_integer('grad_accum', 1, 'parts of its batch that a process works on in turn', 1)
    flags.DEFINE_integer('save_step', save_step, 'steps between checkpoints; 0: at the end, or '
                         'in classifier/train.py after each epoch', 0)
    flags.DEFINE_integer('keep', keep, 'earlier checkpoints to keep, as ckpt_STEP.pt', 0)
    flags.DEFINE_integer('max_bad_steps', 20, 'stop after so many steps in a row that were not '
                         'applied, since loss or gradient was not finite; 0: never', 0)
    flags.DEFINE_integer('log_step', log_step, 'steps between log lines', 1)
    flags.DEFINE_integer('seed', seed, 'seed of everything random', min(seed, 0))
