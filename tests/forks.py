"""Runs scripts as `python script ...` would, each in a fork of one process that has loaded torch.

Standard input: JSON {name: [command, ..]}. The commands of a list run one after another, the lists
side by side. Standard output: JSON {name: [[exit code, stdout, stderr], ..]}. A command has `argv`
and may have:
  cwd, env         working directory, further environment variables
  ranks            number of processes, with the environment that a launcher gives them
  kill_after_save  the process dies as by kill -9 right after its first checkpoint
  signal           [number, file, lines]: the last process gets this signal as soon as `file` has
                   that many lines
  group            the signal goes to the worker processes of the last process as well
  last             the `argv` of the last process, if it has another one
"""

import json
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
SIDE_BY_SIDE = 1 if 'PYTEST_XDIST_WORKER' in os.environ else 2      # two cores


def preload():
    """Everything slow to import that defines no flags and starts no thread."""
    import sklearn.datasets  # noqa: F401
    import tensorboardX  # noqa: F401
    import torch._dynamo  # noqa: F401  # what optimisers import when first built
    import classifier  # noqa: F401
    import losses  # noqa: F401
    import training  # noqa: F401
    from score import metrics, networks, reference      # noqa: F401
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


def child(command, argv, out, err, env):
    """What a forked process does: it runs the script and ends.

    Args:
        argv: words of the command line.
        out, err: files for its standard output and error. env: further environment variables.
    """
    code = 1
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(env)
        script = str(ROOT / argv[0])
        os.chdir(command.get('cwd', str(ROOT)))
        sys.argv, sys.path[0] = argv, os.path.dirname(script)
        if command.get('kill_after_save'):
            die_after_save()
        if command.get('group'):
            os.setsid()
        runpy.run_path(script, run_name='__main__')
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def send(pid, number, file, lines, group=False):
    """Send a signal as soon as `file` has that many lines, unless the process ends before."""
    while not (Path(file).exists() and Path(file).read_text().count('\n') >= lines):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(.005)
    (os.killpg if group else os.kill)(pid, number)


def exit_code(status):
    """As `subprocess` gives it: negative for a signal."""
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)


def run(command, folder):
    """[exit code, stdout, stderr] of a command, of its first process if it has several."""
    ranks, pids = command.get('ranks', 1), []
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    for rank in range(ranks):
        env = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank),
                   LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks)) if ranks > 1 else {}
        env.update(command.get('env', {}))
        out, err = (str(folder / f'{name}{rank}') for name in ('out', 'err'))
        pids.append(os.fork())
        if not pids[-1]:
            argv = command.get('last') if rank and rank + 1 == ranks else None
            child(command, argv or command['argv'], out, err, env)
    if 'signal' in command:
        send(pids[-1], *command['signal'], group='group' in command)
    codes = [exit_code(os.waitpid(pid, 0)[1]) for pid in pids]
    texts = [(folder / name).read_text() for name in ('out0', 'err0')]
    return [max(codes, key=abs)] + texts


def run_list(commands, path):
    """Run commands one after another, and write their results to `path` as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        results = [run(command, Path(folder)) for command in commands]
    Path(path).write_text(json.dumps(results))


def main():
    jobs = json.load(sys.stdin)
    preload()
    with tempfile.TemporaryDirectory() as folder:
        running = 0
        for i, commands in enumerate(jobs.values()):
            if running == SIDE_BY_SIDE:
                os.wait()
                running -= 1
            if not os.fork():
                run_list(commands, f'{folder}/{i}')
                os._exit(0)
            running += 1
        for _ in range(running):
            os.wait()
        print(json.dumps({name: json.loads(Path(f'{folder}/{i}').read_text())
                          for i, name in enumerate(jobs)}))


if __name__ == '__main__':
    main()
