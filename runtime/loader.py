"""Work that processes do ahead: decoding, reading and augmenting images."""

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from runtime.cli import UserError


def in_workers(function, items, num_workers):
    """Yield function(item) of every item in their order; processes compute a few ahead.

    Results travel through pipes, so that a container with little shared memory will do.
    """
    if not num_workers:
        yield from map(function, items)
        return
    try:
        pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context('fork'),
                                   _start_worker, (function,))
    except OSError as error:
        raise UserError(f'no worker process could be started ({error.strerror}); enlarge /dev/shm '
                        f'if it is full (docker --shm-size), or set --num_workers 0', code=1)
    with pool:
        futures = (pool.submit(_work, item) for item in items)
        ahead = collections.deque(itertools.islice(futures, 2 * num_workers))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(itertools.islice(futures, 1))
        except BrokenProcessPool:
            for process in multiprocessing.active_children():
                process.kill()
            raise UserError('a process that reads images was killed, as happens when memory runs '
                            'out; set --num_workers 0 and run the same command again', code=1)
        finally:
            for future in ahead:
                future.cancel()


def _start_worker(function):
    """Keep the function, which may hold a million paths; outlive signals, but not the parent."""
    global _function
    _function = function
    torch.set_num_threads(1)
    # those of a terminal or launcher reach workers as well, whose images finish a step
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work(item):
    return _function(item)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
