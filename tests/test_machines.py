"""Several machines: one torchrun on each, meeting at an address; here two launchers on one."""

import subprocess
import sys

from helpers import BASE, ROOT, environment, port
from runtime import checkpoint


def launcher(node, number, logdir):
    """torchrun on machine `node`; they meet at port `number` of the first one."""
    return [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1',
            '--rdzv_id=7', '--rdzv_backend=c10d', f'--rdzv_endpoint=127.0.0.1:{number}',
            f'--rdzv_conf=is_host={int(node == 0)}', '--local_addr=127.0.0.1', *BASE,
            f'--logdir={logdir}']


def test_two_launchers(tmp_path):
    """One run of two processes, of which the first machine's prints and writes."""
    number = port()
    nodes = [subprocess.Popen(launcher(node, number, tmp_path / 'run'), cwd=str(ROOT),
                              env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True)
             for node in (0, 1)]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sorted('2 processes over gloo' in out for out, _ in outputs) == [False, True]
    assert checkpoint.read(tmp_path / 'run')['step'] == 4
