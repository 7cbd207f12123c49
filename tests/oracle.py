"""The formulas of the method once more, plain and slow, in float64: what the scripts must compute.

From the product come the networks, the seeds of dropout, and `Diffusion`, which test_diffusion.py
and test_parity.py check. Images, times, noise and chosen pixels are given, see record.py; gradients
are those of autograd.
"""

import math

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from classifier import build_classifier
from diffusion import Diffusion, distillation_loss
from losses import MemoryP2P
from model import UNet
from runtime import seeding


def double(tensor):
    return tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor


def unet(weights, T, conditional=False, dropout=0.):
    """The tiny network of the tests in float64, in eval mode."""
    net = UNet(T, 32, [2, 1], [1], 1, dropout, conditional).double()
    net.load_state_dict(weights)
    return net.to(memory_format=torch.channels_last).eval()     # dropout draws in this order


def classifier(state, mean, std):
    """A trained classifier in float64, for images in [-1, 1] that it wants with this mean, std."""
    net = build_classifier(state['name'], state['model']['fc.weight'].shape[0]).double()
    net.load_state_dict(state['model'])
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    # the network itself was built with 0.5, which changes nothing
    net.register_forward_pre_hook(lambda _, inputs: (((inputs[0] + 1) / 2 - mean) / std,))
    return net.eval().requires_grad_(False)


# Relations

def kl(a, b):
    """KL(softmax(a) || softmax(b)) over the last dimension."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


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


def memory_loss(map_head, map_T, V, tau):
    """M_P2P: every pixel against the rows V of the queue."""
    rows = [kl(unit_rows(t) @ V.t() / tau, unit_rows(s) @ V.t() / tau)
            for s, t in zip(map_head, map_T)]
    return torch.cat(rows).mean()


def enqueued(queue, pointer, map_T, chosen, layout):
    """(queue, pointer) after the `chosen` pixels of the whole batch (B, C, H, W) have entered."""
    queue, length, end = queue.clone(), len(queue), pointer + len(chosen)
    rows = torch.cat([unit_rows(image) for image in map_T])
    at_end = layout == 'released' and end >= length     # its last rows are written, then pointer 0
    if layout == 'released':    # the map (B, C, H, W) in memory, read as if it were (C, B, H, W)
        maps = torch.stack([unit_rows(image).t() for image in map_T])
        rows = maps.view(maps.shape[1], -1).t()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    first = length - len(chosen) if at_end else pointer
    for k, n in enumerate(chosen.tolist()):
        queue[(first + k) % length] = rows[n]
    return queue, 0 if at_end else end % length


# Optimisation

def rate(step, lr, warmup, total_steps, decay):
    """Step 1, 2, ..: linear warm-up that is over at step `warmup`; half a cosine from step 1 on."""
    rate = lr * step / warmup if step < warmup else lr
    return rate * (1 + math.cos(math.pi * (step - 1) / total_steps)) / 2 if decay else rate


def moments(module, saved, wd):
    """{parameter: (m, v)} after a step of Adam by their gradients; decay is L2, in the gradient.

    saved: state dict of the optimiser before it.
    """
    found = {}
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for i, (name, p) in enumerate(trained):
        old = saved['state'].get(i, dict(exp_avg=p * 0, exp_avg_sq=p * 0))
        g = p.grad + wd * p.detach()
        found[name] = (0.9 * double(old['exp_avg']) + 0.1 * g,
                       0.999 * double(old['exp_avg_sq']) + 0.001 * g ** 2)
    return found


# One step of a script

def step_terms(flags, grid, net, part, features, memory, queue):
    """{name: (weight, loss)} of one part of a batch, for whichever script the flags are of.

    Args:
        flags: all flags by name, and `script`.
        net, features: the network in training, the classifier.
        part: images, noise, times, labels; `x_target`, `e_target` of the teacher.
        memory, queue: `MemoryP2P`, whose head is trained, or None; the rows compared with.
    """
    x_0, eps, t = double(part['x_0']), double(part['eps']), part['t']
    x, e = grid.predict(net, grid.add_noise(x_0, eps, t), t, part['y'])
    if flags['script'] == 'train_base.py':
        kind = 'eps' if flags['mean_type'] == 'epsilon' else flags['loss_type']
        return dict(loss=(1, distillation_loss(x, e, x_0, eps, kind).mean()))
    target = part['x_target'], part['e_target']
    if flags['script'] == 'PD.py':
        return dict(loss=(1, distillation_loss(x, e, *target, flags['loss_type']).mean()))
    logits, f_S, map_S = features(x)
    _, f_T, map_T = features(part['x_target'])
    terms = {}
    if flags['feature']:
        terms['loss_feature'] = flags['feature_weight'], kl(f_T / flags['temperature'], f_S).mean()
    if flags['loss_type'] in ('mp2p', 'is_p2p'):
        quarter = flags['batch_size'] // 4      # of the whole batch, where parts are that large
        group = flags['relation_group'] or (
            quarter if quarter and len(x) % quarter == 0 else len(x))
        terms['loss_intra'] = flags['intra_weight'], intra_loss(
            map_S, map_T, flags['intra_temperature'], group)
    if memory:
        terms['loss_memory'] = flags['memory_weight'], memory_loss(
            memory.project_head(map_S), map_T, queue, flags['contrast_temperature'])
    if flags['alpha']:
        log_p = logits.log_softmax(1)
        terms['entropy'] = flags['alpha'] * flags['beta'], -(log_p.exp() * log_p).sum(1).mean()
        p = log_p.exp().mean(0)
        terms['diversity'] = flags['alpha'] * (1 - flags['beta']), (p * p.log()).sum()
    if flags['logits']:
        terms['loss_pd'] = flags['logits_weight'], distillation_loss(x, e, *target, 'both').mean()
    if flags['gt']:
        terms['loss_gt'] = flags['gt_weight'], distillation_loss(x, e, x_0, eps, 'both').mean()
    return terms


def expected_step(flags, step, before, parts, chosen=None, contrast=None, teacher=None,
                  teacher_type=None, features=None, teacher_step=1, N=8):
    """What a step must log and leave behind.

    Args:
        before: checkpoint before the step.
        parts: what the recorder kept of it.
        chosen, contrast: pixels that enter the queue, rows of it that are compared with.
        teacher: its network, with outputs `teacher_type` and steps of `teacher_step` grid points.
        N: last point of the grid.
    Returns:
        logged {name: value}; after: dict of moments and, with a queue, of queue, pointer,
        head_moments, running (mean, var).
    """
    grid = Diffusion(N, mean_type=flags['mean_type'])
    net = unet(before['net_model'], N, flags['conditional'], flags['dropout']).train()
    after, memory, queue = {}, None, None
    for part in parts if teacher is not None else ():
        diffusion, t = grid.with_steps(N // teacher_step, teacher_type), part['t']
        with torch.no_grad():
            z = grid.add_noise(double(part['x_0']), double(part['eps']), t)
            part['x_target'] = diffusion.two_step_target(teacher, z, t, part['y'])
            part['e_target'] = grid.eps_of(z, part['x_target'], t)
    if chosen is not None:
        memory = MemoryP2P(before['memory']['queue'].shape[1], flags['queue_size'],
                           flags['contrast_size'], layout=flags['queue_layout']).double()
        memory.load_state_dict(before['memory'])
        map_T = torch.cat([features(part['x_target'])[2] for part in parts])
        after['queue'], after['pointer'] = enqueued(
            memory.queue, before['memory']['_extra_state']['pointer'], map_T, chosen,
            flags['queue_layout'])
        queue = after['queue'][contrast]
    total, logged = 0., {}
    for number, part in enumerate(parts):
        torch.manual_seed(seeding.mix(flags['seed'], seeding.DROPOUT, step, 0, number))
        terms = step_terms(flags, grid, net, part, features, memory, queue)
        loss = sum(weight * value for weight, value in terms.values())
        total = total + loss / len(parts)
        values = {name: value for name, (_, value) in terms.items()}
        for name, value in dict(values, loss=loss).items():
            logged[name] = logged.get(name, 0.) + value.item() / len(parts)
    total.backward()
    limit = flags['grad_clip'] or math.inf
    logged['grad_norm'] = clip_grad_norm_(net.parameters(), limit).item()
    logged['lr'] = rate(step, flags['lr'], flags['warmup'], flags['total_steps'],
                        flags['script'] != 'train_base.py')
    after['moments'] = moments(net, before['optim'], flags['wd'])
    if memory:
        after['head_moments'] = moments(memory, before['optim_head'], flags['wd'])
        norm = memory.project_head[1]
        after['running'] = norm.running_mean, norm.running_var
    return logged, after


# Training of a classifier

def classifier_trained(state, batches, rates, wd, nesterov):
    """The network after SGD on `batches` [(x, y)] at `rates`.

    state: `name`, `model` (weights before), `mean`, `std`.
    """
    net = classifier(state, state['mean'], state['std']).requires_grad_(True).train()
    optim = torch.optim.SGD(net.parameters(), 1., 0.9, weight_decay=wd, nesterov=nesterov)
    for (x, y), lr in zip(batches, rates):
        optim.param_groups[0]['lr'] = lr
        optim.zero_grad()
        cross_entropy(net(double(x))[0], y).backward()
        optim.step()
    return net
