"""How a script starts and fails: flagfiles, help, one sentence for mistakes; closed outputs."""

import subprocess
import sys

import pytest
from absl import flags as absl_flags

from helpers import ROOT, command, environment, fork_all, parsing
from runtime import flags

PROGRAM = """
from absl import flags
from runtime import cli
flags.DEFINE_string('logdir', None, '')
flags.DEFINE_float('lr', 1., 'the rate')
flags.DEFINE_float('ema_decay', 1., '')
flags.DEFINE_integer('steps', 1, '')
def main():
    {}
cli.run(main)
"""
SHOW = 'print(flags.FLAGS.logdir, flags.FLAGS.lr)'
# text of a flagfile: what the script then prints
READ = {
    '--logdir=~/x': '{home}/x 1.0', '--logdir="a b"': 'a b 1.0', '--logdir=a"b"': 'a"b" 1.0',
    "--logdir='~/a'\n--lr=2": '{home}/a 2.0', '\ufeff--lr=3\n\n# words': 'None 3.0',
    '--queue_size=9\n--lr=2\n--batch_renorm': 'note: the flagfile has flags that this script does '
    'not read, ignored: --queue_size=9 --batch_renorm\nNone 2.0'}
# what is refused: text of a flagfile; a word of the command line; what the script does (its code)
REFUSED = {
    '--lr 1e-4': 'a flagfile has the line "--lr 1e-4", expected --name=value',
    'lr=1': 'a flagfile has the line "lr=1", expected --name=value',
    '--ema_decai=1': 'has the flag --ema_decai, which does not exist; did you mean --ema_decay?',
    '\udcff\udcfe--lr=1': 'a flagfile is not UTF-8 text',      # bytes that are no text
    '--lr=nan': '--lr is nan, expected a finite number', '--lr=much': '--lr=much'}
WORDS = {'digits': 'unexpected word "digits" on the command line; flags are written --name',
         '--learning_rate=1': "Unknown command line flag 'learning_rate'",
         '--flagfile=': '--flagfile is empty; give a file',
         '--steps=1e3': '--steps=1e3: expected a whole number (see --help)'}
INIT = 'from runtime import distributed; cli.os.environ.update({}); distributed.init()'
MEMORY = 'error: there is not enough memory for this network and batch; lower --batch_size'
FAILURES = {
    'raise RuntimeError("CUDA out of memory.")': (1, MEMORY), 'raise MemoryError': (1, MEMORY),
    'raise RuntimeError("FIND was unable to find an engine to execute this")': (1, MEMORY),
    'import torch; torch.empty(2 ** 60)': (1, MEMORY),
    'raise KeyboardInterrupt': (130, 'error: interrupted'),
    'raise cli.UserError("a mistake")': (2, 'error: a mistake'),
    'open("/no/such/file")': (1, 'error: /no/such/file could not be read or written (No such'),
    'open("/dev/full", "w").write(9999 * "x")': (1, 'error: a file could not be read or written'),
    INIT.format('RANK=""'): (2, 'the environment variable RANK is "", expected a whole number; un'),
    INIT.format('WORLD_SIZE="1.5"'): (2, 'variable WORLD_SIZE is "1.5", expected a whole number'),
    INIT.format('LOCAL_RANK="-1"'): (2, 'variable LOCAL_RANK is "-1", expected a whole number')}
FAULT, SLURM = 'raise RuntimeError("a fault")', INIT.format('SLURM_NTASKS="4"')
# outputs that nobody reads, or that are not there, as under cron; and a script that prints
CLOSED = dict(
    pipe="""
import os, sys
read, write = os.pipe()
os.close(read)
sys.stdout, sys.stderr = open(write, 'w'), open(os.dup(write), 'w')
""",
    none="""
import os, sys
os.close(1)
os.close(2)
sys.stdout = sys.stderr = None
""")
PRINTS = """
    from runtime.log import progress
    with progress(3) as bar:
        for _ in range(3):
            cli.print0('a line')
            bar.update()
    open(flags.FLAGS.logdir, 'w').write('done')"""


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """{name of a case: (exit code, standard output, standard error)}, and the home folder."""
    folder, jobs = tmp_path_factory.mktemp('cli'), {}

    def add(name, do=SHOW, words=(), before=''):
        script = folder / f'{len(jobs)}.py'
        script.write_text(before + PROGRAM.format(do))
        jobs[name] = [command([str(script)], *words, env=dict(HOME=str(folder)))]

    for text in (*READ, *REFUSED):
        (folder / f'{len(jobs)}.txt').write_text(text, errors='surrogateescape')
        add(text, words=[f'--flagfile={folder}/{len(jobs)}.txt'])
    for word in (*WORDS, '--logdir=~/y', '--help'):
        add(word, words=[word])
    for do in (*FAILURES, FAULT, SLURM):
        add(do, do)
    for name, before in CLOSED.items():
        add(name, PRINTS, [f'--logdir={folder}/{name}'], before)
    return {name: results[0] for name, results in fork_all(jobs).items()}, folder


@pytest.mark.parametrize('text', list(READ))
def test_flagfiles_are_read_as_a_shell_reads_words(done, text):
    """Flags of other scripts are named and left out."""
    results, home = done
    assert results[text][:2] == [0, READ[text].format(home=home) + '\n']
    assert results['--logdir=~/y'][1] == f'{home}/y 1.0\n'


@pytest.mark.parametrize('case', [*REFUSED, *WORDS, *FAILURES])
def test_failures_are_one_sentence(done, case):
    code, sentence = FAILURES.get(case) or (2, {**REFUSED, **WORDS}[case])
    found, _, err = done[0][case]
    assert found == code and sentence in err and 'Traceback' not in err, err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize('case, code, text', [
    (FAULT, 1, 'Traceback'), (SLURM, 0, 'note: Slurm has 4 tasks and this is a run of one process'),
    ('--help', 0, "\n  --lr\n      the rate (default: '1.0')\n")])
def test_what_is_printed(done, case, code, text):
    """Errors of other kinds keep their traceback; tasks of Slurm are no processes; help."""
    found, out, err = done[0][case]
    assert found == code and text in out + err


def test_closed_output_loses_no_training(done):
    assert [(done[1] / name).read_text() for name in CLOSED] == ['done', 'done']


@pytest.mark.parametrize('words, note', [
    ([], False), (['--weight=10'], True), (['--weight=10', '--term'], False)])
def test_a_weight_of_a_term_that_is_off_is_named(capsys, words, note):
    def define():
        absl_flags.DEFINE_bool('term', False, '')
        absl_flags.DEFINE_float('weight', 1., '')

    with parsing(define) as parse:
        parse(*words)
        flags.without_switch(weight='term')
    assert capsys.readouterr().out == note * 'note: --weight has no effect without --term.\n'


@pytest.mark.parametrize('do, words, code, text', [
    ('print("na\\xefve")', [], 0, b'na\\xefve'),
    ('pass', ['--logdir=na\xefve'], 2, b'set PYTHONUTF8=1, or use other names')])
def test_shells_without_utf8(tmp_path, do, words, code, text):
    """What their encoding lacks is printed as escapes, and refused on the command line."""
    (tmp_path / 'script.py').write_text(PROGRAM.format(do))
    found = subprocess.run(
        [sys.executable, f'{tmp_path}/script.py', *words], cwd=str(ROOT), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=environment(PYTHONPATH=str(ROOT), LC_ALL='C', PYTHONUTF8='0',
                                                  PYTHONCOERCECLOCALE='0'))
    assert found.returncode == code and text in found.stdout, found.stdout
