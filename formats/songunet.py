"""SongUNet of EDM (Karras et al. 2022, 2206.00364, Appendix F.1): DDPM++ and NCSN++ (2011.13456).

Parameters have the published names. Sums of two branches are scaled by sqrt(1/2).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model import GroupNorm


def group_norm(channels):
    return GroupNorm(channels, min(32, channels // 4), eps=1e-6)


class Conv(nn.Conv2d):
    """A convolution; `resample`: 'up' or 'down', by 2, before it, or 'after': down, after it.

    taps: the filter of `resample` along one axis, 2 or 4 numbers.
    """

    def __init__(self, in_ch, out_ch, kernel, resample=None, taps=(1, 1)):
        super().__init__(in_ch, out_ch, kernel, padding=kernel // 2)
        self.resample, self.margin = resample, (len(taps) - 1) // 2
        if resample:
            taps = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer('resample_filter', taps.outer(taps)[None, None] / taps.sum() ** 2)

    def forward(self, x):
        if self.resample == 'after':
            return self.filtered(super().forward(F.pad(x, 4 * [self.margin])), self.out_channels, 0)
        if self.resample:
            x = self.filtered(x, self.in_channels, self.margin)
        return super().forward(x)

    def filtered(self, x, channels, padding):
        gain, convolve = (4, F.conv_transpose2d) if self.resample == 'up' else (1, F.conv2d)
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
        if attention:
            self.norm2 = group_norm(out_ch)
            self.qkv = Conv(out_ch, 3 * out_ch, 1)
            self.proj = Conv(out_ch, out_ch, 1)

    def forward(self, x, emb):
        """x (B, in_ch, H, W), emb (B, emb_ch) -> (B, out_ch, H, W), or half or twice that size."""
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(emb)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        x = (self.skip(x) + h) * math.sqrt(.5)
        if not hasattr(self, 'qkv'):
            return x
        B, C, H, W = x.shape        # over all pixels, one head
        qkv = self.qkv(self.norm2(x)).view(B, 1, C, 3, H * W).transpose(2, 4)
        h = F.scaled_dot_product_attention(*qkv.unbind(3))      # q, k, v (B, 1, HW, C)
        return (x + self.proj(h.transpose(2, 3).reshape(B, C, H, W))) * math.sqrt(.5)


class SongUNet(nn.Module):
    """Arguments as in the options of EDM; the defaults are DDPM++ for CIFAR-10."""

    def __init__(self, img_resolution, label_dim=0, model_channels=128, channel_mult=(2, 2, 2),
                 channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), dropout=0.,
                 embedding_type='positional', channel_mult_noise=1, encoder_type='standard',
                 resample_filter=(1, 1), augment_dim=0):
        super().__init__()
        noise_ch, emb_ch = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.map_noise, self.map_augment = nn.Module(), nn.Module()
        if embedding_type == 'fourier':
            self.map_noise.register_buffer('freqs', torch.zeros(noise_ch // 2))
        if augment_dim:     # for training from scratch: not used here, and so not trained
            self.map_augment.register_buffer('weight', torch.zeros(noise_ch, augment_dim))
        self.map_label = nn.Linear(label_dim, noise_ch) if label_dim else None
        self.map_layer0 = nn.Linear(noise_ch, emb_ch)
        self.map_layer1 = nn.Linear(emb_ch, emb_ch)

        block = partial(Block, emb_ch=emb_ch, dropout=dropout, taps=resample_filter)
        sizes = [img_resolution >> level for level in range(len(channel_mult))]
        levels = [(f'{size}x{size}', model_channels * mult, size in attn_resolutions)
                  for size, mult in zip(sizes, channel_mult)]
        ch, aux, skips = model_channels, 3, [model_channels]
        self.enc = nn.ModuleDict({f'{levels[0][0]}_conv': Conv(3, ch, 3)})
        for at, out, attn in levels:
            if at != levels[0][0]:
                self.enc[f'{at}_down'] = block(ch, ch, resample='down')
                if encoder_type == 'residual':
                    self.enc[f'{at}_aux_residual'] = Conv(aux, ch, 3, 'after', resample_filter)
                aux = ch
                skips.append(ch)
            for i in range(num_blocks):
                self.enc[f'{at}_block{i}'] = block(ch, out, attn)
                ch = out
                skips.append(ch)
        self.dec = nn.ModuleDict({f'{at}_in0': block(ch, ch, attention=True),
                                  f'{at}_in1': block(ch, ch)})
        for at, out, attn in levels[::-1]:
            if at != levels[-1][0]:
                self.dec[f'{at}_up'] = block(ch, ch, resample='up')
            for i in range(num_blocks + 1):
                self.dec[f'{at}_block{i}'] = block(ch + skips.pop(), out, attn and i == num_blocks)
                ch = out
        self.dec[f'{at}_aux_norm'] = group_norm(ch)
        self.dec[f'{at}_aux_conv'] = Conv(ch, 3, 3)

    def forward(self, x, noise, y=None):
        """x (B, 3, H, W), noise (B,) = c_noise, labels y (B,) or None for no label -> like x."""
        emb, skips, aux = self.embedding(noise, y), [], x
        for name, module in self.enc.items():
            if name.endswith('aux_residual'):
                x = skips[-1] = aux = (x + module(aux)) * math.sqrt(.5)
            else:
                x = module(x, emb) if isinstance(module, Block) else module(x)
                skips.append(x)
        *blocks, (_, norm), (_, conv) = self.dec.items()
        for name, block in blocks:
            x = block(torch.cat([x, skips.pop()], dim=1) if '_block' in name else x, emb)
        return conv(F.silu(norm(x)))

    def embedding(self, noise, y):
        """Of noise level and label, (B, emb_ch)."""
        k = torch.arange(self.map_layer0.in_features // 2, device=noise.device)
        freqs = 10000. ** (-k / (len(k) - 1))
        if hasattr(self.map_noise, 'freqs'):
            freqs = 2 * math.pi * self.map_noise.freqs
        angle = noise[:, None] * freqs
        emb = torch.cat([angle.sin(), angle.cos()], dim=1)
        label = self.map_label
        if label is not None:
            emb = emb + label.bias
            if y is not None:
                emb = emb + math.sqrt(label.in_features) * F.embedding(y, label.weight.t())
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
