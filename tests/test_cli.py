"""How scripts start and fail: flagfiles, the environment of launchers, memory, closed outputs."""

import subprocess
import sys

import pytest

from helpers import ROOT, command, environment, fork_all
from runtime import distributed
from runtime.cli import UserError

PROGRAM = """
import torch
from absl import flags
from runtime import cli, distributed
flags.DEFINE_string('logdir', None, '')
flags.DEFINE_float('lr', 1., '')
flags.DEFINE_float('ema_decay', 1., '')
flags.DEFINE_integer('steps', 1, '')
def main():
    {}
cli.run(main)
"""
MEMORY = 'error: there is not enough memory for this network and batch; lower --batch_size'
# text of a flagfile: what the script then prints
READ = {
    '--logdir=~/x': '{home}/x 1.0', '--logdir="a b"': 'a b 1.0', '--logdir=a"b"': 'a"b" 1.0',
    "--logdir='~/a'\n--lr=2": '{home}/a 2.0', '\ufeff--lr=3\n\n# words': 'None 3.0',
    '--queue_size=9\n--lr=2\n--batch_renorm': 'note: the flagfile has flags that this script does '
    'not read, ignored: --queue_size=9 --batch_renorm\nNone 2.0'}
REFUSED = {
    '--lr 1e-4': 'a flagfile has the line "--lr 1e-4", expected --name=value',
    'lr=1': 'a flagfile has the line "lr=1", expected --name=value',
    '--ema_decai=1': 'a flagfile has the flag --ema_decai, which does not exist; did you mean '
                     '--ema_decay?',
    '\udcff\udcfe--lr=1': 'a flagfile is not UTF-8 text',      # bytes that are no text
    '--lr=nan': '--lr is nan, expected a finite number', '--lr=much': '--lr=much'}
# what the script does: exit code and sentence
FAILURES = {
    'raise getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)("CUDA out of memory.")':
        (1, MEMORY),
    'raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried")': (1, MEMORY),
    'raise MemoryError': (1, MEMORY), 'torch.empty(2 ** 60)': (1, MEMORY),
    'raise KeyboardInterrupt': (130, 'error: interrupted'),
    'raise cli.UserError("a mistake")': (2, 'error: a mistake'),
    'open("/no/such/file")': (1, 'error: /no/such/file could not be read or written (No such'),
    'open("/dev/full", "w").write(9999 * "x")': (1, 'error: a file could not be read or written')}


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """{name of a case: (exit code, standard output, standard error)}, and the home folder."""
    folder, jobs = tmp_path_factory.mktemp('cli'), {}

    def add(name, do='print(flags.FLAGS.logdir, flags.FLAGS.lr)', words=(), **env):
        script = folder / f'{len(jobs)}.py'
        script.write_text(PROGRAM.format(do))
        jobs[name] = [command([str(script)], *words, env=dict(HOME=str(folder), **env))]

    for text in (*READ, *REFUSED):
        (folder / f'{len(jobs)}.txt').write_text(text, errors='surrogateescape')
        add(text, words=[f'--flagfile={folder}/{len(jobs)}.txt'])
    for do in FAILURES:
        add(do, do)
    add('shell', words=['--logdir=~/y'])
    add('fault', 'raise RuntimeError("a fault")')
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        add(name, 'distributed.init()', **{name: 'two'})
    add('empty', words=['--flagfile='])
    add('slurm', 'distributed.init()', SLURM_NTASKS='4')
    add('whole', words=['--steps=1e3'])
    return {name: results[0] for name, results in fork_all(jobs).items()}, folder


def check(result, code, sentence):
    found, _, err = result
    assert found == code and sentence in err and 'Traceback' not in err, err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize('text', list(READ))
def test_flagfiles_are_read_as_a_shell_reads_words(done, text):
    """Flags of other scripts are named and left out."""
    results, home = done
    assert results[text][:2] == [0, READ[text].format(home=home) + '\n']
    assert results['shell'][1] == f'{home}/y 1.0\n'


@pytest.mark.parametrize('text', list(REFUSED))
def test_flagfiles_that_are_refused(done, text):
    check(done[0][text], 2, REFUSED[text])


@pytest.mark.parametrize('do', list(FAILURES))
def test_failures_are_one_sentence(done, do):
    check(done[0][do], *FAILURES[do])


def test_tasks_of_slurm_are_no_processes(done):
    assert 'note: Slurm has 4 tasks and this is a run of one process' in done[0]['slurm'][1]


def test_words_that_are_refused(done):
    results, _ = done
    check(results['empty'], 2, '--flagfile is empty; give a file')
    check(results['whole'], 2, '--steps=1e3: expected a whole number (see --help)')


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


def test_other_errors_keep_their_traceback(done):
    code, _, err = done[0]['fault']
    assert code == 1 and 'Traceback' in err and 'a fault' in err


@pytest.mark.parametrize('name', ['RANK', 'WORLD_SIZE', 'LOCAL_RANK'])
def test_environment_that_no_launcher_sets(done, monkeypatch, name):
    """One sentence, also from the end of the script, which looks at these variables as well."""
    check(done[0][name], 2, f'the environment variable {name} is "two", expected a whole number')
    for value in ('', '-1', '1.5'):
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f'variable {name} is "{value}", expected'):
            distributed.init()


@pytest.mark.parametrize('closed', ['2>&1 | true', '>&- 2>&-'])
def test_closed_output_loses_no_training(tmp_path, closed):
    """Nobody reads the output, or there is none, as under cron."""
    (tmp_path / 'script.py').write_text(PROGRAM.format("""
    import time
    time.sleep(1)
    from runtime.log import progress
    with progress(3) as bar:
        for _ in range(3):
            cli.print0('a line')
            bar.update()
    open(flags.FLAGS.logdir, 'w').write('done')"""))
    words = f'{sys.executable} {tmp_path}/script.py --logdir={tmp_path}/result'
    done = subprocess.run(f'{words} {closed}', shell=True, cwd=str(ROOT), stderr=subprocess.PIPE,
                          env=environment(PYTHONPATH=str(ROOT)))
    assert b'Traceback' not in done.stderr, done.stderr.decode()
    assert (tmp_path / 'result').read_text() == 'done'
