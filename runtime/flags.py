"""Flags that several scripts share, and checks of their values.

`define_*_flags` are called at the top of a script, with the defaults of that script. Other modules
get values as arguments; what they need to know of the flags themselves, they ask here.
"""

import sys
import textwrap
from pathlib import Path

from absl import flags

from runtime.cli import UserError, launcher_rank, output, own_flags

FLAGS = flags.FLAGS
MEAN_TYPES = ['xstart', 'epsilon', 'v']


def given(name):
    """Whether the user set the flag, on the command line or in a flagfile."""
    return FLAGS[name].present > 0


def require(**names):
    """Refuse to start without these flags: `require(logdir='where results go')`."""
    for name, meaning in names.items():
        if not getattr(FLAGS, name):
            raise UserError(f'--{name} is missing: {meaning}')


NO_EFFECT = dict(
    num_gpus='the launcher says how many processes run',
    distributed='the launcher says how many processes run',
    var_type='DDIM sampling is deterministic and has no variance')


def without_effect(**reasons):
    """One line for every flag that the user set and that changes nothing, with the reason."""
    return [f'note: --{name} has no effect: {reason}.'
            for name, reason in dict(NO_EFFECT, **reasons).items() if name in FLAGS and given(name)]


def folder_flag():
    """The flag that names the folder of a run in this script, for messages."""
    return '--logdir' if 'logdir' in FLAGS else '--result_path'


def resolved(apart=()):
    """The resolved configuration as the text of a flagfile, one flag per line.

    Args:
        apart: names of flags to leave out.
    """
    lines = [flag.serialize() for flag in own_flags() if flag.name not in ('local_rank', *apart)]
    return '\n'.join(line for line in lines if line)


def adopt(**values):
    """Set flags to what a checkpoint has, so that the resolved flags, which runs record, are right.

    Names that are no flags of this script are left out.
    """
    for name, value in values.items():
        if name in FLAGS:
            setattr(FLAGS, name, value)


# What happens to a resumed run whose flag has another value than before; others: a note.
# Free: paths, intervals, and flags whose effect other checks cover.
ON_RESUME = dict(
    dict.fromkeys(('dataset', 'img_size', 'mean_type', 'batch_size', 'seed', 'model', 'epoch',
                   'recipe', 'normalize05'), 'refuse'),
    **dict.fromkeys(('logdir', 'base_ckpt', 'teacher_steps', 'classifier_path', 'data_root',
                     'result_path', 'num_workers', 'gpu_id', 'num_gpus', 'distributed',
                     'sample_size', 'sample_step', 'save_step', 'log_step', 'keep', 'until',
                     'max_bad_steps', 'max_steps', 'skip_bad_images', 'ch', 'ch_mult', 'attn',
                     'num_res_blocks', 'conditional', 'class_num', 'var_type', 'T', 'time_scale'),
                    'free'))


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
    """Compare the flags of a run to resume with those of now, as `ON_RESUME` demands.

    Args:
        text: the resolved flags in its checkpoint.
        logdir: its folder, for messages.
    Raises:
        UserError: a flag has changed that must not.
    """
    before, now = parsed(text), parsed(resolved())
    changed = [name for name in now if name in before and now[name] != before[name]
               and ON_RESUME.get(name) != 'free']
    for name in changed:
        if ON_RESUME.get(name) == 'refuse':
            raise UserError(f'--{name} is {now[name]} and the run in {logdir} was started '
                            f'with {before[name]}, which cannot change; give the same, or choose '
                            f'another {folder_flag()}')
    if changed and launcher_rank() == 0:
        output('note: resuming with other flags than before: ' + ', '.join(
            f'--{name}={now[name]} (was {before[name]})' for name in changed))


def check_network():
    """Refuse network flags that no U-Net can have."""
    levels, halvings = len(FLAGS.ch_mult), 2 ** (len(FLAGS.ch_mult) - 1)
    if FLAGS.T * FLAGS.time_scale > 10 ** 6:
        raise UserError(f'--T {FLAGS.T} times --time_scale {FLAGS.time_scale} gives a grid of '
                        f'{FLAGS.T * FLAGS.time_scale:,} times, expected at most 1,000,000')
    if FLAGS.ch % 32:
        raise UserError(f'--ch is {FLAGS.ch}, expected a multiple of 32 (group norm has 32 groups)')
    if min(FLAGS.ch_mult) < 1 or max(FLAGS.ch_mult) > 64:
        raise UserError(f'--ch_mult is {FLAGS.ch_mult}, expected numbers from 1 to 64')
    if FLAGS.img_size % halvings:
        raise UserError(f'--img_size is {FLAGS.img_size}, expected a multiple of {halvings}: the '
                        f'network halves it {levels - 1} times (--ch_mult {FLAGS.ch_mult})')
    if not set(FLAGS.attn) <= set(range(levels)):
        raise UserError(f'--attn is {FLAGS.attn}, expected resolutions from 0 to {levels - 1}, as '
                        f'many as --ch_mult has (a flag repeated after a flagfile appends to it)')


def announce(device, start, **quantities):
    """Print the resolved configuration and where the run starts; first process only."""
    if launcher_rank():
        return
    words = ' '.join(resolved().split('\n'))
    output(textwrap.fill(f'{Path(sys.argv[0]).name} on {device}: {words}', 100,
                         subsequent_indent='  ', break_on_hyphens=False, break_long_words=False))
    for line in without_effect():
        output(line)
    output(f'{"resuming at" if start else "starting at"} step {start}; '
           + ', '.join(f'{name} {value:,}' for name, value in quantities.items()))


def define_device_flags():
    """Which devices; and the flags that launchers and old command lines carry."""
    flags.DEFINE_string('gpu_id', None, 'GPUs to use, as in 0,1,2,3; none: all that are visible')
    flags.DEFINE_alias('gpu-id', 'gpu_id')
    flags.DEFINE_integer('num_gpus', 1, 'ignored: the launcher says how many processes there are')
    flags.DEFINE_bool('distributed', False, 'ignored: the launcher says how many processes there '
                      'are')
    flags.DEFINE_integer('local_rank', 0, 'set by torch.distributed.launch; the environment counts')
    flags.DEFINE_alias('local-rank', 'local_rank')
    flags.DEFINE_enum('amp', 'none', ['none', 'bf16', 'auto'], 'precision of the networks: float32,'
                      ' bfloat16 autocast, or bfloat16 where the hardware has units for it (GPUs '
                      'since Ampere, CPUs with AMX or AVX512-BF16); losses and schedules stay in '
                      'float32; auto distils students with more than 64 steps in float32')
    flags.DEFINE_enum('tf32', 'conv', ['none', 'conv', 'all'], 'GPUs since Ampere: what of float32 '
                      'is computed with inputs rounded to TF32, nothing, convolutions, or matrix '
                      'products as well; the networks that score never are')
    flags.DEFINE_bool('compile', False, 'torch.compile the networks: a slow start (minutes for '
                      'large networks), then faster steps; needs torch 2.2 and a C++ compiler')


def define_network_flags(dropout=0.):
    """The U-Net. A checkpoint brings its own; what is given here is checked against it."""
    flags.DEFINE_integer('ch', 128, 'base channels of the U-Net', lower_bound=1, upper_bound=4096)
    flags.DEFINE_multi_integer('ch_mult', [1, 2, 2, 2], 'channel multiplier, one per resolution '
                               '(repeat the flag; it appends to a flagfile)')
    flags.DEFINE_multi_integer('attn', [1], 'resolutions with attention, counted from 0')
    flags.DEFINE_integer('num_res_blocks', 2, 'residual blocks per resolution', lower_bound=1,
                         upper_bound=64)
    flags.DEFINE_float('dropout', dropout, 'dropout rate', lower_bound=0., upper_bound=.999)
    flags.DEFINE_integer('img_size', 32, 'height and width of the images', lower_bound=1,
                         upper_bound=4096)
    flags.DEFINE_bool('conditional', False, 'class-conditional network')
    flags.DEFINE_integer('class_num', 10, 'number of classes', lower_bound=1, upper_bound=100000)
    flags.DEFINE_enum('mean_type', 'xstart', MEAN_TYPES, 'what the network predicts: x_0, eps or '
                      'v = alpha eps - sigma x_0; if it is not given, a student of an eps teacher '
                      'predicts v, any other student what its teacher does')
    flags.DEFINE_enum('var_type', 'fixedlarge', ['fixedlarge', 'fixedsmall'],
                      'ignored: DDIM sampling is deterministic and has no variance')


def define_teacher_steps():
    """For scripts that read a model which this project may not have trained."""
    flags.DEFINE_integer('teacher_steps', 0, 'DDIM steps that the given model is taken to have, as '
                         '128 of 1000; 0: as many as it says', lower_bound=0)


def define_data_flags():
    """Where images come from and how many make a step."""
    flags.DEFINE_string('dataset', 'cifar10', 'digits, fashion_mnist, cifar10, imagenet64 or '
                        'folder')
    flags.DEFINE_string('data_root', './data', 'folder of the data set; for "folder" and '
                        '"imagenet64" the folder that holds train/<class>/ or <class>/')
    flags.DEFINE_integer('batch_size', 128, 'images per step, over all processes', lower_bound=1,
                         upper_bound=1000000)
    flags.DEFINE_integer('num_workers', 4, 'processes that decode image files', lower_bound=0)
    flags.DEFINE_bool('skip_bad_images', False, 'read every image file once at the start, name '
                      'those that cannot be read and leave them out')


def define_run_flags(lr, wd, grad_clip=1., save_step=1000, keep=1, log_step=50, seed=0):
    """What every training has: rate, parts, checkpoints, log, seed."""
    flags.DEFINE_float('lr', lr, 'learning rate', lower_bound=0.)
    flags.DEFINE_float('wd', wd, 'weight decay', lower_bound=0.)
    flags.DEFINE_float('grad_clip', grad_clip, 'largest norm of the gradient; 0: no clipping',
                       lower_bound=0.)
    flags.DEFINE_integer('grad_accum', 1, 'parts in which each process works through its share of '
                         'the batch, one after another', lower_bound=1)
    flags.DEFINE_integer('save_step', save_step, 'steps between checkpoints; 0: at the end, or '
                         'in classifier/train.py after each epoch',
                         lower_bound=0)
    flags.DEFINE_integer('keep', keep, 'earlier checkpoints to keep, as ckpt_STEP.pt; 0: none',
                         lower_bound=0)
    flags.DEFINE_integer('max_bad_steps', 20, 'stop after so many steps in a row whose loss or '
                         'gradient is not finite (none of them is applied); looked at when a log '
                         'line is due; 0: never', lower_bound=0)
    flags.DEFINE_integer('log_step', log_step, 'steps between log lines', lower_bound=1)
    flags.DEFINE_integer('seed', seed, 'seed of everything random', lower_bound=min(seed, 0))
