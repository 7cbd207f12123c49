"""Networks D(x; sigma) of EDM, called at the times of this project.

Karras et al. 2022 (2206.00364), Table 1: D = c_skip x + c_out F(c_in x; c_noise, y). F is a
SongUNet, or a UNet2DModel that computes a DhariwalUNet. The checkpoint of such a network has an
entry `edm`: its preconditioning and the arguments of the SongUNet. Those of a UNet2DModel are in
`unet_config`.
"""

import torch
from torch import nn

from diffusion import alpha_bar_table
from formats import diffusers_read
from formats.entries import betas_of, brief
from formats.songunet import SongUNet
from runtime.cli import UserError

# c_noise (B,) at levels s (B,), u: those that iDDPM was trained at; range of a sampler
PRECONDITIONING = dict(
    EDMPrecond=(lambda s, u: s.log() / 4, .002, 80.),
    VPPrecond=(lambda s, u: 999 * (((.01 + 39.8 * (s ** 2).log1p()).sqrt() - .1) / 19.9), .001,
               152.),
    VEPrecond=(lambda s, u: (s / 2).log(), .02, 100.),
    iDDPMPrecond=(lambda s, u: 999 - (s[:, None] - u).abs().argmin(1).to(s.dtype), .0064, 80.),
    consistency_models=(lambda s, u: 250 * s.log(), .002, 80.))
# arguments of a SongUNet that EDM's options leave out
DEFAULTS = dict(label_dim=0, num_blocks=4, attn_resolutions=[16])
WORDS = dict(embedding_type=('positional', 'fourier'), encoder_type=('standard', 'residual'))


def scalings(kind, s):
    """c_skip, c_out, c_in of a preconditioning at levels s (B, 1, 1, 1)."""
    if kind in ('EDMPrecond', 'consistency_models'):
        spread = (s ** 2 + .25).sqrt()      # standard deviation of noisy images; of clean ones, 0.5
        return .25 / spread ** 2, .5 * s / spread, 1 / spread
    if kind == 'VEPrecond':
        return 1, s, 1
    return 1, -s, 1 / (s ** 2 + 1).sqrt()


class EDMNetwork(nn.Module):
    """A network of EDM, around `model` = F, in the form that formats/load.py describes."""

    def __init__(self, model, entries):
        super().__init__()
        self.model, self.song = model, entries['edm'].get('song')
        self.kind = entries['edm']['preconditioning']
        self.c_noise, *_ = PRECONDITIONING[self.kind]
        self.register_buffer('u', torch.zeros(1001) if self.kind == 'iDDPMPrecond' else None)
        # as of DiffusersUNet; autocast does not reach the table of labels
        self.in_float32 = ('model',) if self.song is None else ('model.map_label',)
        # the labels of a UNet2DModel end with a row of zeros, for "no label"
        classes = model.class_num - 1 if self.song is None else self.song['label_dim']
        self.conditional = model.conditional if self.song is None else classes > 0
        self.class_num = classes if self.conditional else 10
        for norm in model.modules():
            if isinstance(norm, nn.GroupNorm) and self.kind != 'consistency_models':
                norm.num_groups = min(32, norm.num_channels // 4)   # a UNet2DModel has one number
        self.entries = {key: entries[key] for key in ('edm', 'unet_config') if key in entries}
        alpha_bar = alpha_bar_table(len(entries['schedule']['betas']), entries['schedule'])
        self.register_buffer('sigma', (1 / alpha_bar - 1).sqrt().float(), persistent=False)

    def forward(self, z_t, t, y=None):
        """Images (B, 3, H, W), times (B,) int in 1..N, labels (B,) or None -> x_pred, like z_t.

        z_t / alpha_t is an image with noise of the level sigma_t / alpha_t, that of the table.
        """
        sigma = self.sigma[t]
        return self.denoise(z_t * (1 + sigma ** 2).sqrt()[:, None, None, None], sigma, y)

    def denoise(self, x, sigma, y=None):
        """D(x; sigma): noisy images (B, 3, H, W), levels (B,), labels (B,) or None -> like x.

        Without labels, a conditional network gets a vector of zeros, "no label" in EDM.
        """
        s = sigma.to(x.dtype)
        c_skip, c_out, c_in = scalings(self.kind, s[:, None, None, None])
        c_noise = self.c_noise(s, self.u)
        if self.conditional and y is None and self.song is None:
            y = torch.full_like(sigma, self.class_num, dtype=torch.long)
        return c_skip * x + c_out * self.model(c_in * x, c_noise, y).to(x.dtype)

    def architecture(self, N):
        """The nearest to the arguments of our U-Net, for times 0..N."""
        labels = dict(conditional=self.conditional, class_num=self.class_num)
        if self.song is None:
            return dict(self.model.architecture(N), **labels)
        size, mult = self.song['img_resolution'], list(self.song['channel_mult'])
        attn = [i for i in range(len(mult)) if size >> i in self.song['attn_resolutions']]
        return dict(T=N, ch=self.song['model_channels'], ch_mult=mult, attn=attn,
                    num_res_blocks=self.song['num_blocks'], **labels)


def build(entries, dropout=0., where='the checkpoint'):
    """The network of a checkpoint with an entry `edm`; F is on the meta device, without weights.

    KeyError or TypeError if arguments of F are missing or unknown.
    """
    song = entries['edm'].get('song')
    if song is None:
        unet = diffusers_read.build(dict(entries, schedule=None), dropout, where)
        return EDMNetwork(unet, entries)
    for name, value in song.items():
        numbers = value if isinstance(value, list) else [value]
        if value not in WORDS[name] if name in WORDS else not all(
                type(number) is int and 0 <= number <= 2 ** 15 for number in numbers):
            raise UserError(f'{name} of {where} is {brief(value)}, which is not supported; give '
                            f'another model')
    with torch.device('meta'):
        model = SongUNet(dropout=dropout, **song)
    return EDMNetwork(model, entries)


def entries(preconditioning, N):
    """Entries of the checkpoint of an `EDMNetwork`.

    Its times are N noise levels in the range of a sampler (Eq. 5, rho = 7), after the clean image.
    """
    _, sigma_min, sigma_max = PRECONDITIONING[preconditioning]
    low, high = sigma_min ** (1 / 7), sigma_max ** (1 / 7)
    sigma = torch.linspace(low, high, N, dtype=torch.float64) ** 7
    return dict(edm=dict(preconditioning=preconditioning), mean_type='xstart',
                schedule=dict(name='karras', betas=betas_of(1 / (1 + sigma ** 2))))
