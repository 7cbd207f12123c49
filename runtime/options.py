"""Flags that several scripts share, defined once; and how a script starts, explains and fails.

`define_*_flags` are called at the top of a script and take that script's defaults. Nothing here
is read by the modules: a function gets what it needs as arguments.
"""

import os
import sys
import textwrap
import time
from pathlib import Path

from absl import flags

FLAGS = flags.FLAGS
ROOT = Path(__file__).resolve().parent.parent
HELP = ('--help', '-h', '-help', '--helpshort', '--helpfull')
ARCHITECTURE = ('ch', 'ch_mult', 'attn', 'num_res_blocks', 'conditional', 'class_num', 'img_size')


class UserError(Exception):
    """A mistake of the user (code 2) or of the environment (code 1), told in one sentence."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def anchored(path):
    """A relative `path` as seen from the repository root, whatever the working directory."""
    return ROOT / Path(path).expanduser()


def find(path):
    """A `path` to read: from the working directory if it exists there, else from the root."""
    path = Path(path).expanduser()
    return path if path.exists() else anchored(path)


def run(main, words=False):
    """Parse the command line, run `main()`, turn mistakes into one sentence and an exit code.

    `words`: the script takes words that are not flags; they are handed to `main(words)`.
    """
    if any(word in HELP for word in sys.argv[1:]):
        print(usage())
        sys.exit(0)
    try:
        rest = FLAGS(without_strangers(sys.argv))[1:]
        if rest and not words:
            raise UserError(f'unexpected word "{rest[0]}" on the command line; '
                            f'flags are written --name value or --name=value (see --help)')
        main(rest) if words else main()
        leave(0)
    except flags.Error as error:
        fail(' '.join(str(error).split()) + ' (see --help)', 2)
    except UserError as error:
        fail(str(error), error.code)
    except KeyboardInterrupt:
        fail('interrupted', 130)
    except OSError as error:        # a disk that is full or gone
        fail(f'{error.filename or "a file"} could not be read or written ({error.strerror or error}'
             f'); mend that and run the same command again', 1)
    except RuntimeError as error:
        if 'Connection' not in str(error) or int(os.environ.get('WORLD_SIZE', 1)) == 1:
            raise
        reason = str(error).split('] ')[-1].split('. ')[0]
        fail(f'another process has ended, see what it said ({reason})', 1)


# Flags of the scripts of this project, of the released code, RCFD and pytorch-ddpm: a flagfile
# that one script wrote may be fed to another, and says at the start what it leaves out.
KNOWN = set('''
    T time_scale base_ckpt until loss_type classifier classifier_path classifier_normalisation
    feature temperature logits gt feature_weight intra_weight intra_temperature relation_group
    memory_weight contrast_temperature queue_size queue_update contrast_size queue_layout alpha beta
    logits_weight gt_weight stride num_images fid_use_torch fid_cache fid_float feature_network
    inception_weights weights save_images dataset data_root batch_size num_workers lr wd grad_clip
    total_steps warmup ema_decay grad_accum logdir sample_size sample_step save_step log_step seed
    ch ch_mult attn num_res_blocks dropout img_size conditional class_num mean_type var_type gpu_id
    num_gpus distributed local_rank local-rank amp keep max_bad_steps skip_bad_images train eval
    compile trajectory eval_step parallel beta_1 beta_T'''.split())


def without_strangers(argv):
    """`argv` with its flagfiles read, less the flags in them that only other scripts know."""
    words, kept, left_out = FLAGS.read_flags_from_files(argv, force_gnu=False), [], []
    for word in words:
        name = word.lstrip('-').split('=')[0]
        names = {name, name[2:] if name.startswith('no') else name}
        stranger = word.startswith('--') and word not in argv and not any(
            n in FLAGS for n in names) and names & KNOWN
        (left_out if stranger else kept).append(word)
    if left_out and int(os.environ.get('RANK', 0)) == 0:
        print(f'note: the flagfile has flags of other scripts, without effect here: '
              f'{" ".join(left_out)}', flush=True)
    return kept


def fail(sentence, code):
    """Print one sentence and leave.

    With several processes the first one speaks first: if all found the same mistake, the launcher
    ends the others before they repeat it.
    """
    rank = int(os.environ.get('RANK', 0))
    if rank:
        time.sleep(3)
    name = Path(sys.argv[0]).name + (f' (process {rank})' if rank else '')
    print(f'{name}: error: {sentence}', file=sys.stderr, flush=True)
    leave(code)


def leave(code):
    """End this process; one of several without the interpreter's clean-up.

    That would wait for the others, and threads of the process group can make it abort.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if int(os.environ.get('WORLD_SIZE', 1)) > 1 else sys.exit(code)


def own_flags():
    """The flags of this script and of this module, in order of definition."""
    modules = FLAGS.flags_by_module_dict()
    names = [name for name in modules if name in (__name__, sys.argv[0])]
    return [flag for name in names for flag in modules[name]]


def usage():
    """Docstring of the script, then every flag with its meaning and default."""
    lines = [(sys.modules['__main__'].__doc__ or '').strip(), '', 'Flags:']
    for flag in own_flags():
        default = flag.default_as_str if flag.default is not None else 'none'
        text = f'{" ".join(flag.help.split())} (default: {default})'
        lines.append(f'  --{flag.name}')
        lines += textwrap.wrap(text, 92, initial_indent=' ' * 6, subsequent_indent=' ' * 6)
    return '\n'.join(lines + ['  --flagfile', '      A file with one flag per line.'])


def given(name):
    """Whether the user wrote the flag, on the command line or in a flagfile."""
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
    """One line for every flag the user gave that changes nothing, with the reason."""
    return [f'note: --{name} has no effect: {reason}.'
            for name, reason in dict(NO_EFFECT, **reasons).items() if name in FLAGS and given(name)]


def resolved():
    """The resolved configuration as flagfile text, one flag per line."""
    skip = ('local_rank', 'local-rank')
    lines = [flag.serialize() for flag in own_flags() if flag.name not in skip]
    return '\n'.join(line for line in lines if line)


def save_flagfile(logdir):
    """Write the resolved flags to `<logdir>/flagfile.txt`, so that a run describes itself."""
    (Path(logdir) / 'flagfile.txt').write_text(resolved() + '\n')


def facts():
    """What a checkpoint says about its run beside weights and steps."""
    return dict(mean_type=FLAGS.mean_type, img_size=FLAGS.img_size, dataset=FLAGS.dataset,
                batch_size=FLAGS.batch_size, seed=FLAGS.seed, flags=resolved())


def check_size(dataset):
    """Refuse a data set that cannot fill one batch with different images."""
    if len(dataset) < FLAGS.batch_size:
        raise UserError(f'--batch_size {FLAGS.batch_size} is more than the {len(dataset)} training '
                        f'images of --dataset {dataset.name}; lower it')


def check_labels(dataset, conditional, class_num):
    """Refuse a class-conditional network whose number of classes the data set contradicts."""
    if conditional and dataset.num_classes != class_num:
        raise UserError(f'--dataset {dataset.name} has {dataset.num_classes} classes and the '
                        f'network is for {class_num} (--class_num); use the data set the network '
                        f'is meant for')


def check_network():
    """Refuse network flags that no U-Net can have."""
    levels, halvings = len(FLAGS.ch_mult), 2 ** (len(FLAGS.ch_mult) - 1)
    if FLAGS.ch % 32:
        raise UserError(f'--ch is {FLAGS.ch}, expected a multiple of 32 (group norm has 32 groups)')
    if min(FLAGS.ch_mult) < 1:
        raise UserError(f'--ch_mult is {FLAGS.ch_mult}, expected numbers from 1 on')
    if FLAGS.img_size % halvings:
        raise UserError(f'--img_size is {FLAGS.img_size}, expected a multiple of {halvings}: the '
                        f'network halves it {levels - 1} times (--ch_mult {FLAGS.ch_mult})')
    if not set(FLAGS.attn) <= set(range(levels)):
        raise UserError(f'--attn is {FLAGS.attn}, expected resolutions from 0 to {levels - 1}, as '
                        f'many as --ch_mult has (a flag repeated after a flagfile appends to it)')


def announce(device, logdir, start, **numbers):
    """Print the resolved configuration and where the run starts; main process."""
    if int(os.environ.get('RANK', 0)):
        return
    words = ' '.join(resolved().split('\n'))
    print(textwrap.fill(f'{Path(sys.argv[0]).name} on {device}: {words}', 100,
                        subsequent_indent='  ', break_on_hyphens=False, break_long_words=False))
    for line in without_effect():
        print(line)
    print(f'{"resuming at" if start else "starting at"} step {start}; '
          + ', '.join(f'{name} {value:,}' for name, value in numbers.items()), flush=True)


def define_device_flags():
    """Which devices; and the flags that launchers and old command lines carry."""
    flags.DEFINE_string('gpu_id', None, 'GPUs to use, as in 0,1,2,3; none: all that are visible')
    flags.DEFINE_integer('num_gpus', 1, 'ignored: the launcher says how many processes there are')
    flags.DEFINE_bool('distributed', False, 'ignored: the launcher says how many processes there '
                      'are')
    flags.DEFINE_integer('local_rank', 0, 'set by torch.distributed.launch; the environment counts')
    flags.DEFINE_alias('local-rank', 'local_rank')
    flags.DEFINE_enum('amp', 'none', ['none', 'bf16', 'auto'], 'precision of the networks: float32,'
                      ' bfloat16 autocast, or bfloat16 where the hardware has units for it; losses '
                      'and schedules stay in float32')


def define_network_flags(dropout=0.):
    """The U-Net. A checkpoint brings its own; what is given here is checked against it."""
    flags.DEFINE_integer('ch', 128, 'base channels of the U-Net', lower_bound=1)
    flags.DEFINE_multi_integer('ch_mult', [1, 2, 2, 2], 'channel multiplier, one per resolution '
                               '(repeat the flag; it appends to a flagfile)')
    flags.DEFINE_multi_integer('attn', [1], 'resolutions with attention, counted from 0')
    flags.DEFINE_integer('num_res_blocks', 2, 'residual blocks per resolution', lower_bound=1)
    flags.DEFINE_float('dropout', dropout, 'dropout rate', lower_bound=0., upper_bound=1.)
    flags.DEFINE_integer('img_size', 32, 'height and width of the images', lower_bound=1)
    flags.DEFINE_bool('conditional', False, 'class-conditional network')
    flags.DEFINE_integer('class_num', 10, 'number of classes', lower_bound=1)
    flags.DEFINE_enum('mean_type', 'xstart', ['xstart', 'epsilon'], 'what the network predicts')
    flags.DEFINE_enum('var_type', 'fixedlarge', ['fixedlarge', 'fixedsmall'],
                      'ignored: DDIM sampling is deterministic and has no variance')
    flags.DEFINE_bool('compile', False, 'torch.compile the networks: a slow start (minutes for '
                      'large networks), then faster steps; needs torch 2.2 and a C++ compiler')


def define_data_flags():
    """Where images come from and how many make a step."""
    flags.DEFINE_string('dataset', 'cifar10', 'digits, cifar10, imagenet64 or folder')
    flags.DEFINE_string('data_root', './data', 'folder of the data set; for "folder" and '
                        '"imagenet64" the folder that holds train/<class>/ or <class>/')
    flags.DEFINE_integer('batch_size', 128, 'images per step, over all processes', lower_bound=1)
    flags.DEFINE_integer('num_workers', 4, 'processes that decode image files', lower_bound=0)
    flags.DEFINE_bool('skip_bad_images', False, 'read every image file once at the start, name '
                      'those that cannot be read and leave them out')


def define_training_flags(lr=5e-5, wd=0., total_steps=10000, warmup=0, ema_decay=0.):
    """Optimisation, logging and saving."""
    flags.DEFINE_float('lr', lr, 'learning rate', lower_bound=0.)
    flags.DEFINE_float('wd', wd, 'weight decay', lower_bound=0.)
    flags.DEFINE_float('grad_clip', 1., 'largest norm of the gradient; 0: no clipping',
                       lower_bound=0.)
    flags.DEFINE_integer('total_steps', total_steps, 'optimiser steps', lower_bound=1)
    flags.DEFINE_integer('warmup', warmup, 'steps of linear warm-up', lower_bound=0)
    flags.DEFINE_float('ema_decay', ema_decay, 'decay of the averaged weights; 0: none',
                       lower_bound=0., upper_bound=1.)
    flags.DEFINE_integer('grad_accum', 1, 'parts in which each process works through its share of '
                         'the batch, one after another', lower_bound=1)
    flags.DEFINE_string('logdir', None, 'folder of this run: checkpoint, samples, log')
    flags.DEFINE_integer('sample_size', 64, 'images in the sample grid', lower_bound=1)
    flags.DEFINE_integer('sample_step', 1000, 'steps between sample grids; 0: none',
                         lower_bound=0)
    flags.DEFINE_integer('save_step', 1000, 'steps between checkpoints; 0: only at the end',
                         lower_bound=0)
    flags.DEFINE_integer('keep', 1, 'earlier checkpoints to keep, as ckpt_STEP.pt; 0: none',
                         lower_bound=0)
    flags.DEFINE_integer('max_bad_steps', 20, 'stop after so many steps in a row whose loss or '
                         'gradient is not finite (none of them is applied); looked at when a log '
                         'line is due; 0: never', lower_bound=0)
    flags.DEFINE_integer('log_step', 50, 'steps between log lines', lower_bound=1)
    flags.DEFINE_integer('seed', 0, 'seed of everything random', lower_bound=0)
