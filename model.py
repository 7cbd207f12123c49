"""The U-Net of DDPM in the published parameter names, independent of schedules and losses."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import init


def initialize(module, gain=1.):
    """Xavier-uniform weights with `gain`, zero biases."""
    init.xavier_uniform_(module.weight, gain=gain)
    init.zeros_(module.bias)
    return module


class TimeEmbedding(nn.Module):
    """Table of sinusoids for t = 0..T, then a two-layer network: (B,) -> (B, dim)."""

    def __init__(self, T, d_model, dim):
        super().__init__()
        frequency = torch.exp(-torch.arange(0, d_model, 2) / d_model * math.log(10000))
        angle = torch.arange(T + 1).float()[:, None] * frequency[None, :]
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).view(T + 1, d_model)
        self.timembedding = nn.Sequential(
            nn.Embedding.from_pretrained(table),        # frozen
            initialize(nn.Linear(d_model, dim)), nn.SiLU(), initialize(nn.Linear(dim, dim)))

    def forward(self, t):
        return self.timembedding(t)


class DownSample(nn.Module):
    def __init__(self, in_ch):
        super().__init__()
        self.main = initialize(nn.Conv2d(in_ch, in_ch, 3, stride=2, padding=1))

    def forward(self, x):
        return self.main(x)


class UpSample(nn.Module):
    def __init__(self, in_ch):
        super().__init__()
        self.main = initialize(nn.Conv2d(in_ch, in_ch, 3, padding=1))

    def forward(self, x):
        return self.main(F.interpolate(x, scale_factor=2, mode='nearest'))


class GroupNorm(nn.GroupNorm):
    """By default 32 groups, in the precision of its weights.

    Autocast does so on GPUs. On CPUs it would leave bfloat16 as it is, whose kernel is slow in
    channels_last (docs/speed.md).
    """

    def __init__(self, channels, groups=32, eps=1e-5):
        super().__init__(groups, channels, eps)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class AttnBlock(nn.Module):
    """Self-attention over all pixels, one head, residual."""

    def __init__(self, in_ch):
        super().__init__()
        self.group_norm = GroupNorm(in_ch)
        self.proj_q = initialize(nn.Conv2d(in_ch, in_ch, 1))
        self.proj_k = initialize(nn.Conv2d(in_ch, in_ch, 1))
        self.proj_v = initialize(nn.Conv2d(in_ch, in_ch, 1))
        # The released code meant gain 1e-5 here and overwrote it with 1; trained models have 1.
        self.proj = initialize(nn.Conv2d(in_ch, in_ch, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.group_norm(x)
        projections = self.proj_q, self.proj_k, self.proj_v     # one product: fewer to start
        weight, bias = (torch.cat(v) for v in zip(*((p.weight, p.bias) for p in projections)))
        qkv = F.conv2d(h, weight, bias).view(B, 3, C, H * W).transpose(2, 3)
        q, k, v = qkv.split(1, 1)       # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(2, 3).reshape(B, C, H, W))


class ResBlock(nn.Module):
    """Two convolutions with the time embedding between them, residual; attention on request."""

    def __init__(self, in_ch, out_ch, tdim, dropout, attn=False):
        super().__init__()
        self.block1 = nn.Sequential(GroupNorm(in_ch), nn.SiLU(),
                                    initialize(nn.Conv2d(in_ch, out_ch, 3, padding=1)))
        self.temb_proj = nn.Sequential(nn.SiLU(), initialize(nn.Linear(tdim, out_ch)))
        self.block2 = nn.Sequential(
            GroupNorm(out_ch), nn.SiLU(), nn.Dropout(dropout),
            initialize(nn.Conv2d(out_ch, out_ch, 3, padding=1), gain=1e-5))   # starts as identity
        self.shortcut = (initialize(nn.Conv2d(in_ch, out_ch, 1)) if in_ch != out_ch
                         else nn.Identity())
        self.attn = AttnBlock(out_ch) if attn else nn.Identity()

    def forward(self, x, shift):
        """x (B, in_ch, H, W), shift (B, out_ch) = temb_proj(temb) -> (B, out_ch, H, W)."""
        h = self.block1(x) + shift[:, :, None, None]
        return self.attn(self.shortcut(x) + self.block2(h))


class UNet(nn.Module):
    """The network of DDPM: residual blocks, attention at chosen resolutions, skip connections.

    Args:
        T: largest time index; the table of embeddings has T + 1 rows.
        ch: base channels, a multiple of 32. ch_mult: multiplier of each resolution.
        attn: resolutions (0 = full size) with attention. num_res_blocks: blocks per resolution.
        dropout: rate in the second half of every block.
        conditional: whether the network takes class labels, of `class_num` classes.

    The last normalisation and convolution are computed in float32 whatever the precision of the
    rest: their rounding errors would be multiplied by alpha / sigma in eps_pred.
    """

    in_float32 = ('tail', 'y_embedding')    # parts that autocast does not reach

    def __init__(self, T, ch, ch_mult, attn, num_res_blocks, dropout=0., conditional=False,
                 class_num=10):
        super().__init__()
        tdim = ch * 4
        self.conditional, self.class_num = conditional, class_num
        self.time_embedding = TimeEmbedding(T, ch, tdim)
        self.y_embedding = nn.Linear(class_num, tdim) if conditional else None
        self.head = initialize(nn.Conv2d(3, ch, 3, padding=1))
        widths, now = [ch], ch          # channels of every skip connection, and of the last block
        self.downblocks = nn.ModuleList()
        for level, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                self.downblocks.append(ResBlock(now, ch * mult, tdim, dropout, level in attn))
                now = ch * mult
                widths.append(now)
            if level != len(ch_mult) - 1:
                self.downblocks.append(DownSample(now))
                widths.append(now)
        self.middleblocks = nn.ModuleList([ResBlock(now, now, tdim, dropout, attn=True),
                                           ResBlock(now, now, tdim, dropout)])
        self.upblocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(ch_mult))):
            for _ in range(num_res_blocks + 1):
                self.upblocks.append(ResBlock(widths.pop() + now, ch * mult, tdim, dropout,
                                              level in attn))
                now = ch * mult
            if level:
                self.upblocks.append(UpSample(now))
        self.tail = nn.Sequential(GroupNorm(now), nn.SiLU(),
                                  initialize(nn.Conv2d(now, 3, 3, padding=1), gain=1e-5))
        self.entries = {}       # its checkpoint needs no more than the weights, see formats/load.py

    def forward(self, x, t, y=None):
        """Images (B, 3, H, W), times (B,) int in 0..T, labels (B,) int or None -> (B, 3, H, W)."""
        temb = self.time_embedding(t)
        if self.y_embedding is not None:
            # the published network multiplies a one-hot vector: the same numbers, without it
            temb = temb + F.embedding(y, self.y_embedding.weight.t()) + self.y_embedding.bias
        shifts = iter(self.shifts_of_blocks(temb))
        h = self.head(x)
        skips = [h]
        for block in self.downblocks:
            h = block(h, next(shifts)) if isinstance(block, ResBlock) else block(h)
            skips.append(h)
        for block in self.middleblocks:
            h = block(h, next(shifts))
        for block in self.upblocks:
            if isinstance(block, ResBlock):
                h = block(torch.cat([h, skips.pop()], dim=1), next(shifts))
            else:
                h = block(h)
        with torch.autocast(h.device.type, enabled=False):      # in float32
            return self.tail(h.to(self.tail[-1].weight.dtype))

    def shifts_of_blocks(self, temb):
        """[(B, out_ch)] for the residual blocks in their order: temb_proj(temb) of each.

        One matrix product: on a GPU, one per block takes longer to start than to compute.
        """
        blocks = (*self.downblocks, *self.middleblocks, *self.upblocks)
        linears = [block.temb_proj[1] for block in blocks if isinstance(block, ResBlock)]
        weight = torch.cat([m.weight for m in linears])
        bias = torch.cat([m.bias for m in linears])
        return F.linear(F.silu(temb), weight, bias).split([m.out_features for m in linears], 1)
