"""Processes: all calls of `torch.distributed`, with NCCL on GPUs, gloo on CPUs, or no launcher."""

import contextlib
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from runtime import flags
from runtime.cli import UserError, first_line, print0


def init(gpu_id=None, tf32='conv'):
    """Join the process group if a launcher made one; return this process's `torch.device`.

    Args:
        gpu_id: '0,1,2,3' as for CUDA_VISIBLE_DEVICES, or None/'' to keep that of the environment.
        tf32: whose inputs GPUs since Ampere round to TF32, 10 bits after the point: 'none', 'conv':
            of convolutions (torch's default), 'all': of matrix products as well.
    """
    if gpu_id:
        os.environ['CUDA_VISIBLE_DEVICES'] = gpu_id     # acts because CUDA is not initialised yet
    for name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'):   # of the launcher
        value = os.environ.get(name, '0')
        if not value.isdigit():
            raise UserError(f'the environment variable {name} is "{value}", expected a whole '
                            f'number; unset it, or start with torchrun')
    processes = int(os.environ.get('WORLD_SIZE', 1))
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    wanted = int(os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1))
    cuda = torch.cuda.is_available()
    if cuda and wanted > torch.cuda.device_count():
        raise UserError(f'{wanted} processes were started and only {torch.cuda.device_count()} '
                        f'GPUs are visible; start fewer, or name more GPUs in --gpu_id')
    if gpu_id and not cuda and Path('/proc/driver/nvidia/gpus').is_dir():
        raise UserError(f'--gpu_id {gpu_id} names no GPU of this machine that torch can use; give '
                        f'numbers that nvidia-smi lists, or leave the flag out')
    device = torch.device('cuda', local_rank) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
        set_up_gpu(tf32)
    if processes > 1 and not dist.is_initialized():
        join(device, processes)
    if 'WORLD_SIZE' not in os.environ and os.environ.get('SLURM_NTASKS', '1') != '1':
        print0(f'note: Slurm has {os.environ["SLURM_NTASKS"]} tasks and this is a run of one '
               f'process; several are started by torchrun, see docs/slurm.sh.')
    if not cuda:
        backend = f', {processes} processes over gloo' if processes > 1 else ''
        print0(f'No GPU found: running on the CPU{backend}.')
    return device


def set_up_gpu(tf32):
    """Set how GPUs compute float32, see `init`, and let cuDNN try its convolutions."""
    torch.backends.cudnn.allow_tf32 = tf32 != 'none'
    torch.backends.cuda.matmul.allow_tf32 = tf32 == 'all'
    torch.backends.cudnn.benchmark = True


def join(device, processes):
    """Meet the other processes at the address that the launcher gives, and compare with them."""
    global _hosts
    backend, timeout = ('nccl', TIMEOUT_NCCL) if device.type == 'cuda' else ('gloo', TIMEOUT)
    address = f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}'
    print0(f'waiting for all of {processes} processes at {address}', rank='LOCAL_RANK')
    try:
        store, number, processes = next(dist.rendezvous('env://'))
        store.set_timeout(TIMEOUT)
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            # torchrun restarts workers on the same store, where the dead have left addresses
            store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        dist.init_process_group(backend, store=store, rank=number, world_size=processes,
                                timeout=timeout)
        _hosts = None if backend == 'gloo' else dist.new_group(backend='gloo', timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f'the {processes} processes could not meet at {address}: '
                        f'{first_line(error)}; use a free --master_port and an address that all '
                        f'machines reach, or set GLOO_SOCKET_IFNAME', code=1)
    check_agreement()


def check_agreement():
    """Refuse processes that run another script or other flags than the first one."""
    mine = [Path(sys.argv[0]).name, *flags.resolved(apart=OWN_FLAGS).split('\n')]
    for other in gather_objects(mine):
        if other != mine:
            different = ', '.join(sorted(set(mine) ^ set(other))[:4])
            raise UserError(f'the processes were started with different scripts or flags '
                            f'({different}); give all of them the same command')


# Timeouts. gloo: the first process may spend hours converting a data set. NCCL: short, so that a
# hung collective fails early.
TIMEOUT = timedelta(hours=6)
TIMEOUT_NCCL = timedelta(minutes=30)
OWN_FLAGS = 'gpu_id', 'data_root', 'num_workers'     # may differ between machines
_hosts = None       # group for numbers that live on the host; None: the default group
# newest torch renames broadcast_buffers and all_reduce; torch 2.1 has these alone
warnings.filterwarnings('ignore', category=FutureWarning, module=__name__)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def on_gpus():
    """Whether the processes meet over NCCL."""
    return dist.is_initialized() and dist.get_backend() == 'nccl'


def barrier():
    """Wait until all processes have come this far, on the hosts."""
    if dist.is_initialized():
        dist.barrier(group=_hosts)


def cleanup():
    """Leave the process group when all have come this far; safe without one."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def main_first(of_machine=False):
    """The first process, or the first of each machine, runs the block alone, the others after."""
    first = int(os.environ.get('LOCAL_RANK', 0)) == 0 if of_machine else is_main()
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


def rows(total, micro=0, accum=1):
    """This process's rows of part `micro` of `accum` of a total batch, as a slice."""
    length = share(total, accum)
    start = (micro * world_size() + rank()) * length
    return slice(start, start + length)


def share(total, accum=1):
    """Images of a total batch that a process works on at a time."""
    return total // (world_size() * accum)


def all_reduce_sum(tensor):
    """Sum `tensor` over the processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest(number):
    """The largest of an integer over all processes, without touching a GPU."""
    if not dist.is_initialized():
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=_hosts)
    return int(value)


def mean_with_grad(tensor):
    """Mean over the processes, through which gradients flow back to every process."""
    if not dist.is_initialized():
        return tensor
    from torch.distributed.nn.functional import all_reduce
    return all_reduce(tensor) / world_size()


def gather_objects(value):
    """The `value` (any picklable object) of every process, in order, on all; not by the GPUs."""
    if not dist.is_initialized():
        return [value]
    found = [None] * world_size()
    dist.all_gather_object(found, value, group=_hosts)
    return found


def broadcast_object(value):
    """The first process's `value` on every process."""
    return gather_objects(value)[0]


def gather_main(tensor):
    """On the first process the tensors (on the CPU) of all, joined in order; None elsewhere."""
    if not dist.is_initialized():
        return tensor
    parts = [None] * world_size() if is_main() else None
    dist.gather_object(tensor, parts, group=_hosts)
    return torch.cat(parts) if is_main() else None


def wrap_ddp(module):
    """`module` with gradients averaged over the processes; itself when there is one process."""
    if not dist.is_initialized():
        return module
    ids = [torch.cuda.current_device()] if next(module.parameters()).is_cuda else None
    return nn.parallel.DistributedDataParallel(
        module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def sync_batch_norm(module):
    """Let the batch norms of `module` use the batch of all processes, in place; returns it."""
    if dist.is_initialized():
        for child in module.modules():
            if type(child) is nn.BatchNorm2d:
                child.__class__ = GlobalBatchNorm2d     # the same parameters under the same names
    return module


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, with its gradient; torch's wants GPUs."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.float()       # statistics of bfloat16 maps in float32
        mean = mean_with_grad(x.mean((0, 2, 3)))
        centred = x - mean[:, None, None]
        var = mean_with_grad(centred.square().mean((0, 2, 3)))
        count = x.numel() / x.shape[1] * world_size()
        with torch.no_grad():       # a step that is not finite leaves no trace
            finite, weight = (mean + var).isfinite(), self.momentum
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.where(finite, self.running_mean), weight)
            unbiased = var * count / max(count - 1, 1)      # one value: its variance is 0
            self.running_var.lerp_(unbiased.where(finite, self.running_var), weight)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(dtype)
