"""The formulas of the method once more, plain and slow, in float64: what the scripts must compute.

Nothing here comes from the product but the two networks and the seeds of dropout. Images, times,
noise and chosen pixels are given; see record.py. Loops are over images and pixels where the product
has one matrix product; gradients are those of autograd.
"""

import math

import numpy as np
import torch
from torch.nn.functional import conv2d, one_hot

from classifier import build_classifier
from model import UNet
from runtime import seeding

TABLE = 'time_embedding.timembedding.0.weight'      # a table, not a parameter
HEAD = {'conv1': 'project_head.0.weight', 'scale': 'project_head.1.weight',
        'shift': 'project_head.1.bias', 'conv2': 'project_head.3.weight'}
EPS = 1e-5          # of a batch norm


def double(tensor):
    return tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor


def unet(weights, T, conditional=False, dropout=0., classes=10):
    """The tiny network of the tests in float64, in eval mode."""
    with torch.device('meta'):
        net = UNet(T, 32, [2, 1], [1], 1, dropout, conditional, classes)
    net.load_state_dict({key: double(value).clone() for key, value in weights.items()},
                        assign=True)
    net.requires_grad_(True)
    net.time_embedding.timembedding[0].requires_grad_(False)
    return net.to(memory_format=torch.channels_last).eval()     # dropout draws in this order


def classifier(state, mean, std):
    """A trained classifier in float64, for images in [-1, 1] that it wants with this mean, std."""
    net = build_classifier(state['name'], state['model']['fc.weight'].shape[0]).double()
    net.load_state_dict({key: double(value) for key, value in state['model'].items()})
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    # the network itself was built with 0.5, which changes nothing
    net.register_forward_pre_hook(lambda _, inputs: (((inputs[0] + 1) / 2 - mean) / std,))
    return net.eval().requires_grad_(False)


# Diffusion

def schedule(N):
    """alpha and sigma at 0..N: beta_i = min(1 - f(i + 1) / f(i), 0.999)."""
    def f(i):
        return math.cos((i / (N + 1) + 0.008) / 1.008 * math.pi / 2) ** 2

    kept, table = 1., []
    for i in range(N + 1):
        kept *= 1 - min(1 - f(i + 1) / f(i), 0.999)
        table.append(kept)
    alpha_bar = torch.tensor(table, dtype=torch.float64)
    return alpha_bar.sqrt().view(-1, 1, 1, 1), (1 - alpha_bar).sqrt().view(-1, 1, 1, 1)


class Grid:
    """alpha_t, sigma_t of a base grid 0..N, and what a network with outputs `mean_type` means."""

    def __init__(self, N, mean_type='xstart'):
        self.alpha, self.sigma = schedule(N)
        self.mean_type = mean_type

    def z(self, x, eps, t):
        return self.alpha[t] * x + self.sigma[t] * eps

    def both(self, net, z, t, y):
        """x_pred and eps_pred."""
        out = net(z, t, y)
        if self.mean_type == 'xstart':
            return out, (z - self.alpha[t] * out) / self.sigma[t]
        if self.mean_type == 'v':
            return self.alpha[t] * z - self.sigma[t] * out, self.sigma[t] * z + self.alpha[t] * out
        return (z - self.sigma[t] * out) / self.alpha[t], out

    def two_steps(self, teacher, z, t, y, between):
        """x_target: two DDIM steps of `between` grid points each, seen as one; clipped for eps."""
        now = z
        for u in (t, t - between):
            x, eps = self.both(teacher, now, u, y)
            if self.mean_type == 'epsilon':
                x = x.clamp(-1, 1)
                eps = (now - self.alpha[u] * x) / self.sigma[u]
            now = self.z(x, eps, u - between)
        s = t - 2 * between
        r = self.sigma[s] / self.sigma[t]
        return (now - r * z) / (self.alpha[s] - r * self.alpha[t])

    def sample(self, net, z, times, y):
        """Clipped DDIM over `times`, from the last grid point to 0."""
        for t, s in zip(times[:-1], times[1:]):
            t, s = (torch.full((len(z),), u) for u in (t, s))
            x = self.both(net, z, t, y)[0].clamp(-1, 1)
            eps = (z - self.alpha[t] * x) / self.sigma[t]
            z = self.z(x, eps, s)
        return z.clamp(-1, 1)


def loss_of(kind, x, eps, x_target, eps_target):
    """Mean over images of the error in x, in eps, or of the larger one per image."""
    values = []
    for i in range(len(x)):
        error = dict(x=((x[i] - x_target[i]) ** 2).mean(),
                     eps=((eps[i] - eps_target[i]) ** 2).mean())
        values.append(max(error.values()) if kind == 'both' else error[kind])
    return sum(values) / len(values)


# Relations

def kl(a, b):
    """KL(softmax(a) || softmax(b)) over the last dimension."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def feature_loss(f_S, f_T, temperature):
    return sum(kl(f_T[i] / temperature, f_S[i])
               for i in range(len(f_S))) / len(f_S)


def unit_rows(image):
    """(H * W, C) unit vectors of the pixels of one map (C, H, W)."""
    rows = image.flatten(1).t()
    return rows / (rows * rows).sum(1, keepdim=True).sqrt().clamp(min=1e-12)


def intra_loss(map_S, map_T, tau, group):
    """IS_P2P: a double loop over the images of each group."""
    S, T = ([unit_rows(image) for image in m] for m in (map_S, map_T))
    rows = []
    for first in range(0, len(S), group):
        members = range(first, first + group)
        for i in members:
            for j in members:
                rows.append(kl(T[i] @ T[j].t() / tau, S[i] @ S[j].t() / tau))
    return torch.cat(rows).mean()


def head_of(weights, map_S):
    """1x1 convolution, batch norm of this batch, ReLU, 1x1 convolution; and mean, variance."""
    h = conv2d(map_S, weights['conv1'])
    mean = h.mean((0, 2, 3), keepdim=True)
    var = ((h - mean) ** 2).mean((0, 2, 3), keepdim=True)
    shape = (1, -1, 1, 1)
    h = (h - mean) / (var + EPS).sqrt() * weights['scale'].view(shape) + weights[
        'shift'].view(shape)
    return conv2d(h.clamp(min=0), weights['conv2']), mean.flatten(), var.flatten()


def memory_loss(map_head, map_T, V, tau):
    """M_P2P: every pixel against the rows V of the queue."""
    rows = [kl(unit_rows(t) @ V.t() / tau, unit_rows(s) @ V.t() / tau)
            for s, t in zip(map_head, map_T)]
    return torch.cat(rows).mean()


def enqueued(queue, pointer, map_T, chosen, layout):
    """(queue, pointer) after the `chosen` pixels of the whole batch (B, C, H, W) have entered."""
    B, C, H, W = map_T.shape
    queue, length = queue.clone(), len(queue)
    if layout == 'pixels':
        pixels = torch.cat([unit_rows(image) for image in map_T])
        for k, n in enumerate(chosen.tolist()):
            queue[(pointer + k) % length] = pixels[n]
        return queue, (pointer + len(chosen)) % length
    # released: the map (B, C, H, W) in memory, read as if it were (C, B, H, W); the last rows are
    # written at the end of the queue, and then the pointer is 0
    unit = map_T / map_T.norm(dim=1, keepdim=True).clamp(min=1e-12)
    scrambled = unit.contiguous().view(-1).view(C, B * H * W)
    wraps = pointer + len(chosen) >= length
    first = length - len(chosen) if wraps else pointer
    for k, n in enumerate(chosen.tolist()):
        queue[first + k] = scrambled[:, n] / scrambled[:, n].norm()
    return queue, 0 if wraps else pointer + len(chosen)


# Optimisation

def rate(step, lr, warmup, total_steps, decay):
    """Step 1, 2, ..: linear warm-up that is over at step `warmup`; half a cosine from step 1 on."""
    rate = lr * step / warmup if step < warmup else lr
    return rate * (1 + math.cos(math.pi * (step - 1) / total_steps)) / 2 if decay else rate


def clipped(grads, limit):
    """(gradients of a norm of at most `limit`, if that is not 0; the norm before)."""
    norm = math.sqrt(sum((g ** 2).sum().item() for g in grads.values()))
    factor = min(1., limit / norm) if limit else 1.
    return {name: g * factor for name, g in grads.items()}, norm


def adam(p, g, m, v, step, lr, wd):
    """(p, m, v) after one step of Adam; decay is L2, in the gradient."""
    g = g + wd * p
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2
    up = m / (1 - 0.9 ** step) / ((v / (1 - 0.999 ** step)).sqrt() + 1e-8)
    return p - lr * up, m, v


def sgd(p, g, buffer, lr, wd, nesterov):
    """(p, buffer) after one step with momentum 0.9; buffer None at first."""
    g = g + wd * p
    buffer = g if buffer is None else 0.9 * buffer + g
    return p - lr * (g + 0.9 * buffer if nesterov else buffer), buffer


def gradients(loss, named):
    grads = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, grads))


# One step of a script

def step_terms(flags, grid, net, part, head=None, teacher=None, features=None, queue=None):
    """{name: (weight, loss)} of one part of a batch, for whichever script the flags are of.

    Args:
        flags: all flags by name, and `script`. net: the network in training. head: {name: weight}
        of the head. teacher: network. features: classifier. queue: (rows,C) of the contrast set.
    Returns:
        the terms, and mean and variance of the batch norm in the head, or None.
    """
    x_0, eps, t, y = double(part['x_0']), double(part['eps']), part['t'], part['y']
    z = grid.z(x_0, eps, t)
    x, e = grid.both(net, z, t, y)
    script = flags['script']
    if script == 'train_base.py':
        kind = 'eps' if flags['mean_type'] == 'epsilon' else flags['loss_type']
        return dict(loss=(1, loss_of(kind, x, e, x_0, eps))), None
    x_target, e_target = part['x_target'], part['e_target']
    if script == 'PD.py':
        return dict(loss=(1, loss_of(flags['loss_type'], x, e, x_target, e_target))), None
    terms, norm = {}, None
    logits, f_S, map_S = features(x)
    _, f_T, map_T = features(x_target)
    if flags['feature']:
        terms['loss_feature'] = (flags['feature_weight'],
                                 feature_loss(f_S, f_T, flags['temperature']))
    if flags['loss_type'] in ('mp2p', 'is_p2p'):
        terms['loss_intra'] = (flags['intra_weight'], intra_loss(
            map_S, map_T, flags['intra_temperature'], group_of(flags, len(x))))
    if flags['loss_type'] in ('mp2p', 'm_p2p'):
        mapped, *norm = head_of(head, map_S)
        terms['loss_memory'] = (flags['memory_weight'], memory_loss(
            mapped, map_T, queue, flags['contrast_temperature']))
    if flags['alpha']:
        log_p = logits.log_softmax(1)
        terms['entropy'] = flags['alpha'] * flags['beta'], -(log_p.exp() * log_p).sum(1).mean()
        mean = log_p.exp().mean(0)
        terms['diversity'] = flags['alpha'] * (1 - flags['beta']), (mean * mean.log()).sum()
    if flags['logits']:
        terms['loss_pd'] = flags['logits_weight'], loss_of('both', x, e, x_target, e_target)
    if flags['gt']:
        terms['loss_gt'] = flags['gt_weight'], loss_of('both', x, e, x_0, eps)
    return terms, norm


def group_of(flags, part):
    """Images per group: as asked, or a quarter of the whole batch where parts are that large."""
    quarter = flags['batch_size'] // 4
    return flags['relation_group'] or (quarter if quarter and part % quarter == 0 else part)


def expected_step(flags, step, before, parts, chosen=None, contrast=None, teacher=None,
                  teacher_type=None, features=None, teacher_step=1, N=8):
    """What a step must log and leave behind.

    Args:
        before: checkpoint before the step. parts: what the recorder kept of it. chosen, contrast:
        pixels that enter the queue, rows of it that are compared with. teacher: network of the
        teacher, with outputs `teacher_type` and steps of `teacher_step` grid points. N: last point
        of the grid.
    Returns:
        logged {name: value}; grads {name: gradient of the network, unclipped}; after: dict of
        net_model, moments, ema_model, queue, pointer, head, head_moments, running (mean, var).
    """
    grid = Grid(N, flags['mean_type'])
    net = unet(before['net_model'], N, flags['conditional'], flags['dropout'])
    net.train()
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    after, head, queue = {}, None, None
    for part in parts if teacher is not None else ():
        with torch.no_grad():
            at, z = part['t'], grid.z(double(part['x_0']), double(part['eps']), part['t'])
            part['x_target'] = Grid(N, teacher_type).two_steps(teacher, z, at, part['y'],
                                                               teacher_step)
            part['e_target'] = (z - grid.alpha[at] * part['x_target']) / grid.sigma[at]
    if chosen is not None:
        memory = before['memory']
        head = {name: double(memory[key]).requires_grad_() for name, key in HEAD.items()}
        map_T = torch.cat([features(part['x_target'])[2] for part in parts])
        after['queue'], after['pointer'] = enqueued(
            double(memory['queue']), memory['_extra_state']['pointer'], map_T, chosen,
            flags['queue_layout'])
        queue = after['queue'][contrast]
        running = [double(memory[f'project_head.1.running_{what}']) for what in ('mean', 'var')]
    total, logged = 0., {}
    for number, part in enumerate(parts):
        torch.manual_seed(seeding.mix(flags['seed'], seeding.DROPOUT, step, 0, number))
        terms, norm = step_terms(flags, grid, net, part, head, teacher, features, queue)
        loss = sum(weight * value for weight, value in terms.values())
        for name, value in dict({name: value for name, (_, value) in terms.items()},
                                loss=loss).items():
            logged[name] = logged.get(name, 0.) + value.item() / len(parts)
        total = total + loss / len(parts)
        if norm:
            count = len(part['x_0']) * features_size(features, part)
            unbiased = norm[1] * count / (count - 1)
            running = [0.9 * old + 0.1 * new.detach() for old, new in
                       zip(running, (norm[0], unbiased))]
            after['running'] = running
    every = dict(named, **{f'head.{name}': p for name, p in (head or {}).items()})
    grads = gradients(total, every)
    of_head = {name: grads.pop(f'head.{name}') for name in head or {}}
    logged['lr'] = rate(step, flags['lr'], flags['warmup'], flags['total_steps'],
                        flags['script'] != 'train_base.py')
    applied, logged['grad_norm'] = clipped(grads, flags['grad_clip'])
    after['net_model'], after['moments'] = optimised(
        named, applied, before.get('optim'), step, logged['lr'], flags['wd'])
    if head:
        after['head'], after['head_moments'] = optimised(
            head, of_head, before.get('optim_head'), step, flags['lr'], flags['wd'])
    if 'ema_model' in before:
        decay = flags['ema_decay']
        after['ema_model'] = {name: decay * double(before['ema_model'][name]) + (1 - decay) * new
                              for name, new in after['net_model'].items()}
    return logged, after


def features_size(features, part):
    """Pixels of the feature map of one image."""
    return features(part['x_target'][:1])[2][0, 0].numel()


def optimised(named, grads, saved, step, lr, wd):
    """({name: weight}, {name: (m, v)}) after a step of Adam from the moments in a checkpoint."""
    weights, moments = {}, {}
    for i, (name, p) in enumerate(named.items()):
        entry = (saved or dict(state={}))['state'].get(i)
        old = [double(entry[key]) for key in ('exp_avg', 'exp_avg_sq')] if entry else [
            torch.zeros_like(p), torch.zeros_like(p)]
        weights[name], *moments[name] = adam(p.detach(), grads[name], *old, step, lr, wd)
    return weights, moments


# Training of a classifier

def classifier_steps(state, batches, rates, wd, nesterov):
    """The network after SGD on `batches` [(x, y)] at `rates`; and the losses.

    state: `name`, `model` (weights before), `mean`, `std`.
    """
    net = classifier(state, state['mean'], state['std']).requires_grad_(True).train()
    buffers, losses = {}, []
    for (x, y), lr in zip(batches, rates):
        log_p = net(double(x))[0].log_softmax(1)
        loss = -(log_p * one_hot(y, log_p.shape[1])).sum(1).mean()
        named = dict(net.named_parameters())
        grads = gradients(loss, named)
        with torch.no_grad():
            for name, value in named.items():
                new, buffers[name] = sgd(value, grads[name], buffers.get(name), lr, wd, nesterov)
                value.copy_(new)
        losses.append(loss.item())
    return net, losses


# Scores

def frechet(features, mu, sigma):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the root from eigenvalues of S1 S2."""
    features = features.numpy()
    mu1, sigma1 = features.mean(0), np.cov(features.T)
    eigenvalues = np.linalg.eigvals(sigma1 @ sigma).real.clip(min=0)
    return ((mu1 - mu) ** 2).sum() + np.trace(sigma1) + np.trace(sigma) - 2 * np.sqrt(
        eigenvalues).sum()


def inception(probs, splits=10):
    """exp of the mean KL(p(y|x) || p(y)), mean and deviation over parts of the images."""
    scores = [math.exp((part * (part / part.mean(0)).log()).sum(1).mean().item())
              for part in probs.tensor_split(splits)]
    return float(np.mean(scores)), float(np.std(scores))
