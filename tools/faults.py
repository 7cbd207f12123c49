"""Puts deliberate faults into a copy of the code, one at a time, and asks whether a test fails.

  python tools/faults.py                    all of them (tools/faults_table.py, faults_more.py)
  python tools/faults.py --only 3,17,20-25  some of them, by number
  python tools/faults.py --file PD.py --jobs 2
  python tools/faults.py --check            only look whether every text to be replaced is there
Prints a Markdown table: file, fault, the test that caught it, or MISSED. The working tree is not
touched. The tests that a fault names must pass on the code as it is; that is tried first.

Tests run in forks of this process, which has loaded torch and the other packages: a fault takes
seconds. See tools/forks.py, which tests use in the same way.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

os.environ.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
sys.dont_write_bytecode = True      # a file changes twice in a second
ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = ('.git', '.venv', '__pycache__', '.pytest_cache', '.ruff_cache', 'logs', 'data',
              'stats', 'result', 'shared')
MINUTES = 10            # that the tests of one fault may take: one that hangs is caught


def load_packages():
    """Everything slow to import that is not of this project."""
    import pytest  # noqa: F401
    import scipy.linalg  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import tensorboardX  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401
    import torch.nn.parallel  # noqa: F401
    torch.set_num_threads(1)


def load_table():
    """The faults of both tables, numbered from 1."""
    sys.path.insert(0, str(ROOT))
    from tools import faults_more  # noqa: F401
    from tools.faults_table import FAULTS
    sys.path.pop(0)
    return FAULTS


def words_of(selection):
    """'wiring rdd-plain or pd-plain' means tests/test_wiring.py -k 'rdd-plain or pd-plain'."""
    name, _, expression = selection.partition(' ')
    return [f'tests/test_{name}.py'] + (['-k', expression] if expression else [])


def replaced(text, fault):
    """`text` with the fault in it.

    Raises:
        ValueError: the old text is not there exactly once, or does not change.
    """
    count = text.count(fault['old'])
    if count != 1 or fault['old'] == fault['new']:
        raise ValueError(f'fault {fault["number"]}: {fault["file"]} has {count} times\n'
                         f'{fault["old"]}')
    return text.replace(fault['old'], fault['new'])


def problem(fault):
    """Why a fault cannot be put in, or None."""
    try:
        replaced((ROOT / fault['file']).read_text(), fault)
    except (OSError, ValueError) as error:
        return str(error)


def fork_all(jobs):
    """In place of that of tests/helpers.py: the runs are forks of this process, which knows torch.

    The modules of the project are those of the copy, as the working directory says.
    """
    from tools import forks
    if forks.ROOT.resolve() != Path.cwd().resolve():
        raise RuntimeError(f'tests would run the scripts in {forks.ROOT}, which have no fault')
    with tempfile.TemporaryDirectory() as folder:
        given, told = Path(folder) / 'jobs', Path(folder) / 'results'
        given.write_text(json.dumps(jobs))
        pid = os.fork()
        if not pid:
            for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
                os.environ.pop(name, None)
            for number, path in enumerate((given, told)):
                os.dup2(os.open(str(path), os.O_RDWR | os.O_CREAT), number)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w')
            try:
                forks.main()
                sys.stdout.flush()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        return json.loads(told.read_text())


class Workplace:
    """A copy of the repository, and the process that tests it."""

    def __init__(self, folder):
        self.folder, self.root = Path(folder), Path(folder) / 'repository'
        shutil.copytree(str(ROOT), str(self.root), ignore=shutil.ignore_patterns(*NOT_COPIED))
        self.said, self.fault, self.tests = self.folder / 'said', None, ''

    def start(self, fault, tests):
        """Fork a process that runs `tests`, with a fault in the copy or (None) without."""
        self.fault, self.tests = fault, tests
        if fault:
            path = self.root / fault['file']
            path.write_text(replaced((ROOT / fault['file']).read_text(), fault))
        self.pid = os.fork()
        if not self.pid:
            try:
                os._exit(self.test())
            finally:
                os._exit(70)

    def test(self):
        """In the fork: the exit code of pytest."""
        os.setsid()
        signal.alarm(60 * MINUTES)
        number = os.open(str(self.said), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(number, 1)
        os.dup2(number, 2)
        os.chdir(str(self.root))
        os.environ['XDG_CACHE_HOME'] = str(self.folder)
        sys.path[:] = [str(self.root), str(self.root / 'tests')] + [
            path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / 'tools')]
        for name in [name for name in sys.modules if name.split('.')[0] == 'tools']:
            del sys.modules[name]       # that of the working tree; tests need that of the copy
        import helpers
        import pytest
        if hasattr(helpers, 'fork_all'):
            helpers.fork_all = fork_all
        for selection in self.tests.split(' + '):
            code = int(pytest.main(['-x', '-q', '--no-header', '-p', 'no:cacheprovider',
                                    f'--basetemp={self.folder / "tests"}', *words_of(selection)]))
            if code:
                break
        sys.stdout.flush()
        return code

    def finish(self, status):
        """What failed first, or None; the copy is then as it was."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.fault:
            shutil.copyfile(str(ROOT / self.fault['file']), str(self.root / self.fault['file']))
        said = self.said.read_text() if self.said.exists() else ''
        if os.environ.get('FAULTS_SHOW'):
            print(said, file=sys.stderr)
        if os.WIFSIGNALED(status):
            return f'no end in {MINUTES} minutes, or signal {os.WTERMSIG(status)}'
        if not os.WEXITSTATUS(status):
            return None
        found = re.search(r'^(?:FAILED|ERROR) (\S+)', said, re.MULTILINE)
        if not found:       # no such tests, say
            return f'ERROR: {self.tests}: {(said.strip().splitlines() or [""])[-1]}'
        return found.group(1).replace('tests/', '')


def run_all(tasks, workplaces, tell):
    """Run [(fault or None, tests)], as many at a time as there are workplaces; tell(fault, tests,
    what failed) for each."""
    tasks, free, busy = list(tasks)[::-1], list(workplaces), {}
    while tasks or busy:
        while tasks and free:
            place = free.pop()
            place.start(*tasks.pop())
            busy[place.pid] = place
        pid, status = os.wait()
        place = busy.pop(pid)
        tell(place.fault, place.tests, place.finish(status))
        free.append(place)


def parse():
    words = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    words.add_argument('--only', default='', help='numbers, as in 3,17,20-25')
    words.add_argument('--file', default='', help='only faults in files whose name has this')
    words.add_argument('--jobs', type=int, default=1, choices=[1, 2])
    words.add_argument('--trust', action='store_true', help='do not run the tests without a fault')
    words.add_argument('--check', action='store_true', help='run no tests')
    return words.parse_args()


def chosen(faults, only, file):
    numbers = set()
    for part in filter(None, only.split(',')):
        first, _, last = part.partition('-')
        numbers |= set(range(int(first), int(last or first) + 1))
    return [fault for fault in faults if (not numbers or fault['number'] in numbers)
            and file in fault['file']]


def main():
    args = parse()
    faults, bad, missed = chosen(load_table(), args.only, args.file), {}, []
    wrong = list(filter(None, map(problem, faults)))
    if wrong:
        sys.exit('\n'.join(wrong))
    print(f'{len(faults)} faults, every text is there once', file=sys.stderr)
    if args.check:
        return 0
    load_packages()

    def tell(fault, tests, caught):
        if not fault:
            if caught:
                bad[tests] = caught
            return
        if not caught and not fault['harmless']:
            missed.append(fault)
        words = f'`{caught}`' if caught else f'**MISSED** by {tests}'
        if tests in bad:
            words += f' (and without the fault: {bad[tests]})'
        if fault['harmless']:
            words += f'; cannot matter: {fault["harmless"]}'
        print(f'| {fault["number"]} | {fault["file"]} | {fault["what"]} | {words} |', flush=True)

    with tempfile.TemporaryDirectory() as folder:
        workplaces = [Workplace(Path(folder) / str(i)) for i in range(args.jobs)]
        if not args.trust:
            run_all([(None, tests) for tests in sorted({fault['tests'] for fault in faults})],
                    workplaces, tell)
        print('| number | file | fault | caught by |\n|---|---|---|---|', flush=True)
        run_all([(fault, fault['tests']) for fault in faults], workplaces, tell)
    print(f'\n{len(faults) - len(missed)} of {len(faults)} caught, or cannot matter.')
    return int(bool(missed or bad))


if __name__ == '__main__':
    sys.exit(main())
