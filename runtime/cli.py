"""How a script starts, explains itself and fails: help, flagfiles, one sentence for a mistake."""

import math
import os
import re
import sys
import textwrap
import time
from pathlib import Path

from absl import flags

FLAGS = flags.FLAGS
ROOT = Path(__file__).resolve().parent.parent
HELP = ('--help', '-h', '-help', '--helpshort', '--helpfull')
ALIASES = ('local-rank', 'gpu-id', 'temp')      # other spellings of a flag
UNREAD = re.compile(r'--queue_size=0?\.\d+')    # in files of the released code, which never read it


class UserError(Exception):
    """A mistake of the user (code 2) or a problem of the machine (code 1), told in one sentence."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def anchored(path):
    """A relative `path` taken from the repository root, whatever the working directory is."""
    return ROOT / Path(path).expanduser()


def find(path):
    """A `path` to read: from the working directory if it exists there, else from the root."""
    path = Path(path).expanduser()
    return path if path.exists() else anchored(path)


def run(main, words=False):
    """Parse the command line and call `main()`; a mistake becomes one sentence and an exit code.

    Args:
        words: the script takes words that are not flags; they are passed on as `main(words)`.
    """
    if any(word in HELP for word in sys.argv[1:]):
        print(usage())
        sys.exit(0)
    try:
        rest = FLAGS(without_foreign_flags(sys.argv))[1:]
        if rest and not words:
            raise UserError(f'unexpected word "{rest[0]}" on the command line; '
                            f'flags are written --name value or --name=value (see --help)')
        check_values()
        main(rest) if words else main()
        leave(0)
    except UnicodeDecodeError:
        fail('a flagfile is not UTF-8 text; give one with a flag per line, --name=value', 2)
    except flags.Error as error:
        fail(' '.join(str(error).split()) + ' (see --help)', 2)
    except UserError as error:
        fail(str(error), error.code)
    except KeyboardInterrupt:
        fail('interrupted', 130)
    except OSError as error:        # a disk that is full or gone
        fail(f'{error.filename or "a file"} could not be read or written ({error.strerror or error}'
             f'); repair that and run the same command again', 1)
    except RuntimeError as error:
        if not lost_process(error):
            raise
        reason = str(error).split('] ')[-1].split('. ')[0]
        fail(f'another process has ended, see what it said ({reason})', 1)


def lost_process(error):
    """Whether a RuntimeError means that another process of this run has ended.

    gloo raises a plain RuntimeError for a connection that was closed; only its text tells.
    """
    return 'Connection' in str(error) and int(os.environ.get('WORLD_SIZE', 1)) > 1


def check_values():
    """Refuse nan and inf in any flag; lower --num_workers to the cores of this machine."""
    for flag in own_flags():
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise UserError(f'--{flag.name} is {flag.value}, expected a finite number')
    cores = os.cpu_count() or 1
    if hasattr(os, 'sched_getaffinity'):
        cores = len(os.sched_getaffinity(0))
    if 'num_workers' in FLAGS and FLAGS.num_workers > cores:
        if FLAGS['num_workers'].present and int(os.environ.get('RANK', 0)) == 0:
            print(f'note: --num_workers {FLAGS.num_workers} is lowered to the {cores} cores of '
                  f'this machine.', flush=True)
        FLAGS.num_workers = cores


def without_foreign_flags(argv):
    """`argv` with its flagfiles read, less the flags from a file that this script does not have.

    The flagfile of one script may so be given to another, also that of a script of the released
    code, of RCFD or of absl itself. What is left out is printed.
    """
    words, kept, left_out = FLAGS.read_flags_from_files(argv, force_gnu=False), [], []
    for word in words:
        if word not in argv:
            word = word.lstrip('\ufeff')        # what some editors put at the start of a file
            if not word.startswith('-'):
                raise UserError(f'a flagfile has the line "{word}", expected --name=value')
        name = re.split('[= ]', word.lstrip('-'))[0]     # "--lr 1e-3" is refused by absl
        known = name in FLAGS or name.startswith('no') and name[2:] in FLAGS
        foreign = word.startswith('--') and word not in argv and (
            not known or UNREAD.fullmatch(word))
        (left_out if foreign else kept).append(word)
    if left_out and int(os.environ.get('RANK', 0)) == 0:
        print(f'note: the flagfile has flags that this script does not read, ignored: '
              f'{" ".join(left_out)}', flush=True)
    return kept


def fail(sentence, code):
    """Print one sentence and exit.

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
    """Exit; one of several processes without the clean-up of the interpreter.

    The clean-up would wait for the other processes, and threads of the process group can make it
    abort.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if int(os.environ.get('WORLD_SIZE', 1)) > 1 else sys.exit(code)


def own_flags():
    """The flags that this project defines in the running script, in order of definition."""
    modules = FLAGS.flags_by_module_dict()
    return [flag for name in modules if not name.startswith('absl') for flag in modules[name]
            if flag.name not in ALIASES]


def usage():
    """Docstring of the script, then every flag with its meaning and default."""
    lines = [(sys.modules['__main__'].__doc__ or '').strip(), '', 'Flags:']
    for flag in own_flags():
        default = flag.default_as_str if flag.default is not None else 'none'
        text = f'{" ".join(flag.help.split())} (default: {default})'
        lines.append(f'  --{flag.name}')
        lines += textwrap.wrap(text, 92, initial_indent=' ' * 6, subsequent_indent=' ' * 6)
    return '\n'.join(lines + ['  --flagfile', '      A file with one flag per line.'])
