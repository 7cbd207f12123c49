"""Commands that a script starts, side by side, and that end when the script does."""

import os
import signal
import subprocess
import sys
import threading

from runtime.cli import ROOT, UserError


class Commands:
    """Python commands of this project, run by threads inside `with Commands() as commands:`.

    When the block is left by an exception, SIGTERM included, those that run get SIGTERM, and no
    other one starts.
    """

    def __init__(self):
        self.running, self.stopped, self.lock = set(), False, threading.Lock()

    def run(self, words, env=None, **how):
        """Exit code of `python words`; `env` and `how` as for subprocess.Popen."""
        env = dict(env or os.environ, RDD_PARENT=str(os.getpid()))      # see runtime/guard.py
        with self.lock:
            if self.stopped:
                return -signal.SIGTERM
            # a session of its own: Ctrl-C reaches this script alone, which sends SIGTERM once
            process = subprocess.Popen([sys.executable, '-u', str(ROOT / words[0]), *words[1:]],
                                       start_new_session=True, env=env, **how)
            self.running.add(process)
        code = process.wait()
        self.running.discard(process)
        return code

    def __enter__(self):
        def stop(number, frame):
            raise UserError(f'stopped by {signal.Signals(number).name}; run the same command again '
                            f'to go on', code=128 + number)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:      # as under nohup
                signal.signal(number, stop)
        return self

    def __exit__(self, kind, *_):
        if kind:
            with self.lock:
                self.stopped, running = True, list(self.running)
            for process in running:
                process.terminate()
            for process in running:     # trainings save before they end
                process.wait()
