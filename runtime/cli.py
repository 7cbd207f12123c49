"""How a script starts, explains itself and fails: help, flagfiles, one sentence for a mistake."""

import difflib
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
ALIASES = 'local-rank', 'gpu-id', 'temp', 'batchsize', 'init_lr'     # other spellings of a flag
# in flagfiles of the released code, which does not read the first either; and of absl's logging
UNREAD = re.compile(r'--queue_size=0?\.\d+|--log_dir=.*')


class UserError(Exception):
    """A mistake of the user (code 2) or a problem of the machine (code 1), told in one sentence."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def first_line(error):
    """The first line of an exception's message that is not empty, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def anchored(path):
    """A relative `path` taken from the repository root, whatever the working directory is."""
    return ROOT / Path(path).expanduser()


def find(path):
    """A `path` to read: from the working directory if it exists there, else from the root."""
    path = Path(path).expanduser()
    return path if path.exists() else anchored(path)


def run(main, words=False):
    """Call `main()`, with `words` `main(what is no flag)`; a mistake becomes one sentence."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:      # closed by whoever started the script, such as cron
            setattr(sys, name, open(os.devnull, 'w'))
        if hasattr(getattr(sys, name), 'reconfigure'):      # paths that its encoding lacks
            getattr(sys, name).reconfigure(errors='backslashreplace')
    if {'--help', '-h', '-help', '--helpshort', '--helpfull'}.intersection(sys.argv):
        print0(usage())
        sys.exit(0)
    try:
        rest = FLAGS(without_foreign_flags(sys.argv))[1:]
        if rest and not words:
            raise UserError(f'unexpected word "{rest[0]}" on the command line; '
                            f'flags are written --name value or --name=value (see --help)')
        check_values()
        main(rest) if words else main()
        leave(0)
    except flags.Error as error:
        text = re.sub(r"invalid literal for int\(\) with base 10: '.*'", 'expected a whole number',
                      ' '.join(str(error).split()))
        fail(f'{text} (see --help)', 2)
    except UserError as error:
        fail(str(error), error.code)
    except KeyboardInterrupt:
        fail('interrupted', 130)
    except BrokenPipeError:     # the reader of the output has gone
        leave(1)
    except OSError as error:        # a disk that is full or gone
        fail(f'{error.filename or "a file"} could not be read or written ({error.strerror or error}'
             f'); repair that and run the same command again', 1)
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        # the last two are those of cuDNN and cuBLAS
        no_memory = 'out of memory', "can't allocate", 'unable to find an engine', '_ALLOC_FAILED'
        if isinstance(error, MemoryError) or any(words in text for words in no_memory):
            fail('there is not enough memory for this network and batch; lower --batch_size, or '
                 'raise --grad_accum in a training', 1)
        # of gloo, only the text tells that a connection was closed
        lost = type(error).__name__ == 'DistBackendError' or 'Connection' in text
        if os.environ.get('WORLD_SIZE', '1') == '1' or not lost:
            raise
        fail(f'another process has ended, see its own message '
             f'({text.split("] ")[-1].split(". ")[0]})', 1)


def check_values():
    """Refuse nan and inf in any flag; expand ~ in paths, as a shell does."""
    for flag in own_flags():
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise UserError(f'--{flag.name} is {flag.value}, expected a finite number')
        if isinstance(flag.value, str) and flag.value.startswith('~'):
            flag.value = os.path.expanduser(flag.value)


def without_foreign_flags(argv):
    """`argv` with its flagfiles read, less the flags from a file that this script does not have.

    So the flagfile of another script may be given, also of the released code. What is left out is
    printed; a line that is no flag, or nearly a flag of this script, is refused.
    """
    if any(word in ('--flagfile=', '-flagfile=') for word in argv):
        raise UserError('--flagfile is empty; give a file, such as ./config/DIGITS_BASE.txt')
    try:
        ' '.join(argv).encode()
        words = FLAGS.read_flags_from_files(argv, force_gnu=False)
    except UnicodeEncodeError:
        raise UserError('the command line holds bytes that the text encoding of this shell lacks '
                        f'({sys.getfilesystemencoding()}); set PYTHONUTF8=1, or use other names')
    except UnicodeDecodeError:
        raise UserError('a flagfile is not UTF-8 text; give one with a flag per line, '
                        '--name=value')
    kept, left_out = [], []
    names = [flag.name for flag in own_flags()]
    for word in words:
        if word in argv:
            kept.append(word)
            continue
        word = word.lstrip('\ufeff')        # a mark that some editors put at the start
        word = re.sub(r"""^(--?\w+=)(["'])(.*)\2$""", r'\1\3', word)    # quotes, as a shell does
        name = word.lstrip('-').split('=')[0]
        if not word.startswith('-') or ' ' in name:
            raise UserError(f'a flagfile has the line "{word}", expected --name=value')
        known = name in FLAGS or name.startswith('no') and name[2:] in FLAGS
        foreign = word.startswith('--') and (not known or UNREAD.fullmatch(word))
        similar = difflib.get_close_matches(name, names, 1, .85)
        if foreign and similar and not (name in ALIASES or UNREAD.fullmatch(word)):
            raise UserError(f'a flagfile has the flag --{name}, which does not exist; did you mean '
                            f'--{similar[0]}?')
        (left_out if foreign else kept).append(word)
    if left_out:
        print0(f'note: the flagfile has flags that this script does not read, ignored: '
               f'{" ".join(left_out)}')
    return kept


def print0(*words, rank='RANK'):
    """Print on the first process only; with rank='LOCAL_RANK', on the first of each machine."""
    try:
        if (os.environ.get(rank) or '0') == '0':
            print(*words, flush=True)
    except BrokenPipeError:     # the reader of the output has gone: no training is lost for that
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(sentence, code):
    """Print one sentence and exit."""
    rank, name = os.environ.get('RANK') or '0', Path(sys.argv[0]).name
    if rank != '0':
        time.sleep(3)       # if the first one found the same, the launcher ends the others now
        name += f' (process {rank})'
    print(f'{name}: error: {sentence}', file=sys.stderr, flush=True)
    leave(code)


def leave(code):
    """Exit; one of several processes without the clean-up, which would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code) if os.environ.get('WORLD_SIZE', '1') == '1' else os._exit(code)


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
        words = ' '.join(flag.help.split()).replace('|', ' | ')      # lines break between names
        text = f'{words} (default: {default})'
        lines.append(f'  --{flag.name}')
        lines += textwrap.wrap(text, 92, initial_indent=' ' * 6, subsequent_indent=' ' * 6)
    return '\n'.join(lines + ['  --flagfile', '      A file with one flag per line.'])
