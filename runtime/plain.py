"""The fast paths and the plain ones they are measured and tested against: the same mathematics.

Plain is float32, eager, one operation after another, gradients by autograd, as published.
"""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F

from losses import MemoryP2P, intra_sample_p2p, unit_pixels
from runtime import training
from score import ActivationStats, frechet_distance


class Fast:
    """What the scripts do."""
    name, context, Memory = 'fast', contextlib.nullcontext, MemoryP2P
    memory_format = torch.channels_last
    adam = staticmethod(training.adam)
    ema = staticmethod(training.ema_update)
    intra = staticmethod(intra_sample_p2p)

    def __init__(self, device, amp='none', compile=False):
        self.device, self.amp, self.compile = device, amp, compile

    def network(self, network):
        network = network.to(self.device, memory_format=self.memory_format)
        training.compile_networks(self.compile, self.device, network)
        return network

    def autocast(self):
        return training.autocast(self.amp, self.device)

    def update(self, optim, params, grad_clip):
        training.step_optimizer(optim, training.clip_gradient(params, grad_clip).isfinite())

    def frechet(self, features, probs, other):
        stats = ActivationStats(len(features))
        stats.update(features, probs, torch.arange(len(features)))
        return frechet_distance(*stats.reduce().mean_cov(), *other)


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


@torch.no_grad()
def plain_ema(ema, model, decay):
    """One parameter after another."""
    for e, p in zip(ema.parameters(), model.parameters()):
        e.copy_(e * decay + p * (1 - decay))


class Plain(Fast):
    """float32, contiguous, eager; a loop over parameters; no hand-written gradient."""
    name, Memory = 'plain', PlainMemory
    memory_format = torch.contiguous_format
    ema, intra = staticmethod(plain_ema), staticmethod(plain_intra)

    @contextlib.contextmanager
    def context(self):
        fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, plain_attention
        cudnn = torch.backends.cudnn
        allowed, cudnn.allow_tf32 = cudnn.allow_tf32, False     # torch's default rounds to TF32
        try:
            yield
        finally:
            F.scaled_dot_product_attention, cudnn.allow_tf32 = fused, allowed

    def __init__(self, device):
        super().__init__(device)

    def adam(self, params, lr, wd):
        return torch.optim.Adam(params, lr=lr, weight_decay=wd, foreach=False, fused=False)

    def update(self, optim, params, grad_clip):
        torch.nn.utils.clip_grad_norm_(params, grad_clip or float('inf'), foreach=False)
        optim.step()
        optim.zero_grad(set_to_none=True)

    def frechet(self, features, probs, other):
        """As pytorch-fid: covariance of all features, root of a product without symmetry."""
        from scipy.linalg import sqrtm
        features = features.double().cpu().numpy()
        mu, sigma = features.mean(0), np.cov(features, rowvar=False)
        trace = np.trace(sigma + other[1] - 2 * sqrtm(sigma @ other[1]).real)
        return np.sum((mu - other[0]) ** 2) + trace
