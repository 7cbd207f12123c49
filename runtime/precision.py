"""How the networks are computed: bfloat16 autocast and torch.compile."""

from pathlib import Path

import torch
from torch import nn

from runtime.cli import UserError, first_line

TORCH = tuple(int(part) for part in torch.__version__.split('.')[:2])
FINE = 64       # steps above which alpha / sigma times the rounding is too much of an error in eps


def choose(amp, device, steps=0):
    """'none' or 'bf16': what 'auto' means on this device, for a student with `steps` steps."""
    if amp == 'bf16' and device.type == 'cuda' and not has_fast_bf16(device):
        raise UserError('--amp is bf16, which GPUs before Ampere cannot compute; set --amp auto')
    if amp != 'auto':
        return amp
    return 'bf16' if has_fast_bf16(device) and steps <= FINE else 'none'


def autocast(amp, device):
    """Autocast context for the networks: 'none', 'bf16', or 'auto': bf16 where it is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=choose(amp, device) == 'bf16')


def has_fast_bf16(device):
    """Whether the hardware multiplies in bfloat16: tensor cores; AMX or AVX512-BF16 of a CPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device)[0] >= 8
    file = Path('/proc/cpuinfo')
    found = file.read_text() if file.exists() else ''
    return 'amx_bf16' in found or 'avx512_bf16' in found


def prepare(amp, compile, device, *networks, graphs=False):
    """Make frozen networks fast, in place: weights in the precision `amp`; `compile_networks`.

    Autocast would convert the weights of convolutions and linear layers at every call, to the same
    values. What a network computes `in_float32` is left alone.
    """
    for network in networks if amp == 'bf16' else ():
        apart = getattr(network, 'in_float32', ())
        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and not name.startswith(apart):
                if any(p.requires_grad for p in module.parameters()):
                    raise ValueError(f'{name} is trained; its weights stay in float32')
                module.bfloat16()
    compile_networks(compile, device, *networks, graphs=graphs)


def compile_networks(enabled, device, *networks, graphs=False):
    """If `enabled`, torch.compile `networks` in place, for fixed shapes; UserError if that fails.

    graphs: on a GPU, replay each call as one CUDA graph. For networks without gradients whose
        output is used up before the next call, which overwrites it.
    """
    if not enabled:
        return
    try:
        if TORCH < (2, 2):      # several graphs per network
            raise RuntimeError('it needs torch 2.2')
        mode = dict(mode='reduce-overhead') if graphs and device.type == 'cuda' else {}
        torch.compile(torch.exp, dynamic=False)(torch.zeros(1, device=device))      # a test
        for network in networks:
            network.compile(dynamic=False, **mode)
    except Exception as error:      # what it raises depends on what is missing, and on the version
        raise UserError(f'--compile does not work here, with torch {torch.__version__} '
                        f'({first_line(error)}); leave it out', code=1)
