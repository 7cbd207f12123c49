"""Runs scripts as `python script ...` would, each in a fork of one process that has loaded torch.

Reads lines of JSON {name: [command, ..]}: lists side by side, their commands one after another.
Answers with lines {name: [[exit code, stdout, stderr], ..]}. A command has `argv` and may have:
  cwd, env         working directory, further environment variables
  ranks            number of processes, with the environment that a launcher gives them
  kill_after_save  the process dies as by kill -9 right after its first checkpoint
  signal           [number, file, lines]: the last process and its worker processes get this signal
                   as soon as `file` has that many lines
  last             the `argv` of all processes but the first, if they have another one
"""

import importlib
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context('fork')
SIDE_BY_SIDE = 1 if 'PYTEST_XDIST_WORKER' in os.environ else 2      # two cores


def preload():
    """Everything slow to import that defines no flags and starts no thread."""
    for name in ('sklearn.datasets', 'tensorboardX', 'torch._dynamo', 'classifier', 'losses',
                 'training', 'score.metrics', 'score.networks', 'score.reference'):
        importlib.import_module(name)
    from runtime.torchvision_cpu import torchvision
    torchvision()


def die_after_save():
    """The first checkpoint is the last thing that this process does."""
    from runtime import checkpoint
    save = checkpoint.save

    def save_and_die(*args):
        save(*args)
        sys.stdout.flush()
        os._exit(137)

    checkpoint.save = save_and_die


def run_script(command, argv, env, out, err):
    """What a forked process does: it runs the script `argv`, which prints into two files."""
    for number, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    if 'signal' in command:
        os.setsid()     # a process group of its own
    script = str(ROOT / argv[0])
    os.environ.update(env)
    os.chdir(command.get('cwd', str(ROOT)))
    sys.argv, sys.path[0] = argv, os.path.dirname(script)
    if command.get('kill_after_save'):
        die_after_save()
    runpy.run_path(script, run_name='__main__')


def send_signal(process, number, file, lines):
    """Send a signal as soon as `file` has that many lines, unless the process ends before."""
    while not (Path(file).exists() and Path(file).read_text().count('\n') >= lines
               and os.getpgid(process.pid) == process.pid):      # it has begun: os.setsid
        if not process.is_alive():
            return
        time.sleep(.005)
    os.killpg(process.pid, number)


def run(command, folder):
    """[exit code, stdout, stderr] of a command, of its first process if it has several."""
    processes = []
    ranks = command.get('ranks', 1)
    env = dict(command.get('env', {}))
    with socket.create_server(('127.0.0.1', 0)) as free:
        launched = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]),
                        WORLD_SIZE=str(ranks))
    for rank in range(ranks):
        if ranks > 1:
            env.update(launched, RANK=str(rank), LOCAL_RANK=str(rank))
        argv = command.get('last', command['argv']) if rank else command['argv']
        processes.append(FORK.Process(target=run_script, args=(
            command, argv, env, f'{folder}/out{rank}', f'{folder}/err{rank}')))
        processes[-1].start()
    if 'signal' in command:
        send_signal(processes[-1], *command['signal'])
    for process in processes:
        process.join()
    code = max((process.exitcode for process in processes), key=abs)     # negative for a signal
    return [code, Path(folder, 'out0').read_text(), Path(folder, 'err0').read_text()]


def run_list(commands):
    with tempfile.TemporaryDirectory() as folder:
        return [run(command, folder) for command in commands]


if __name__ == '__main__':
    sys.path[0] = str(ROOT)
    preload()
    for line in sys.stdin:
        jobs = json.loads(line)
        with ProcessPoolExecutor(SIDE_BY_SIDE, FORK) as pool:
            print(json.dumps(dict(zip(jobs, pool.map(run_list, jobs.values())))), flush=True)
