"""The losses of relational diffusion distillation. Weights are applied in the script.

feature (B, C), feature_map (B, C, H, W) and logits (B, K) come from a frozen classifier; suffix _T
is the teacher's target, _S the student's prediction. Everything is computed in float32.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

CHUNK_ENTRIES = 2 ** 22         # similarities of pixels held at a time


def feature_kl(feature_S, feature_T, temperature=1.):
    """CFD: KL(softmax(f_T / temperature) || softmax(f_S)), mean over the batch.

    Only the teacher is divided by the temperature (RCFD, Sun et al. 2023). Features (B, C).
    """
    log_p_T = F.log_softmax(feature_T.float() / temperature, dim=1)
    log_p_S = F.log_softmax(feature_S.float(), dim=1)
    return F.kl_div(log_p_S, log_p_T, reduction='batchmean', log_target=True)


def entropy(logits):
    """H of RCFD: mean entropy of softmax(logits), in nats; logits (B, K)."""
    log_p = F.log_softmax(logits.float(), dim=1)
    return -(log_p.exp() * log_p).sum(1).mean()


def diversity(mean_probs):
    """D of RCFD: sum_c p_c log p_c of the mean prediction (K,) of the batch."""
    p = mean_probs.clamp(min=torch.finfo(mean_probs.dtype).tiny)        # a finite gradient at 0
    return torch.special.xlogy(p, p).sum()


def pixels(feature_map):
    """Vectors (B * H * W, C) of the pixels of a map (B, C, H, W), in the order of the images."""
    return feature_map.float().permute(0, 2, 3, 1).flatten(0, 2)


def unit_pixels(feature_map):
    """The same, of length 1."""
    return F.normalize(pixels(feature_map), dim=1)


class _RelationKL(torch.autograd.Function):
    """Sum over all rows of KL(softmax(S_T) || softmax(S_S)), S = F K^T / tau, F = unit rows of x.

    x and F are (groups, rows, C). Keys K: the rows F of the same group (keys None), softmax over
    every `segment` columns apart; or given ones (1, keys, C), the same for S_S and S_T. Forward
    walks over chunks of rows and adds up the gradient on the way, since for a row it is
    softmax(S_S) - softmax(S_T): only one chunk of S ever exists.
    """

    @staticmethod
    def forward(ctx, x_S, F_T, keys, segment, tau):
        length = x_S.norm(dim=2, keepdim=True).clamp_(min=1e-12)
        F_S = x_S / length
        K_S, K_T = (F_S, F_T) if keys is None else (keys, keys)
        loss, grad = x_S.new_zeros(()), torch.zeros_like(F_S)
        chunk = max(1, CHUNK_ENTRIES // K_S.shape[:2].numel())
        for rows_S, rows_T, grad_rows in zip(*(v.split(chunk, 1) for v in (F_S, F_T, grad))):
            log_p_S, log_p_T = (F.log_softmax((f @ K.mT).div_(tau).unflatten(2, (-1, segment)), 3)
                                for f, K in ((rows_S, K_S), (rows_T, K_T)))
            p_T = log_p_T.exp()
            loss += (p_T * log_p_T.sub_(log_p_S)).sum()
            G = log_p_S.exp_().sub_(p_T).flatten(2).div_(tau)       # d loss / d S
            grad_rows.baddbmm_(G, K_S)
            if keys is None:
                grad.baddbmm_(G.mT, rows_S)
        # F has unit length: no gradient along it
        for f, g in zip(F_S.split(chunk, 1), grad.split(chunk, 1)):
            g.addcmul_(f, (f * g).sum(2, keepdim=True), value=-1)
        ctx.save_for_backward(grad.div_(length))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return (ctx.saved_tensors[0] * grad_output,) + 4 * (None,)


def intra_sample_p2p(map_S, map_T, temperature=1., group=None):
    """IS_P2P: relations between the pixels of every ordered pair of images (i, j) of a group.

    S_ij = F_i F_j^T (HW x HW) of the unit pixel vectors; the mean over all rows of
    KL(softmax(S^T_ij / tau) || softmax(S^S_ij / tau)).

    Args:
        map_S, map_T: (B, C, H, W). temperature: tau.
        group: images whose pairs are compared, a divisor of B; None: all B.
    """
    B, _, H, W = map_S.shape
    group = group or B
    rows = group * H * W
    together = max(1, CHUNK_ENTRIES // rows ** 2)       # groups that fit into a chunk
    with torch.autocast(map_S.device.type, enabled=False):
        groups = (v.unflatten(0, (-1, rows)).split(together)
                  for v in (pixels(map_S), unit_pixels(map_T.detach())))
        total = sum(_RelationKL.apply(x_S, F_T, None, H * W, temperature)
                    for x_S, F_T in zip(*groups))
    return total / (B * H * W * group)


class MemoryP2P(nn.Module):
    """M_P2P: relations of pixels to a queue of teacher pixels from earlier batches.

    P^T = softmax(F_T V^T / t_c), P^S = softmax(normalise(head(F_S)) V^T / t_c), V = `contrast_size`
    rows of the queue; the mean over pixels of KL(P^T || P^S), t_c = contrast temperature. After
    CIRKD (Yang et al. 2022). A step is: `choose_pixels`, `pixels_at`, `enqueue`, `choose_contrast`,
    then forward. The caller adds up `pixels_at` over processes; the queue needs no other traffic.

    Args:
        channels: C of the feature maps. queue_size: rows of the queue. contrast_size: rows
        compared with. update_size: pixels that enter per step. layout: 'pixels', or 'released'
        for fixed contrast rows and scrambled queue rows, as in the code published by the authors.
        norm: class of the batch norm in the head.
    """

    def __init__(self, channels, queue_size=20000, contrast_size=4096, update_size=128,
                 contrast_temperature=0.1, layout='pixels', norm=nn.BatchNorm2d):
        super().__init__()
        self.contrast_temperature = contrast_temperature
        self.update_size, self.layout = update_size, layout
        self.project_head = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), norm(channels),
            nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1, bias=False))
        # as the maps, so that gradients are laid out like weights: fused Adam before torch 2.5
        self.project_head.to(memory_format=torch.channels_last)
        queue = torch.randn(queue_size, channels)
        rows = torch.linspace(0, queue_size - 1, contrast_size).round().long()
        self.register_buffer('queue', F.normalize(queue, dim=1))            # (Q, C)
        self.register_buffer('contrast', rows)
        self.pointer = 0

    def get_extra_state(self):
        return dict(pointer=self.pointer, layout=self.layout)

    def set_extra_state(self, state):
        if state['layout'] != self.layout:
            raise ValueError(f'a queue of layout {state["layout"]}, expected {self.layout}')
        self.pointer = state['pointer']

    def choose_pixels(self, total_pixels, generator):
        """Indices (update_size,) of the pixels of the total batch that enter in this step."""
        return torch.randperm(total_pixels, generator=generator,
                              device=generator.device)[:self.update_size]

    @torch.no_grad()
    def pixels_at(self, feature_map, indices, first_image, total_images):
        """Vectors (update_size, C) of the pixels `indices` that this map holds, 0 for the others.

        feature_map (B, C, H, W) are images first_image .. first_image + B - 1 of the total batch;
        the sum over all parts of the batch is what enters the queue.
        """
        B, C, H, W = feature_map.shape
        unit = F.normalize(feature_map.float(), dim=1).contiguous().view(-1)
        n, c = indices.to(unit.device)[:, None], torch.arange(C, device=unit.device)[None, :]
        if self.layout == 'released':       # a (B, C, H, W) map seen as (C, B * H * W) unpermuted
            position = c * (total_images * H * W) + n
        else:
            position = (n // (H * W) * C + c) * (H * W) + n % (H * W)
        position = position - first_image * C * H * W                       # (update_size, C)
        mine = (position >= 0) & (position < len(unit))
        return torch.where(mine, unit[position.clamp(0, len(unit) - 1)], unit.new_zeros(()))

    @torch.no_grad()
    def enqueue(self, vectors):
        """Put vectors (n, C), scaled to length 1, over the oldest rows.

        Vectors that are not finite are left out. At the end of the queue, the released layout
        writes the last n rows and starts again at row 0.
        """
        end, length = self.pointer + len(vectors), len(self.queue)
        first = length - len(vectors) if self._at_end(end) else self.pointer
        rows = (first + torch.arange(len(vectors), device=self.queue.device)) % length
        unit = F.normalize(vectors, dim=1)
        finite = unit.isfinite().all(1, keepdim=True)
        self.queue[rows] = unit.where(finite, self.queue[rows])
        self.pointer = 0 if self._at_end(end) else end % length

    def _at_end(self, end):
        return self.layout == 'released' and end >= len(self.queue)

    def choose_contrast(self, generator):
        """Draw the rows to compare with in this step; the released layout always keeps the same."""
        if self.layout == 'pixels':
            rows = torch.randperm(len(self.queue), generator=generator, device=generator.device)
            self.contrast.copy_(rows[:len(self.contrast)])

    def forward(self, projected_S, map_T):
        """Loss of projected_S = project_head(map_S) and map_T, both (B, C, H, W).

        The caller applies the head, so that it can be wrapped for several processes. Gradients
        reach projected_S alone.
        """
        with torch.autocast(map_T.device.type, enabled=False):
            x_S, F_T = pixels(projected_S), unit_pixels(map_T.detach())
            V = self.queue[self.contrast]                                   # (contrast_size, C)
            return _RelationKL.apply(x_S[None], F_T[None], V[None], len(V),
                                     self.contrast_temperature) / len(x_S)
