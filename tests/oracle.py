"""The formulas of the method once more, plain and slow, in float64: what the scripts must compute.

From the product come networks, images, keys of random numbers, the losses with closed forms, and
`Diffusion`: other tests check them. Gradients are those of autograd.
"""

import math
from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils import clip_grad_norm_

from classifier.frozen import load_classifier
from classifier.networks import build_classifier
from diffusion import Diffusion, distillation_loss
from losses import MemoryP2P, diversity, entropy, feature_kl
from model import UNet
from runtime import checkpoint, data, seeding

# 64 channels somewhere: with 32, group norm has one channel per group and wipes out t and y
NET = dict(ch=32, ch_mult=[2, 1], attn=[1], num_res_blocks=1)


def unet(weights, T, conditional=False, dropout=0.):
    """The tiny network of the tests in float64, in eval mode."""
    net = UNet(T, **NET, dropout=dropout, conditional=conditional).double()
    net.load_state_dict(weights)
    return net.to(memory_format=torch.channels_last).eval()     # dropout draws in this order


# Relations

def kl(a, b):
    """KL(softmax(a) || softmax(b)) over the last dimension."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def unit_rows(maps):
    """(B, H * W, C) unit vectors of the pixels of maps (B, C, H, W)."""
    return normalize(maps.flatten(2).mT, dim=2)


def intra_loss(map_S, map_T, tau, group):
    """IS_P2P: a double loop over the images of each group."""
    rows = []
    for S, T in zip(unit_rows(map_S).split(group), unit_rows(map_T).split(group)):
        for i in range(group):
            for j in range(group):
                rows.append(kl(T[i] @ T[j].mT / tau, S[i] @ S[j].mT / tau))
    return torch.cat(rows).mean()


def memory_loss(map_head, map_T, V, tau):
    """M_P2P: every pixel against the rows V of the queue."""
    return kl(unit_rows(map_T) @ V.mT / tau, unit_rows(map_head) @ V.mT / tau).mean()


def enqueued(queue, pointer, map_T, chosen, layout):
    """(queue, pointer) after the `chosen` pixels of the whole batch (B, C, H, W) have entered."""
    length, end, first = len(queue), pointer + len(chosen), pointer
    rows = unit_rows(map_T).flatten(0, 1)
    if layout == 'released':    # the map (B, C, H, W) in memory, read as if it were (C, B, H, W)
        scrambled = unit_rows(map_T).mT.contiguous().view(queue.shape[1], -1)
        rows = normalize(scrambled.mT, dim=1)
        if end >= length:       # its last rows are written, then pointer 0
            first, end = length - len(chosen), 0
    queue = queue.clone()
    queue[(first + torch.arange(len(chosen))) % length] = rows[chosen]
    return queue, end % length


# Optimisation

def rate(step, lr, warmup, total_steps, decay):
    """Step 1, 2, ..: linear warm-up that is over at step `warmup`; half a cosine from step 1 on."""
    rate = lr * step / warmup if step < warmup else lr
    return rate * (1 + math.cos(math.pi * (step - 1) / total_steps)) / 2 if decay else rate


def moments(module, saved, wd):
    """{parameter: (m, v)} after a step of Adam from its state `saved`; decay is in the gradient."""
    found = {}
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for i, (name, p) in enumerate(trained):
        g = p.grad + wd * p.detach()
        old = saved['state'].get(i, dict(exp_avg=g * 0, exp_avg_sq=g * 0))
        found[name] = (0.9 * old['exp_avg'].double() + 0.1 * g,
                       0.999 * old['exp_avg_sq'].double() + 0.001 * g ** 2)
    return found


# Training of a U-Net

class Training:
    """What a script makes of its flags {name: value} in a folder of `wiring.make_inputs`."""

    def __init__(self, folder, flags):
        f = self.flags = SimpleNamespace(**flags)
        self.images = data.make_dataset(f.dataset, folder / 'photos', 8, train=True)
        self.teacher, self.features = None, None
        if f.script == 'train_base.py':
            self.grid = Diffusion(f.T, f.time_scale, f.mean_type)
            return
        state = checkpoint.read(folder / f.base_ckpt)
        self.weights = state.get('ema_model', state['net_model'])
        self.grid = Diffusion(state['T'] // 2, 2 * state['time_scale'], f.mean_type or 'v')
        self.teacher_grid = self.grid.with_steps(state['T'], state['mean_type'])
        self.teacher = unet(self.weights, self.grid.N, f.conditional).requires_grad_(False)
        if f.script == 'train_rdd.py':
            half = [0.5] * 3 if f.classifier_normalisation == '05' else None
            self.features = load_classifier(folder / 'classifier', mean=half, std=half).double()

    def first_state(self):
        """The checkpoint before the first step."""
        f, state = self.flags, dict(optim=dict(state={}), optim_head=dict(state={}))
        torch.manual_seed(seeding.mix(f.seed, seeding.WEIGHTS))
        if self.features and f.loss_type in ('mp2p', 'm_p2p'):
            state['memory'] = self.memory().state_dict()
        weights = self.weights if self.teacher else UNet(
            self.grid.N, **NET, conditional=f.conditional).state_dict()
        return dict(state, net_model=weights, ema_model=weights)

    def memory(self):
        f = self.flags
        return MemoryP2P(64, f.queue_size, f.contrast_size, layout=f.queue_layout)

    def drawn(self, stream, count, number, step):
        rng = seeding.generator('cpu', self.flags.seed, stream, step)
        return torch.randperm(count, generator=rng)[:number]

    def parts(self, step):
        """Yield x_0, y, t, eps, z_t and the targets of each part: rows of one batch."""
        f, grid = self.flags, self.grid
        x_0, y = next(data.batches(self.images, f.batch_size, f.seed, 'cpu', step - 1))
        rng = seeding.generator('cpu', f.seed, seeding.NOISE, grid.T, step)
        first = 1 if self.teacher else 0
        t = grid.visited[torch.randint(first, grid.T + 1, (len(y),), generator=rng)]
        eps = torch.randn(x_0.shape, generator=rng)
        chunks = [v.chunk(f.grad_accum) for v in (x_0.double(), y, t, eps.double())]
        for x_0, y, t, eps in zip(*chunks):
            part = SimpleNamespace(x_0=x_0, y=y, t=t, eps=eps, z_t=grid.add_noise(x_0, eps, t))
            if self.teacher:
                part.x_target = self.teacher_grid.two_step_target(self.teacher, part.z_t, t, y)
                part.e_target = grid.eps_of(part.z_t, part.x_target, t)
            yield part

    def terms(self, net, part, memory, V):
        """{name: (weight, loss)} of a part; V: the rows of the queue that it is compared with."""
        f, (x, e) = self.flags, self.grid.predict(net, part.z_t, part.t, part.y)
        images = x, e, part.x_0, part.eps
        if f.script == 'train_base.py':
            kind = 'eps' if f.mean_type == 'epsilon' else f.loss_type
            return dict(loss=(1, distillation_loss(*images, kind).mean()))
        targets = x, e, part.x_target, part.e_target
        if f.script == 'PD.py':
            return dict(loss=(1, distillation_loss(*targets, f.loss_type).mean()))
        logits, f_S, map_S = self.features(x)
        _, f_T, map_T = self.features(part.x_target)
        terms = {}
        if f.feature:
            terms['loss_feature'] = f.feature_weight, feature_kl(f_S, f_T, f.temperature)
        if f.loss_type in ('mp2p', 'is_p2p'):
            quarter = f.batch_size // 4         # of the whole batch, where parts are that large
            fits = quarter > 1 and len(x) % quarter == 0
            group = f.relation_group or (quarter if fits else len(x))
            loss = intra_loss(map_S, map_T, f.intra_temperature, group)
            terms['loss_intra'] = f.intra_weight, loss
        if memory:
            loss = memory_loss(memory.project_head(map_S), map_T, V, f.contrast_temperature)
            terms['loss_memory'] = f.memory_weight, loss
        if f.alpha:
            terms['entropy'] = f.alpha * f.beta, entropy(logits)
            terms['diversity'] = f.alpha * (1 - f.beta), diversity(logits.softmax(1).mean(0))
        if f.logits:
            terms['loss_pd'] = f.logits_weight, distillation_loss(*targets).mean()
        if f.gt:
            terms['loss_gt'] = f.gt_weight, distillation_loss(*images).mean()
        return terms

    def step(self, step, before):
        """What a step must log; network and memory with their gradients, and the new queue."""
        f, parts, logged, memory, V = self.flags, list(self.parts(step)), {}, None, None
        net = unet(before['net_model'], self.grid.N, f.conditional, f.dropout).train()
        if 'memory' in before:
            memory = self.memory().double()
            memory.load_state_dict(before['memory'])
            map_T = torch.cat([self.features(part.x_target)[2] for part in parts])
            chosen = self.drawn(seeding.PIXELS, map_T[:, 0].numel(), f.queue_update, step)
            memory.queue, memory.pointer = enqueued(memory.queue, memory.pointer, map_T, chosen,
                                                    f.queue_layout)
            if f.queue_layout == 'pixels':
                memory.contrast = self.drawn(seeding.CONTRAST, f.queue_size, f.contrast_size, step)
            V = memory.queue[memory.contrast]
        total = 0.
        for number, part in enumerate(parts):
            torch.manual_seed(seeding.mix(f.seed, seeding.DROPOUT, step, 0, number))
            terms = self.terms(net, part, memory, V)
            loss = sum(weight * value for weight, value in terms.values())
            total = total + loss / len(parts)
            for name, (_, value) in dict(terms, loss=(1, loss)).items():
                logged[name] = logged.get(name, 0.) + value.item() / len(parts)
        total.backward()
        logged['grad_norm'] = clip_grad_norm_(net.parameters(), f.grad_clip or math.inf).item()
        logged['lr'] = rate(step, f.lr, f.warmup, f.total_steps, decay=self.teacher is not None)
        return logged, net, memory


# Training of a classifier

def classifier_trained(state, weights, batches, rates, wd, nesterov, accum):
    """The network of the checkpoint `state` after SGD from `weights`, in `accum` parts a step."""
    net = build_classifier(state['name'], state['num_classes'], state['mean'], state['std'])
    net.load_state_dict(weights)
    net = net.double().train()
    optim = torch.optim.SGD(net.parameters(), 1., 0.9, weight_decay=wd, nesterov=nesterov)
    for (x_0, y), lr in zip(batches, rates):
        optim.param_groups[0]['lr'] = lr
        optim.zero_grad()
        for x, labels in zip(x_0.double().chunk(accum), y.chunk(accum)):
            (cross_entropy(net(x)[0], labels) / accum).backward()
        optim.step()
    return net
