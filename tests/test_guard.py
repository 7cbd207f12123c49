"""The folder of a run, its lock, and signals."""

import os
import signal

import pytest

from helpers import is_locked, start
from runtime import guard
from runtime.cli import UserError
from runtime.guard import Folder, Stop


# The folder

def test_second_run_in_a_folder_is_refused(tmp_path):
    """The lock belongs to the process and is gone with it, however it ended."""
    mine, other = tmp_path / 'mine', tmp_path / 'other'
    folder = Folder(mine, '--T=8')
    second = start(['-c', 'import sys; from runtime.guard import Folder; '
                    'kept = [Folder(path, "") for path in sys.argv[1:]]', other, mine])
    assert f' {mine} is in use by process {os.getpid()} on ' in second.stderr
    assert (mine / 'flagfile.txt').read_text() == '--T=8\n'
    assert (other / 'flagfile.txt').is_file() and not is_locked(other)
    assert is_locked(mine)
    folder.close()
    Folder(mine, '--T=4').close()       # a run goes on in its own folder
    assert (mine / 'flagfile.txt').read_text() == '--T=4\n' and not is_locked(mine)


@pytest.mark.parametrize('name', ['metrics.jsonl', 'flagfile.txt'])
def test_files_of_something_else_are_kept(tmp_path, name):
    """A folder without a run whose files a run would overwrite."""
    (tmp_path / name).write_text('mine')
    with pytest.raises(UserError, match=f'has a file {name} that no run has written'):
        Folder(tmp_path, '--T=8')
    assert (tmp_path / name).read_text() == 'mine'
    (tmp_path / 'ckpt.pt').write_text('of a run')       # copied without its lock
    Folder(tmp_path, '--T=8').close()
    assert (tmp_path / 'flagfile.txt').read_text() == '--T=8\n'
    (tmp_path / 'flagfile.txt').rename(tmp_path / 'renamed')
    (tmp_path / 'flagfile.txt').mkdir()
    with pytest.raises(UserError, match='has a folder flagfile.txt, where a run writes a file'):
        Folder(tmp_path, '')


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    """Of its own files; the user's stay."""
    for name in ('ckpt_3.pt.x1.tmp', 'metrics.jsonl.x2.tmp', 'flagfile.txt.x3.tmp'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'ckpt.pt').write_text('half')
    (tmp_path / 'notes.tmp').write_text('mine')
    Folder(tmp_path, '').close()
    assert sorted(os.listdir(str(tmp_path))) == ['.lock', 'flagfile.txt', 'notes.tmp']


# Signals

def test_stop(monkeypatch):
    """The first signal is remembered; one that comes two seconds later or more ends the process."""
    codes, stop = [], Stop()
    monkeypatch.setattr(os, '_exit', codes.append)
    with stop:
        assert not stop.asked()
        signal.raise_signal(signal.SIGTERM)
        stop.since -= 1.5
        signal.raise_signal(signal.SIGINT)      # passed on by a launcher
        assert stop.asked() == signal.SIGTERM and not codes
    with stop:                                  # the next stage of a chain
        assert stop.asked() == signal.SIGTERM
        stop.since -= .6
        signal.raise_signal(signal.SIGINT)
    assert codes == [130]


@pytest.mark.parametrize('before, asked', [(signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)])
def test_hangup_is_ignored_under_nohup(request, before, asked):
    ours = signal.signal(signal.SIGHUP, before)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, ours))
    with Stop() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.asked() == asked
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_run_whose_study_was_killed_stops(monkeypatch):
    for parent, expected in (os.getppid(), 0), (os.getpid(), signal.SIGTERM):
        monkeypatch.setenv('RDD_PARENT', str(parent))
        with Stop() as stop:
            assert stop.asked() == expected


@pytest.mark.parametrize('on_gpus, compared', [(False, range(1, 26)), (True, [10, 20, 25])])
def test_processes_agree(monkeypatch, on_gpus, compared):
    """On CPUs after every step, on GPUs after every tenth and the last one."""
    monkeypatch.setattr(guard.distributed, 'on_gpus', lambda: on_gpus)
    monkeypatch.setattr(guard.distributed, 'largest', lambda received: step)
    for step in range(1, 26):
        assert Stop().asked(step, step == 25) == (step if step in compared else 0)
