"""Networks of others, each written once more, from their formulas and for one small shape."""

import math

import torch
import torch.nn.functional as F

# SongUNet by its formulas

def norm(w, name, x, eps=1e-6, groups=None):
    groups = groups or min(32, x.shape[1] // 4)
    return F.group_norm(x, groups, w[f'{name}.weight'], w[f'{name}.bias'], eps)


def conv(w, name, x):
    kernel = w[f'{name}.weight']
    return F.conv2d(x, kernel, w[f'{name}.bias'], padding=kernel.shape[-1] // 2)


def filtered(x, taps):
    """Sum of neighbours along both axes, weighted by `taps`, without padding."""
    for axis in (2, 3):
        length = x.shape[axis] - len(taps) + 1
        x = sum(tap * x.narrow(axis, i, length) for i, tap in enumerate(taps))
    return x


def resampled(x, taps, direction):
    taps, pad = [tap / sum(taps) for tap in taps], (len(taps) - 1) // 2
    if direction == 'down':
        return filtered(F.pad(x, [pad] * 4), taps)[:, :, ::2, ::2]
    wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    wide[:, :, ::2, ::2] = 4 * x
    return filtered(F.pad(wide, [len(taps) - 1 - pad, pad] * 2), taps)


def attention(q, k, v):
    """One head; q, k, v (B, d, N)."""
    weights = torch.einsum('bdn,bdm->bnm', q, k) / q.shape[1] ** .5
    return torch.einsum('bnm,bdm->bdn', weights.softmax(2), v)


def song(w, arguments, x, noise, y):
    taps, half = arguments['resample_filter'], math.sqrt(.5)
    if arguments['embedding_type'] == 'fourier':
        angle = 2 * math.pi * noise[:, None] * w['map_noise.freqs']
    else:
        angle = noise[:, None] * 10000. ** (-torch.arange(8) / 7)
    emb = torch.cat([angle.sin(), angle.cos()], 1)
    emb = emb + F.one_hot(y, 3) * 3 ** .5 @ w['map_label.weight'].t() + w['map_label.bias']
    for i in (0, 1):
        emb = F.silu(emb @ w[f'map_layer{i}.weight'].t() + w[f'map_layer{i}.bias'])

    def block(name, x, direction=None):
        h = F.silu(norm(w, f'{name}.norm0', x))
        if direction:
            h, x = resampled(h, taps, direction), resampled(x, taps, direction)
        h = conv(w, f'{name}.conv0', h)
        h = h + (emb @ w[f'{name}.affine.weight'].t() + w[f'{name}.affine.bias'])[..., None, None]
        h = conv(w, f'{name}.conv1', F.silu(norm(w, f'{name}.norm1', h)))
        x = half * (h + (conv(w, f'{name}.skip', x) if f'{name}.skip.weight' in w else x))
        if f'{name}.qkv.weight' not in w:
            return x
        qkv = conv(w, f'{name}.qkv', norm(w, f'{name}.norm2', x)).flatten(2)
        h = attention(qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3]).reshape(x.shape)
        return half * (x + conv(w, f'{name}.proj', h))

    first = conv(w, 'enc.16x16_conv', x)
    large = block('enc.16x16_block0', first)
    down = block('enc.8x8_down', large, 'down')
    if arguments['encoder_type'] == 'residual':     # convolution first, then the filter
        margin = (len(taps) - 1) // 2
        kernel = w['enc.8x8_aux_residual.weight'], w['enc.8x8_aux_residual.bias']
        aux = F.conv2d(x, *kernel, padding=1 + margin)
        down = half * (down + filtered(aux, [tap / sum(taps) for tap in taps])[:, :, ::2, ::2])
    small = block('enc.8x8_block0', down)
    h = block('dec.8x8_in1', block('dec.8x8_in0', small))
    h = block('dec.8x8_block0', torch.cat([h, small], 1))
    h = block('dec.16x16_up', block('dec.8x8_block1', torch.cat([h, down], 1)), 'up')
    h = block('dec.16x16_block0', torch.cat([h, large], 1))
    h = block('dec.16x16_block1', torch.cat([h, first], 1))
    return conv(w, 'dec.16x16_aux_conv', F.silu(norm(w, 'dec.16x16_aux_norm', h)))


def noise_levels(kind):
    """(sigma, c_skip, c_out, c_in, c_noise, levels of iDDPM) of four images.

    Sigma as a function of time, where the network has the inverse.
    """
    s, c_skip, c_out, c_in, c_noise, u = coefficients(kind)
    return (s, *(c[:, None, None, None] for c in (c_skip, c_out, c_in)), c_noise, u)


def coefficients(kind):
    time = torch.tensor([.01, .2, .6, .97])
    u, index = torch.linspace(9, 0, 1001) ** 2, torch.tensor([998, 700, 300, 5])
    if kind == 'VPPrecond':         # its noise levels as a function of time
        s = torch.expm1(.5 * 19.9 * time ** 2 + .1 * time).sqrt()
        return s, torch.ones(4), -s, (1 + s ** 2) ** -.5, 999 * time, None
    if kind == 'VEPrecond':
        s = 10. ** (4 * time - 2)
        return s, torch.ones(4), s, torch.ones(4), (s / 2).log(), None
    if kind == 'iDDPMPrecond':
        s = u[index] * 1.0001
        return s, torch.ones(4), -s, (1 + s ** 2) ** -.5, 999. - index, u
    s = 10. ** (4 * time - 2)
    total = s ** 2 + .25
    c_noise = s.log() * (250 if kind == 'consistency_models' else .25)
    return s, .25 / total, .5 * s / total ** .5, total ** -.5, c_noise, None


# The U-Net of guided-diffusion by its formulas

def adm(w, order, head, updown, scale_shift, x, t, y, groups=32):
    """Two resolutions of one block; attention at the lower. `t` may be a fraction."""
    frequency = 10000. ** (-torch.arange(16) / 16)
    angle = t[:, None] * frequency
    emb = torch.cat([angle.cos(), angle.sin()], 1)
    emb = F.silu(emb @ w['time_embed.0.weight'].t() + w['time_embed.0.bias'])
    emb = F.silu(emb @ w['time_embed.2.weight'].t() + w['time_embed.2.bias']
                 + w['label_emb.weight'][y])

    def block(name, x, direction=None):
        h = F.silu(norm(w, f'{name}.in_layers.0', x, 1e-5, groups or min(32, x.shape[1] // 4)))
        if direction:
            h, x = resampled(h, [1, 1], direction), resampled(x, [1, 1], direction)
        h = conv(w, f'{name}.in_layers.2', h)
        e = emb @ w[f'{name}.emb_layers.1.weight'].t() + w[f'{name}.emb_layers.1.bias']
        e = e[:, :, None, None]
        scale, shift = e.chunk(2, 1) if scale_shift else (torch.zeros_like(e), e)
        h = h if scale_shift else h + shift
        h = norm(w, f'{name}.out_layers.0', h, 1e-5, groups or min(32, h.shape[1] // 4))
        h = F.silu(h * (1 + scale) + shift if scale_shift else h)
        h = conv(w, f'{name}.out_layers.3', h)
        skip = f'{name}.skip_connection'
        return h + (conv(w, skip, x) if f'{skip}.weight' in w else x)

    def attend(name, x):
        h = norm(w, f'{name}.norm', x, 1e-5, groups or min(32, x.shape[1] // 4)).flatten(2)
        qkv = F.conv1d(h, w[f'{name}.qkv.weight'], w[f'{name}.qkv.bias'])
        heads, parts = x.shape[1] // head, []
        for i in range(heads):
            if order == 'edm':
                rows = [slice(3 * i * head + j, 3 * (i + 1) * head, 3) for j in range(3)]
            else:
                places = [3 * i + j if order == 'legacy' else heads * j + i for j in range(3)]
                rows = [slice(place * head, (place + 1) * head) for place in places]
            parts.append(attention(*(qkv[:, row] for row in rows)))
        weight, bias = w[f'{name}.proj_out.weight'], w[f'{name}.proj_out.bias']
        return x + F.conv1d(torch.cat(parts, 1), weight, bias).reshape(x.shape)

    first = conv(w, 'input_blocks.0.0', x)
    large = block('input_blocks.1.0', first)
    if updown:
        down = block('input_blocks.2.0', large, 'down')
    else:
        down = F.conv2d(large, w['input_blocks.2.0.op.weight'], w['input_blocks.2.0.op.bias'], 2, 1)
    small = attend('input_blocks.3.1', block('input_blocks.3.0', down))
    h = attend('middle_block.1', block('middle_block.0', small))
    h = torch.cat([block('middle_block.2', h), small], 1)
    h = torch.cat([attend('output_blocks.0.1', block('output_blocks.0.0', h)), down], 1)
    h = attend('output_blocks.1.1', block('output_blocks.1.0', h))
    if updown:
        h = block('output_blocks.1.2', h, 'up')
    else:
        h = conv(w, 'output_blocks.1.2.conv', h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    h = block('output_blocks.2.0', torch.cat([h, large], 1))
    h = block('output_blocks.3.0', torch.cat([h, first], 1))
    return conv(w, 'out.2', F.silu(norm(w, 'out.0', h, 1e-5, groups or min(32, h.shape[1] // 4))))


def adm_weights(widths=(32, 64), blocks=1, attention=(1,), updown=True, scale_shift=True,
                outputs=6, labels=4):
    """Random weights of such a U-Net; attention at some levels, `blocks` at each."""
    generator, w = torch.Generator().manual_seed(1), {}
    now, emb_ch, i = widths[0], 4 * widths[0], 0

    def add(name, *shape, mean=0.):
        gain = math.prod(shape[1:]) ** -.5 if len(shape) > 1 else .1
        w[f'{name}.weight'] = mean + gain * torch.randn(shape, generator=generator)
        w[f'{name}.bias'] = .1 * torch.randn(shape[0], generator=generator)

    def block(name, in_ch, out_ch):
        add(f'{name}.in_layers.0', in_ch, mean=1.)
        add(f'{name}.in_layers.2', out_ch, in_ch, 3, 3)
        add(f'{name}.emb_layers.1', (2 if scale_shift else 1) * out_ch, emb_ch)
        add(f'{name}.out_layers.0', out_ch, mean=1.)
        add(f'{name}.out_layers.3', out_ch, out_ch, 3, 3)
        if in_ch != out_ch:
            add(f'{name}.skip_connection', out_ch, in_ch, 1, 1)

    def attend(name, ch):
        add(f'{name}.norm', ch, mean=1.)
        add(f'{name}.qkv', 3 * ch, ch, 1)
        add(f'{name}.proj_out', ch, ch, 1)

    def resample(name, kind):
        if updown:
            block(name, now, now)
        else:
            add(f'{name}.{kind}', now, now, 3, 3)

    add('time_embed.0', emb_ch, widths[0])
    add('time_embed.2', emb_ch, emb_ch)
    w['label_emb.weight'] = torch.randn(labels, emb_ch, generator=generator)
    add('input_blocks.0.0', now, 3, 3, 3)
    skips = [now]
    for level, width in enumerate(widths):
        if level:
            i += 1
            resample(f'input_blocks.{i}.0', 'op')
            skips.append(now)
        for _ in range(blocks):
            i += 1
            block(f'input_blocks.{i}.0', now, width)
            now = width
            skips.append(now)
            if level in attention:
                attend(f'input_blocks.{i}.1', width)
    block('middle_block.0', now, now)
    attend('middle_block.1', now)
    block('middle_block.2', now, now)
    i = -1
    for level in reversed(range(len(widths))):
        for _ in range(blocks + 1):
            i += 1
            block(f'output_blocks.{i}.0', now + skips.pop(), widths[level])
            now = widths[level]
            if level in attention:
                attend(f'output_blocks.{i}.1', now)
        if level:
            resample(f'output_blocks.{i}.{2 if level in attention else 1}', 'conv')
    add('out.0', now, mean=1.)
    add('out.2', outputs, now, 3, 3)
    return w


def as_edm(w):
    """The same weights as those of a DhariwalUNet, in its order of blocks."""
    found = {}
    for key, value in w.items():
        layer, _, kind = key.rpartition('.')
        if layer in ENDS:
            name = ENDS[layer]
        else:
            place = next(place for place in PLACES if layer.startswith(f'{place}.'))
            name = f'{PLACES[place]}.{PARTS[layer[len(place) + 1:]]}'
        if name.endswith(('qkv', 'proj')) and kind == 'weight':
            value = value[..., None]
        found[f'{name}.{kind}'] = value.t() if layer == 'label_emb' else value
    return found


# the names of EDM
PLACES = {'input_blocks.1.0': 'enc.16x16_block0', 'input_blocks.2.0': 'enc.8x8_down',
          'input_blocks.3.0': 'enc.8x8_block0', 'input_blocks.3.1': 'enc.8x8_block0',
          'middle_block.0': 'dec.8x8_in0', 'middle_block.1': 'dec.8x8_in0',
          'middle_block.2': 'dec.8x8_in1', 'output_blocks.0.0': 'dec.8x8_block0',
          'output_blocks.0.1': 'dec.8x8_block0', 'output_blocks.1.0': 'dec.8x8_block1',
          'output_blocks.1.1': 'dec.8x8_block1', 'output_blocks.1.2': 'dec.16x16_up',
          'output_blocks.2.0': 'dec.16x16_block0', 'output_blocks.3.0': 'dec.16x16_block1'}
PARTS = {'in_layers.0': 'norm0', 'in_layers.2': 'conv0', 'emb_layers.1': 'affine',
         'out_layers.0': 'norm1', 'out_layers.3': 'conv1', 'skip_connection': 'skip',
         'norm': 'norm2', 'qkv': 'qkv', 'proj_out': 'proj'}
ENDS = {'time_embed.0': 'map_layer0', 'time_embed.2': 'map_layer1', 'label_emb': 'map_label',
        'input_blocks.0.0': 'enc.16x16_conv', 'out.0': 'out_norm', 'out.2': 'out_conv'}
