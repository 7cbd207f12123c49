"""Plain forms of everything that is fast here: the same mathematics, one operation after another.

float32, eager, gradients by autograd, a loop over parameters. tests/test_fast.py checks the fast
forms against them, tools/bench.py measures both.
"""

import contextlib
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from losses import MemoryP2P, unit_pixels


def plain_attention(q, k, v):
    """softmax(q k^T / sqrt(C)) v with the whole matrix in memory."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def plain_intra(map_S, map_T, temperature=1., group=None):
    """IS_P2P with all similarities of a group in memory; the gradient by autograd."""
    B, _, H, W = map_S.shape
    group, total = group or B, 0.
    maps = (unit_pixels(m).split(group * H * W) for m in (map_S, map_T.detach()))
    for F_S, F_T in zip(*maps):
        log_p_S, log_p_T = ((f @ f.t() / temperature).view(len(f), group, H * W).log_softmax(2)
                            for f in (F_S, F_T))
        total = total + F.kl_div(log_p_S, log_p_T, reduction='sum', log_target=True)
    return total / (B * H * W * group)


class PlainMemory(MemoryP2P):
    """M_P2P with the similarities to the whole contrast set in memory; gradient by autograd."""

    def forward(self, map_S, map_T):
        F_S, F_T = unit_pixels(self.project_head(map_S)), unit_pixels(map_T.detach())
        log_p_S, log_p_T = ((f @ self.queue[self.contrast].t() / self.contrast_temperature
                             / self.temperature).log_softmax(1) for f in (F_S, F_T))
        return F.kl_div(log_p_S, log_p_T, reduction='batchmean', log_target=True)


def plain_adam(params, lr, wd):
    """One parameter after another."""
    return torch.optim.Adam(params, lr=lr, weight_decay=wd, foreach=False, fused=False)


def plain_clip(params, grad_clip):
    return torch.nn.utils.clip_grad_norm_(params, grad_clip or float('inf'), foreach=False)


def plain_step(optim, finite, lr=None):
    """Every update is applied."""
    for group in optim.param_groups:
        group['lr'] = group['lr'] if lr is None else lr
    optim.step()
    optim.zero_grad(set_to_none=True)


@torch.no_grad()
def plain_ema(ema, model, decay):
    for e, p in zip(ema.parameters(), model.parameters()):
        e.copy_(e * decay + p * (1 - decay))


def plain_frechet(features, probs, mean, cov):
    """As pytorch-fid: covariance of all features, root of a product without symmetry."""
    from scipy.linalg import sqrtm
    features = features.double().cpu().numpy()
    mu, sigma = features.mean(0), np.cov(features, rowvar=False)
    trace = np.trace(sigma + cov - 2 * sqrtm(sigma @ cov).real)
    return np.sum((mu - mean) ** 2) + trace


def no_autocast(amp, device):
    return contextlib.nullcontext()


def no_compile(*args, **how):
    pass


# name of a fast form, wherever it is imported: its plain form
FORMS = dict(adam=plain_adam, clip_gradient=plain_clip, step_optimizer=plain_step,
             ema_update=plain_ema, intra_sample_p2p=plain_intra, MemoryP2P=PlainMemory,
             frechet=plain_frechet, autocast=no_autocast, compile_networks=no_compile,
             prepare=no_compile)


@contextlib.contextmanager
def plain(*modules):
    """Inside, everything that `modules` compute is plain: see `FORMS`.

    Networks are made in contiguous memory, attention is not fused, and a GPU does not round to
    TF32, as torch does by default.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, form in FORMS.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, form))
        stack.enter_context(mock.patch.object(torch, 'channels_last', torch.contiguous_format))
        stack.enter_context(mock.patch.object(F, 'scaled_dot_product_attention', plain_attention))
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        yield
