"""Several machines: one torchrun on each, meeting at an address; here two launchers on one machine.

As root, also two network namespaces, which share nothing but a cable between them.
"""

import os
import shutil
import subprocess
import sys

import pytest

from helpers import BASE, ROOT, environment, port
from runtime import checkpoint

ADDRESSES = '10.213.7.1', '10.213.7.2'


def launcher(node, own, first, number, logdir):
    """torchrun on machine `node` with address `own`; they meet at `number` of the `first` one."""
    return [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1',
            '--rdzv_id=7', '--rdzv_backend=c10d', f'--rdzv_endpoint={first}:{number}',
            f'--rdzv_conf=is_host={int(node == 0)}', f'--local_addr={own}', *BASE,
            f'--logdir={logdir}']


def run_both(commands, **env):
    """Two commands side by side; the standard output of both."""
    nodes = [subprocess.Popen(command, cwd=str(ROOT), env=environment(**env),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True)
             for command in commands]
    said = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    return [out for out, _ in said]


def check(outs, logdir):
    """Both were one run of two processes, of which the first machine's spoke and wrote."""
    assert sorted('2 processes over gloo' in out for out in outs) == [False, True]
    assert checkpoint.read(logdir)['step'] == 4


def test_two_launchers(tmp_path):
    number = port()
    here = '127.0.0.1'
    check(run_both([launcher(node, here, here, number, tmp_path / 'run') for node in (0, 1)]),
          tmp_path / 'run')


@pytest.fixture
def namespaces():
    """Two network namespaces with a cable between them."""
    names = [f'rdd{os.getpid()}{end}' for end in 'ab']

    def ip(*words):
        subprocess.run(['ip', *words], check=True, stderr=subprocess.PIPE)

    if not shutil.which('ip') or os.geteuid():
        pytest.skip('network namespaces need root and the command ip')
    try:
        for name in names:
            ip('netns', 'add', name)
        ip('link', 'add', 'cable', 'netns', names[0], 'type', 'veth', 'peer', 'name', 'cable',
           'netns', names[1])
        for name, address in zip(names, ADDRESSES):
            ip('-n', name, 'addr', 'add', f'{address}/24', 'dev', 'cable')
            for device in ('lo', 'cable'):
                ip('-n', name, 'link', 'set', device, 'up')
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f'network namespaces cannot be made here: {error.stderr}')
    finally:
        for name in names:
            subprocess.run(['ip', 'netns', 'del', name], stderr=subprocess.DEVNULL)


def test_two_namespaces(namespaces, tmp_path):
    number = port()
    commands = [['ip', 'netns', 'exec', name,
                 *launcher(node, ADDRESSES[node], ADDRESSES[0], number, tmp_path / 'run')]
                for node, name in enumerate(namespaces)]
    check(run_both(commands, GLOO_SOCKET_IFNAME='cable'), tmp_path / 'run')
