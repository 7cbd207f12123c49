"""Helpers for optimisation: learning rate, Adam, steps that are not finite, averaged weights."""

import math

import torch

from runtime.precision import TORCH


def learning_rate(step, lr, warmup, total_steps, decay):
    """Rate of step 1, 2, ..: linear warm-up, then constant, or a cosine to 0 if `decay`."""
    rate = lr * min(1., step / warmup) if warmup else lr
    if decay:
        rate *= 0.5 * (1 + math.cos(math.pi * (step - 1) / total_steps))
    return rate


def adam(params, lr, wd, betas=(.9, .999)):
    """Adam as one fused kernel, where this torch has it for the device of `params` (a list)."""
    fused = params[0].is_cuda or TORCH >= (2, 4)
    return torch.optim.Adam(params, lr=lr, betas=betas, weight_decay=wd, fused=fused)


def sgd(params, lr, wd, nesterov):
    """SGD with momentum 0.9; fused on GPUs, see `step_optimizer` (on CPUs it has other bits)."""
    how = dict(lr=lr, momentum=0.9, weight_decay=wd, nesterov=nesterov)
    if not params[0].is_cuda or TORCH < (2, 3):
        return torch.optim.SGD(params, **how)
    optim = torch.optim.SGD(params, fused=True, **how)
    for p in params:        # a first step that is skipped would leave them uninitialised
        optim.state[p]['momentum_buffer'] = torch.zeros_like(p)
    return optim


def clip_gradient(params, grad_clip):
    """Scale the gradient to a norm of at most `grad_clip` (0: leave it); returns its norm."""
    return torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)


def step_optimizer(optim, finite, lr=None):
    """One update, skipped where `finite` (a bool tensor) is False; then empties the gradient.

    Fused kernels skip it themselves where the tensor `optim.found_inf` is not 0, as for GradScaler:
    the host does not wait for the device.
    """
    if lr is not None:
        for group in optim.param_groups:
            group['lr'] = lr
    if optim.param_groups[0].get('fused'):
        optim.found_inf = (~finite).float()
        optim.step()
    elif finite:
        optim.step()
    optim.zero_grad(set_to_none=True)


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, over the trained parameters."""
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_([e for e, _ in pairs], [p for _, p in pairs], 1 - decay)


def frozen(module):
    """`module` in eval mode, without gradients."""
    return module.eval().requires_grad_(False)
