"""The lock of a folder, and signals."""

import os
import signal

import pytest

from helpers import is_locked, launch
from runtime import guard
from runtime.cli import UserError
from runtime.guard import Folder, Stop, leave_after

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


def test_second_run_in_a_folder_is_refused(tmp_path):
    """The lock belongs to the process and is gone with it, however it ended."""
    code = """
import sys
sys.path.insert(0, '.')
from runtime.guard import Folder, UserError
try:
    Folder(sys.argv[1], 'flags of another')
except UserError as error:
    print(error)
Folder(sys.argv[2], 'flags of another')
print('free')
"""
    mine, other = tmp_path / 'mine', tmp_path / 'other'
    folder = Folder(mine, '--T=8')
    assert is_locked(mine)
    said = launch(['-c', code, mine, other])
    assert f'--logdir {mine} is in use by process {os.getpid()} on ' in said and 'free' in said
    assert (mine / 'flagfile.txt').read_text() == '--T=8\n'
    assert (other / 'flagfile.txt').is_file() and not is_locked(other)
    assert is_locked(mine)
    folder.close()
    assert not is_locked(mine)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'--logdir .*file/run cannot be written to \(Not a dir'):
        Folder(str(tmp_path / 'file/run'), '')
    with pytest.raises(UserError, match='--result_path folder .* cannot be written to'):
        Folder(str(tmp_path / 'file/run'), '', '--result_path folder')


def test_stop(capsys):
    """What was received is remembered; the handlers from before are back after the block."""
    before, stop = [signal.getsignal(n) for n in SIGNALS], Stop()
    with stop:
        assert not stop.asked()
        assert signal.getsignal(signal.SIGINT) != before[1]
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked() == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)      # passed on by a launcher within two seconds
        assert stop.asked() == signal.SIGTERM
    assert [signal.getsignal(n) for n in SIGNALS] == before
    with stop:                                  # the next stage of a chain
        assert stop.asked() == signal.SIGTERM
    with pytest.raises(SystemExit) as leaving:
        leave_after(stop.asked(), 'folder', 3)
    assert leaving.value.code == 143
    assert 'SIGTERM: stopped after step 3, saved in folder' in capsys.readouterr().out


def test_processes_agree_now_and_then(monkeypatch):
    """In the first step, a quarter of a second later, and in the last; the slowest one counts."""
    asked, clock, slowest, theirs = [], [0.], [10 ** 7], [0]

    def largest(received, nanoseconds):
        asked.append(step)
        return max(received, theirs[0]), max(nanoseconds, slowest[0])

    monkeypatch.setattr(guard.distributed, 'world_size', lambda: 2)
    monkeypatch.setattr(guard.distributed, 'largest', largest)
    monkeypatch.setattr(guard.time, 'monotonic', lambda: clock[0])
    with Stop() as stop:
        for step in range(1, 81):           # 1 ms here and 10 there, from step 41 on 1 s
            clock[0] += .001 if step <= 40 else 1.
            theirs[0] = signal.SIGTERM if step >= 78 else 0
            if stop.asked(step, step == 80):
                break
    assert asked == [1, 26, 51, *range(52, 79)] and step == 78
    with Stop() as stop:
        asked.clear()
        for step in (1, 2):
            stop.asked(step, last=step == 2)
    assert asked == [1, 2]
    with Stop() as stop:
        asked.clear()
        for step in range(5001, 5004):      # of a resumed run, 10 s each
            clock[0] += 10.
            stop.asked(step, last=False)
    assert asked == [5001, 5002, 5003]


def test_second_signal_ends_the_process(monkeypatch):
    """Two seconds later or more."""
    codes = []
    monkeypatch.setattr(os, '_exit', codes.append)
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        stop.since -= 2.1
        signal.raise_signal(signal.SIGINT)
    assert codes == [130]


def test_handlers_are_restored_after_an_exception():
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(ZeroDivisionError), Stop():
        1 / 0
    assert [signal.getsignal(n) for n in SIGNALS] == before
