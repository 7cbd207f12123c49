"""The U-Nets of EDM and guided-diffusion once more, from their formulas and for one small shape."""

import math

import torch
import torch.nn.functional as F


def resampled(x, taps, direction, pad=None):
    """Twice or half the size: neighbours along both axes are weighted by `taps`."""
    pad = (len(taps) - 1) // 2 if pad is None else pad
    taps = torch.tensor(taps).to(x) / sum(taps)
    kernel = taps.outer(taps).expand(x.shape[1], 1, -1, -1)
    if direction == 'down':
        return F.conv2d(x, kernel, stride=2, padding=pad, groups=x.shape[1])
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=pad, groups=x.shape[1])


def attention(qkv, order, head):
    """Output (B, C, N) of all heads of width `head`; qkv (B, 3 C, N) has rows in this order."""
    shape, axis = dict(edm=((-1, head, 3), 3), legacy=((-1, 3, head), 2),
                       new=((3, -1, head), 1))[order]
    q, k, v = qkv.unflatten(1, shape).unbind(axis)
    weights = torch.einsum('bhdn,bhdm->bhnm', q, k) / head ** .5
    return torch.einsum('bhnm,bhdm->bhdn', weights.softmax(3), v).flatten(1, 2)


def linear(w, name, x):
    return F.linear(x, w[f'{name}.weight'], w[f'{name}.bias'])


def unet(w, x, emb, last, taps=(1, 1), gain=1., eps=1e-5, groups=None, order='edm', head=None,
         aux=None):
    """Two resolutions with a block each, of weights w in the names of EDM; attention if it has any.

    last: name of the output layers. gain: of every sum of two branches. groups: of group norms;
    None: one per four channels, up to 32. head None: one. aux: added at the lower resolution.
    """
    def norm(name, x):
        number = groups or min(32, x.shape[1] // 4)
        return F.group_norm(x, number, w[f'{name}.weight'], w[f'{name}.bias'], eps)

    def conv(name, x):
        kernel = w[f'{name}.weight']
        return F.conv2d(x, kernel, w[f'{name}.bias'], padding=kernel.shape[-1] // 2)

    def block(name, x, direction=None):
        if f'{name}.norm0.weight' not in w:     # a convolution alone changes the size
            if direction == 'up':
                return conv(f'{name}.conv0', resampled(x, taps, 'up'))
            return conv(f'{name}.conv0', x)[:, :, ::2, ::2]
        h = F.silu(norm(f'{name}.norm0', x))
        if direction:
            h = resampled(h, taps, direction)
            x = resampled(x, taps, direction)
        h = conv(f'{name}.conv0', h)
        e = linear(w, f'{name}.affine', emb)[..., None, None]
        if e.shape[1] == h.shape[1]:
            h = norm(f'{name}.norm1', h + e)
        else:
            scale, shift = e.chunk(2, 1)
            h = norm(f'{name}.norm1', h) * (1 + scale) + shift
        h = conv(f'{name}.conv1', F.silu(h))
        x = gain * (h + (conv(f'{name}.skip', x) if f'{name}.skip.weight' in w else x))
        if f'{name}.qkv.weight' not in w:
            return x
        qkv = conv(f'{name}.qkv', norm(f'{name}.norm2', x)).flatten(2)
        h = attention(qkv, order, head or x.shape[1]).reshape(x.shape)
        return gain * (x + conv(f'{name}.proj', h))

    first = conv('enc.16x16_conv', x)
    large = block('enc.16x16_block0', first)
    down = block('enc.8x8_down', large, 'down')
    if aux is not None:
        down = gain * (down + aux)
    small = block('enc.8x8_block0', down)
    h = block('dec.8x8_in1', block('dec.8x8_in0', small))
    h = block('dec.8x8_block0', torch.cat([h, small], 1))
    h = block('dec.16x16_up', block('dec.8x8_block1', torch.cat([h, down], 1)), 'up')
    h = block('dec.16x16_block0', torch.cat([h, large], 1))
    h = block('dec.16x16_block1', torch.cat([h, first], 1))
    return conv(f'{last}_conv', F.silu(norm(f'{last}_norm', h)))


def song(w, arguments, x, noise, y):
    """SongUNet."""
    taps, aux = arguments['resample_filter'], None
    if arguments['embedding_type'] == 'fourier':
        angle = 2 * math.pi * noise[:, None] * w['map_noise.freqs']
    else:
        angle = noise[:, None] * 10000. ** (-torch.arange(8) / 7)
    emb = torch.cat([angle.sin(), angle.cos()], 1)
    label = torch.zeros(3) if y is None else F.one_hot(y, 3) * 3 ** .5
    emb = emb + linear(w, 'map_label', label)
    for layer in ('map_layer0', 'map_layer1'):
        emb = F.silu(linear(w, layer, emb))
    if arguments['encoder_type'] == 'residual':     # convolution first, then the filter
        kernel, bias = (w[f'enc.8x8_aux_residual.{kind}'] for kind in ('weight', 'bias'))
        aux = F.conv2d(x, kernel, bias, padding=1 + (len(taps) - 1) // 2)
        aux = resampled(aux, taps, 'down', pad=0)
    return unet(w, x, emb, 'dec.16x16_aux', taps, gain=math.sqrt(.5), eps=1e-6, aux=aux)


def adm(w, order, head, x, t, y, groups=32):
    """The U-Net of guided-diffusion, with weights in the names of EDM. `t` may be a fraction."""
    angle = t[:, None] * 10000. ** (-torch.arange(16) / 16)
    emb = F.silu(linear(w, 'map_layer0', torch.cat([angle.cos(), angle.sin()], 1)))
    label = 0. if y is None else w['map_label.weight'].t()[y]
    emb = F.silu(linear(w, 'map_layer1', emb) + label)
    return unet(w, x, emb, 'out', groups=groups, order=order, head=head)


def adm_weights(widths=(32, 64), blocks=1, attention=(1,), updown=True, scale_shift=True,
                outputs=6, labels=4, edm=False):
    """Random weights of that U-Net, always the same; in the names of guided-diffusion, or of EDM.

    attention: levels that have it. updown: whether blocks change the size, or convolutions alone.
    """
    generator, w = torch.Generator().manual_seed(1), {}
    now, emb_ch = widths[0], 4 * widths[0]

    def add(name, of_edm, *shape, mean=0.):
        name = of_edm if edm else name
        gain = math.prod(shape[1:]) ** -.5 if len(shape) > 1 else .1
        w[f'{name}.weight'] = mean + gain * torch.randn(shape, generator=generator)
        w[f'{name}.bias'] = .1 * torch.randn(shape[0], generator=generator)

    def block(name, of_edm, in_ch, out_ch):
        add(f'{name}.in_layers.0', f'{of_edm}.norm0', in_ch, mean=1.)
        add(f'{name}.in_layers.2', f'{of_edm}.conv0', out_ch, in_ch, 3, 3)
        add(f'{name}.emb_layers.1', f'{of_edm}.affine', (1 + scale_shift) * out_ch, emb_ch)
        add(f'{name}.out_layers.0', f'{of_edm}.norm1', out_ch, mean=1.)
        add(f'{name}.out_layers.3', f'{of_edm}.conv1', out_ch, out_ch, 3, 3)
        if in_ch != out_ch:
            add(f'{name}.skip_connection', f'{of_edm}.skip', out_ch, in_ch, 1, 1)

    def attend(name, of_edm, ch):
        taps = (1, 1) if edm else (1,)
        add(f'{name}.norm', f'{of_edm}.norm2', ch, mean=1.)
        add(f'{name}.qkv', f'{of_edm}.qkv', 3 * ch, ch, *taps)
        add(f'{name}.proj_out', f'{of_edm}.proj', ch, ch, *taps)

    def resample(name, of_edm, ch, kind):
        if updown:
            block(name, of_edm, ch, ch)
        else:
            add(f'{name}.{kind}', f'{of_edm}.conv0', ch, ch, 3, 3)

    add('time_embed.0', 'map_layer0', emb_ch, now)
    add('time_embed.2', 'map_layer1', emb_ch, emb_ch)
    table = torch.randn(labels, emb_ch, generator=generator)
    w.update({'map_label.weight': table.t()} if edm else {'label_emb.weight': table})
    add('input_blocks.0.0', 'enc.16x16_conv', now, 3, 3, 3)
    skips, sizes = [now], [f'{16 >> level}x{16 >> level}' for level in range(len(widths))]
    for level, width in enumerate(widths):
        at = f'enc.{sizes[level]}'
        if level:
            resample(f'input_blocks.{len(skips)}.0', f'{at}_down', now, 'op')
            skips.append(now)
        for k in range(blocks):
            name = f'input_blocks.{len(skips)}'
            block(f'{name}.0', f'{at}_block{k}', now, width)
            if level in attention:
                attend(f'{name}.1', f'{at}_block{k}', width)
            now = width
            skips.append(now)
    block('middle_block.0', f'dec.{sizes[-1]}_in0', now, now)
    attend('middle_block.1', f'dec.{sizes[-1]}_in0', now)
    block('middle_block.2', f'dec.{sizes[-1]}_in1', now, now)
    count = len(skips)
    for level in reversed(range(len(widths))):
        at, width = f'dec.{sizes[level]}', widths[level]
        for k in range(blocks + 1):
            name = f'output_blocks.{count - len(skips)}'
            block(f'{name}.0', f'{at}_block{k}', now + skips.pop(), width)
            if level in attention:
                attend(f'{name}.1', f'{at}_block{k}', width)
            now = width
        if level:
            inner = 2 if level in attention else 1
            resample(f'{name}.{inner}', f'dec.{sizes[level - 1]}_up', now, 'conv')
    add('out.0', 'out_norm', now, mean=1.)
    add('out.2', 'out_conv', outputs, now, 3, 3)
    return w


def noise_levels(kind):
    """(sigma, c_skip, c_out, c_in, c_noise, levels of iDDPM) of four images."""
    time, index = torch.tensor([.01, .2, .6, .97]), torch.tensor([998, 700, 300, 5])
    u = torch.linspace(9, 0, 1001) ** 2 if kind == 'iDDPMPrecond' else None
    s = 10. ** (4 * time - 2)
    if kind == 'VPPrecond':     # of which the network has the inverse
        s = torch.expm1(.5 * 19.9 * time ** 2 + .1 * time).sqrt()
    elif u is not None:
        s = u[index] * 1.0001
    c_noise = dict(VPPrecond=999 * time, VEPrecond=(s / 2).log(), iDDPMPrecond=999. - index,
                   EDMPrecond=s.log() / 4, consistency_models=250 * s.log())[kind]
    level = s[:, None, None, None]
    if kind in ('VPPrecond', 'iDDPMPrecond'):
        return s, 1, -level, (1 + level ** 2) ** -.5, c_noise, u
    if kind == 'VEPrecond':
        return s, 1, level, 1, c_noise, u
    total = level ** 2 + .25
    return s, .25 / total, .5 * level / total ** .5, total ** -.5, c_noise, u
