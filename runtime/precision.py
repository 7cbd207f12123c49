"""How the networks are computed: bfloat16 autocast and torch.compile."""

from pathlib import Path

import torch

from runtime.cli import UserError

TORCH = tuple(int(part) for part in torch.__version__.split('.')[:2])


def autocast(amp, device):
    """Autocast context for the networks: 'none', 'bf16', or 'auto': bf16 where it is fast."""
    enabled = amp == 'bf16' or (amp == 'auto' and has_fast_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def has_fast_bf16(device):
    """Whether the hardware multiplies bfloat16 matrices: tensor cores, or AMX on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        return 'amx_bf16' in Path('/proc/cpuinfo').read_text()
    except OSError:
        return False


def compile_networks(enabled, device, *networks):
    """If `enabled`, torch.compile `networks` in place: their parameters keep their names.

    Compiling happens in the first call. Shapes are fixed, so that a grid of another size compiles
    a graph of its own and does not slow down training.
    Raises:
        UserError: this machine cannot compile; found out with a single number (code 1).
    """
    if not enabled:
        return
    try:
        if TORCH < (2, 2):      # several graphs per network
            raise RuntimeError('it needs torch 2.2')
        torch.compile(torch.exp, dynamic=False)(torch.zeros(1, device=device))
        for network in networks:
            network.compile(dynamic=False)
    except Exception as error:      # what it raises depends on what is missing, and on the version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f'--compile does not work here, with torch {torch.__version__} ({reason}); '
                        f'leave it out', code=1)
