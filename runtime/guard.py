"""What protects a run: the lock of its folder, and an orderly end after a signal."""

import fcntl
import os
import shutil
import signal
import socket
import time
from pathlib import Path

from runtime import distributed, flags
from runtime.cli import UserError
from runtime.files import replacing

GPU_STEPS = 10      # between two looks at the signals of other processes, which take long there
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


class Folder:
    """The folder of a run, held by this process until `close`, or until the process ends."""

    def __init__(self, path, flagfile):
        """Create and lock it, write flagfile.txt; UserError if that fails or it is not a run's."""
        self.path, self.file, problem = Path(path), None, None
        if distributed.is_main():
            try:
                problem = self._take(flagfile)
            except OSError as error:
                problem = f'cannot be written to ({error.strerror})'
        problem = distributed.broadcast_object(problem)
        if problem:
            self.close()
            raise UserError(f'{flags.folder_flag()} {path} {problem}; choose another')

    def _take(self, flagfile):
        """Do so, or return what is in the way. The system frees the lock of a dead process."""
        self.path.mkdir(parents=True, exist_ok=True)
        ours = (self.path / '.lock').exists() or (self.path / 'ckpt.pt').exists()
        for name in ('ckpt.pt', 'metrics.jsonl', 'flagfile.txt', '.lock'):
            if (self.path / name).is_dir():
                return f'has a folder {name}, where a run writes a file'
            if not ours and (self.path / name).exists():
                return f'has a file {name} that no run has written, and would overwrite it'
        self.file = open(self.path / '.lock', 'a+')
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            return f'is in use by {self.file.read().strip() or "another run"}'
        except OSError:
            pass        # a file system without locks
        self.file.truncate(0)
        self.file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
        self.file.flush()
        for pattern in ('ckpt*.tmp', 'metrics.jsonl.*.tmp', 'flagfile.txt.*.tmp'):
            for left in self.path.glob(pattern):        # by processes that were killed
                left.unlink() if left.is_file() else shutil.rmtree(left, ignore_errors=True)
        with replacing(self.path / 'flagfile.txt') as temporary:
            temporary.write_text(flagfile + '\n', encoding='utf-8')
        return None

    def close(self):
        if self.file:
            self.file.close()


class Stop:
    """SIGTERM, SIGINT or SIGHUP, sent to any process, asks the run to end after the current step.

    Active inside `with stop:`. A signal is remembered, so that the next stage of a chain stops too.
    """

    def __init__(self):
        self.received, self.since, self.before = 0, 0., {}

    def __enter__(self):
        for number in SIGNALS:
            under_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not under_nohup:
                self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _receive(self, number, frame):
        if not self.received:
            self.received, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 2:     # not the same request, passed on by a launcher
            os._exit(128 + number)

    def asked(self, step=0, last=True):
        """The signal on which all processes end after `step`, or 0.

        They compare what they received: after every step on CPUs, every tenth and the last on GPUs.
        """
        if os.environ.get('RDD_PARENT') not in (None, str(os.getppid())):
            self.received = self.received or signal.SIGTERM     # study.py or demo.py was killed
        if distributed.on_gpus() and step % GPU_STEPS and not last:
            return 0
        return distributed.largest(self.received)


stop = Stop()       # one for the process, as signal handlers are
