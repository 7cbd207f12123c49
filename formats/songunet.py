"""SongUNet, the U-Net of EDM's CIFAR-10, FFHQ and AFHQv2 models: DDPM++ and NCSN++.

Song et al. 2021 (2011.13456) in the form of Karras et al. 2022 (2206.00364, Appendix F.1), with the
published names of parameters. Sums of two branches are scaled by sqrt(1/2) to keep their variance.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model import GroupNorm

HALF = math.sqrt(.5)


def group_norm(channels):
    return GroupNorm(channels, min(32, channels // 4), eps=1e-6)


class Conv(nn.Conv2d):
    """A convolution, by default without a change of size.

    Args:
        resample: 'up' or 'down', by 2, before the convolution; 'after': down, after it.
        taps: the filter of `resample` along one axis, 2 or 4 numbers.
    """

    def __init__(self, in_ch, out_ch, kernel, resample=None, taps=(1, 1)):
        margin = (len(taps) - 1) // 2
        super().__init__(in_ch, out_ch, kernel,
                         padding=kernel // 2 + (margin if resample == 'after' else 0))
        self.resample, self.margin = resample, margin
        if resample:
            taps = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer('resample_filter', taps.outer(taps)[None, None] / taps.sum() ** 2)

    def forward(self, x):
        if self.resample == 'up':
            x = self.each_channel(F.conv_transpose2d, 4, x, self.in_channels, self.margin)
        elif self.resample == 'down':
            x = self.each_channel(F.conv2d, 1, x, self.in_channels, self.margin)
        x = super().forward(x)
        if self.resample == 'after':
            x = self.each_channel(F.conv2d, 1, x, self.out_channels, 0)
        return x

    def each_channel(self, convolve, gain, x, channels, padding):
        weight = (gain * self.resample_filter.to(x.dtype)).expand(channels, -1, -1, -1)
        return convolve(x, weight, stride=2, padding=padding, groups=channels)


class Block(nn.Module):
    """Two convolutions with the embedding of the noise level between them; attention on request."""

    def __init__(self, in_ch, out_ch, attention=False, resample=None, *, emb_ch, dropout, taps):
        super().__init__()
        self.norm0 = group_norm(in_ch)
        self.conv0 = Conv(in_ch, out_ch, 3, resample, taps)
        self.affine = nn.Linear(emb_ch, out_ch)
        self.norm1 = group_norm(out_ch)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = Conv(out_ch, out_ch, 3)
        same = in_ch == out_ch and not resample
        self.skip = nn.Identity() if same else Conv(in_ch, out_ch, 1, resample, taps)
        self.attention = attention
        if attention:
            self.norm2 = group_norm(out_ch)
            self.qkv = Conv(out_ch, 3 * out_ch, 1)
            self.proj = Conv(out_ch, out_ch, 1)

    def forward(self, x, emb):
        """x (B, in_ch, H, W), emb (B, emb_ch) -> (B, out_ch, H, W), or half or twice that size."""
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(emb)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        x = (self.skip(x) + h) * HALF
        return (x + self.attend(x)) * HALF if self.attention else x

    def attend(self, x):
        """Self-attention over all pixels, one head."""
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm2(x)).view(B, 1, C, 3, H * W).transpose(2, 4)
        q, k, v = qkv.unbind(3)         # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(2, 3).reshape(B, C, H, W))


class SongUNet(nn.Module):
    """Arguments as in the options of EDM; the defaults are DDPM++ for CIFAR-10."""

    def __init__(self, img_resolution, label_dim=0, model_channels=128, channel_mult=(2, 2, 2),
                 channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), dropout=0.,
                 embedding_type='positional', channel_mult_noise=1, encoder_type='standard',
                 resample_filter=(1, 1), augment_dim=0):
        super().__init__()
        self.noise_ch, emb_ch = (model_channels * n for n in (channel_mult_noise, channel_mult_emb))
        self.map_noise = nn.Module()
        if embedding_type == 'fourier':
            self.map_noise.register_buffer('freqs', torch.zeros(self.noise_ch // 2))
        self.map_label = nn.Linear(label_dim, self.noise_ch) if label_dim else None
        self.map_augment = nn.Module()
        if augment_dim:     # for training from scratch: not used here, and so not trained
            self.map_augment.register_buffer('weight', torch.zeros(self.noise_ch, augment_dim))
        self.map_layer0 = nn.Linear(self.noise_ch, emb_ch)
        self.map_layer1 = nn.Linear(emb_ch, emb_ch)

        block = partial(Block, emb_ch=emb_ch, dropout=dropout, taps=resample_filter)
        levels = [(img_resolution >> level, model_channels * mult)
                  for level, mult in enumerate(channel_mult)]
        now, aux, skips, self.enc = model_channels, 3, [], nn.ModuleDict()
        for level, (size, width) in enumerate(levels):
            at = f'{size}x{size}'
            if level == 0:
                self.enc[f'{at}_conv'] = Conv(3, now, 3)
            else:
                self.enc[f'{at}_down'] = block(now, now, resample='down')
            if level and encoder_type == 'residual':
                self.enc[f'{at}_aux_residual'] = Conv(aux, now, 3, 'after', resample_filter)
                aux = now
            skips.append(now)
            for i in range(num_blocks):
                self.enc[f'{at}_block{i}'] = block(now, width, size in attn_resolutions)
                now = width
                skips.append(now)
        self.dec = nn.ModuleDict({f'{at}_in0': block(now, now, attention=True),
                                  f'{at}_in1': block(now, now)})
        for size, width in levels[::-1]:
            at = f'{size}x{size}'
            if size != levels[-1][0]:
                self.dec[f'{at}_up'] = block(now, now, resample='up')
            for i in range(num_blocks + 1):
                attention = i == num_blocks and size in attn_resolutions
                self.dec[f'{at}_block{i}'] = block(now + skips.pop(), width, attention)
                now = width
        self.dec[f'{at}_aux_norm'] = group_norm(now)
        self.dec[f'{at}_aux_conv'] = Conv(now, 3, 3)

    def forward(self, x, noise, y=None):
        """x (B, 3, H, W), noise (B,) = c_noise, labels y (B,) or None for no label -> like x."""
        emb, skips, aux = self.embedding(noise, y), [], x
        for name, module in self.enc.items():
            if name.endswith('aux_residual'):
                x = skips[-1] = aux = (x + module(aux)) * HALF
            else:
                x = module(x, emb) if isinstance(module, Block) else module(x)
                skips.append(x)
        *blocks, (_, norm), (_, conv) = self.dec.items()
        for name, block in blocks:
            x = block(torch.cat([x, skips.pop()], dim=1) if '_block' in name else x, emb)
        return conv(F.silu(norm(x)))

    def embedding(self, noise, y):
        """Of noise level and label, (B, emb_ch)."""
        freqs = getattr(self.map_noise, 'freqs', None)
        if freqs is None:
            k = torch.arange(self.noise_ch // 2, device=noise.device)
            angle = noise[:, None] * 10000. ** (-k / (self.noise_ch // 2 - 1))
        else:
            angle = noise[:, None] * (2 * math.pi * freqs)
        emb = torch.cat([angle.sin(), angle.cos()], dim=1)
        if self.map_label is not None:
            emb = emb + self.map_label.bias
            if y is not None:
                gain = math.sqrt(self.map_label.in_features)
                emb = emb + gain * F.embedding(y, self.map_label.weight.t())
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
