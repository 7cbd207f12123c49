"""What protects a run: the lock of its folder, and an orderly end after a signal."""

import errno
import fcntl
import os
import signal
import socket
import time
from pathlib import Path

from runtime import cli, distributed
from runtime.cli import UserError


AGREE_EVERY = 10 ** 9 // 4          # nanoseconds
MOST_STEPS = 50         # between two looks at the signals of other processes


class Folder:
    """The folder of a run, held by this process until `close`, or until the process ends."""

    def __init__(self, path, flagfile, flag='--logdir'):
        """Create the folder, lock it and write `flagfile` (text) to flagfile.txt in it.

        The first process does this for all.
        Args:
            flag: the flag that names the folder, for messages.
        Raises:
            UserError: it cannot be written to, or another run uses it.
        """
        self.path, self.file, problem = Path(path), None, None
        if distributed.is_main():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                problem = self._folder_in_place_of_a_file() or self._lock()
                if not problem:
                    (self.path / 'flagfile.txt').write_text(flagfile + '\n')
            except OSError as error:
                problem = f'cannot be written to ({error.strerror})'
        problem = distributed.broadcast_object(problem)
        if problem:
            self.close()
            raise UserError(f'{flag} {path} {problem}; choose another')

    def _folder_in_place_of_a_file(self):
        """What is wrong if a file that a run writes is a folder, or None."""
        for name in ('ckpt.pt', 'metrics.jsonl', 'flagfile.txt', '.lock'):
            if (self.path / name).is_dir():
                return f'has a folder {name}, where a run writes a file'
        return None

    def _lock(self):
        """Take the lock, or say which process has it. The system frees it if the process dies."""
        self.file = open(self.path / '.lock', 'a+')
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None     # a file system without locks
            self.file.seek(0)
            return f'is in use by {self.file.read().strip() or "another run"}'
        self.file.truncate(0)
        self.file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
        self.file.flush()
        return None

    def close(self):
        if self.file:
            self.file.close()


class Stop:
    """SIGTERM or SIGINT, sent to any process, asks the run to end after the current step.

    Of several processes, all end after the same step, within about a quarter of a second.

    Active inside `with stop:`; the handlers from before are restored on leaving. What was received
    is remembered, so that the next stage of a chain stops as well.
    """

    def __init__(self):
        self.received, self.since, self.before = 0, 0., {}
        self.next, self.agreed = 0, (time.monotonic(), None)    # step; time and step of the last

    def __enter__(self):
        self.next, self.agreed = 0, (time.monotonic(), None)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            if handler is not None:     # None: not installed from Python
                signal.signal(number, handler)

    def _receive(self, number, frame):
        now = time.monotonic()
        if not self.received:
            self.received, self.since = number, now
            # loader workers may get the signal as well; their end is not an error then
            self.before.setdefault(signal.SIGCHLD, signal.getsignal(signal.SIGCHLD))
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        elif now - self.since > 2:      # not the same request, passed on by a launcher
            os._exit(128 + number)

    def asked(self, step=0, last=True):
        """The signal on which all processes end after `step`, or 0.

        Several processes agree about four times a second, and in the `last` step: a collective
        operation of the hosts in every step would take longer the more there are. They measure the
        time of a step together, and so leave out the same steps.
        """
        if distributed.world_size() == 1:
            return self.received
        if not last and step < self.next:
            return 0
        then, before = self.agreed
        self.agreed = time.monotonic(), step
        steps = 1 if before is None else max(1, step - before)      # a resumed run starts anywhere
        nanoseconds = round(1e9 * (self.agreed[0] - then) / steps)
        received, slowest = distributed.largest(self.received, nanoseconds)
        self.next = step + min(MOST_STEPS, max(1, AGREE_EVERY // max(1, slowest)))
        return received


stop = Stop()       # one for the process, as signal handlers are


def leave_after(number, folder, step):
    """Say that the run was stopped by signal `number`, and exit with its code."""
    distributed.print0(f'{signal.Signals(number).name}: stopped after step {step}, saved in '
                       f'{folder}; run the same command again to go on.')
    distributed.cleanup()
    cli.leave(128 + number)
