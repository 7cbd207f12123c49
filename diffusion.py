"""Diffusion in the symbols of the papers: tables and pure functions. Holds no network.

Times t, s are integers on the base grid 0..N. z_t = alpha_t x_0 + sigma_t eps. A network is called
with these times, and predicts x_0 ('xstart'), eps ('epsilon') or v = alpha_t eps - sigma_t x_0.
"""

import math

import torch


def alpha_bar_table(N, schedule='cosine'):
    """Cosine schedule (Nichol & Dhariwal 2021, Eq. 17): alpha_bar at 0..N, float64 (N + 1,).

    f(i) = cos^2((i / (N + 1) + s) / (1 + s) * pi / 2) with s = 0.008; beta_i = min(1 - f(i + 1) /
    f(i), 0.999); alpha_bar = cumprod(1 - beta). Index 0 is one step into the schedule: sigma is
    0.0063 there for N = 1024, not 0. Published checkpoints were trained on this table.
    dict(name=, betas=): a schedule of other projects. Index 0 is the clean image (alpha_bar = 1),
    index k uses betas[k - 1]. In float32, as diffusers has trained its networks.
    """
    if isinstance(schedule, dict):
        alpha_bar = torch.cumprod(1 - torch.tensor(schedule['betas'], dtype=torch.float32), dim=0)
        return torch.cat([torch.ones(1), alpha_bar]).double()
    i = torch.arange(N + 2, dtype=torch.float64) / (N + 1)
    f = torch.cos((i + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, dim=0)


def clean_linear(N=1000):
    """Schedule of DDPM (Ho et al. 2020): betas from 1e-4 to 0.02 for times 1..N of a network."""
    return dict(name='linear', betas=torch.linspace(1e-4, 0.02, N).tolist())


class Diffusion:
    """Schedule of a model with T steps on a base grid 0..N; it visits t_k = round(k N / T).

    Args:
        T: sampling steps of the model. time_scale: N / T, if no N is given, which T need not
        divide. mean_type: what the network predicts, 'xstart' (x_0), 'epsilon' (eps) or 'v'.
        device: where the tables live. schedule: see `alpha_bar_table`.
    Attributes:
        visited: (T + 1,) the times of the model from 0 to N. alpha, sigma: (N + 1,) float64.
    """

    def __init__(self, T, time_scale=1, mean_type='xstart', device='cpu', schedule='cosine',
                 N=None):
        self.T, self.N, self.mean_type, self.schedule = T, N or T * time_scale, mean_type, schedule
        alpha_bar = alpha_bar_table(self.N, schedule)
        self._table = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], 1).to(device)
        self.alpha, self.sigma = self._table.unbind(1)
        self._times = [round(k * self.N / T) for k in range(T + 1)]     # on the host
        visited = torch.tensor(self._times)
        index = torch.searchsorted(visited, torch.arange(self.N + 1)) - 1
        self.visited = visited.to(device)
        self._before = visited[index.clamp(min=0)].to(device)

    @property
    def clean_end(self):
        """Whether index 0 is the clean image, alpha = 1 and sigma = 0: no network is called there.

        So it is on the schedules of diffusers, and not on our own tables.
        """
        return isinstance(self.schedule, dict)

    @property
    def time_scale(self):
        """Points of the grid per step, rounded down."""
        return self.N // self.T

    def arguments(self):
        """The arguments that rebuild it, of plain types; N only where it is not T time_scale."""
        found = dict(T=self.T, time_scale=self.time_scale, mean_type=self.mean_type,
                     schedule=self.schedule)
        return found if self.T * self.time_scale == self.N else dict(found, N=self.N)

    def with_steps(self, T, mean_type=None):
        """The same schedule in T steps, for a network that predicts `mean_type` (None: as now)."""
        return Diffusion(T, 1, mean_type or self.mean_type, self.alpha.device, self.schedule,
                         self.N)

    def before(self, t):
        """The times (B,) one step of the model before times t (B,) of the grid."""
        return self._before[t]

    def at(self, t, dtype=torch.float64):
        """alpha_t, sigma_t as (B, 1, 1, 1) of type `dtype`, for times t (B,)."""
        return self._table[t].to(dtype)[..., None, None, None].unbind(1)

    def add_noise(self, x_0, eps, t):
        """z_t = alpha_t x_0 + sigma_t eps; images (B, C, H, W), t (B,)."""
        alpha_t, sigma_t = self.at(t, x_0.dtype)
        return alpha_t * x_0 + sigma_t * eps

    def eps_of(self, z_t, x, t):
        """The eps that takes x to z_t: (z_t - alpha_t x) / sigma_t."""
        alpha_t, sigma_t = self.at(t, z_t.dtype)
        return (z_t - alpha_t * x) / sigma_t

    def predict(self, model, z_t, t, y=None):
        """x_pred, eps_pred of a network at (z_t, t), unclipped, in the precision of z_t."""
        out = model(z_t, t, y).to(z_t.dtype)
        if self.mean_type == 'xstart':
            return out, self.eps_of(z_t, out, t)
        alpha_t, sigma_t = self.at(t, z_t.dtype)
        if self.mean_type == 'v':
            return alpha_t * z_t - sigma_t * out, sigma_t * z_t + alpha_t * out
        return (z_t - sigma_t * out) / alpha_t, out

    def ddim_step(self, model, z_t, t, s, clip=True, y=None):
        """DDIM, eta = 0 (Song et al. 2021, Eq. 12): z_t at times t (B,) -> z_s at s < t.

        `clip` limits x_pred to [-1, 1] and recomputes eps from it.
        """
        x, eps = self.predict(model, z_t, t, y)
        if clip:
            x = x.clamp(-1, 1)
            eps = self.eps_of(z_t, x, t)
        return self.add_noise(x, eps, s)

    def times(self, stride=1):
        """[N, ..., 0]: the grid times a sampler visits, `stride`, a divisor of T, steps apart."""
        return self._times[::-stride]

    def sample(self, model, x_T, stride=1, clip=True, y=None):
        """Images (B, C, H, W) in [-1, 1] from noise x_T with T / stride evaluations of the model.

        The result is clipped in any case; `clip` also clips x_pred in every step.
        """
        z, times = x_T, self.times(stride)
        for t, s in zip(times[:-1], times[1:]):
            t, s = (torch.full((z.shape[0],), u, dtype=torch.long, device=z.device) for u in (t, s))
            z = self.ddim_step(model, z, t, s, clip=clip, y=y)
        return z.clamp(-1, 1)

    def evaluation(self, model, x_T, number, y=None):
        """x_pred (B, C, H, W) of evaluation `number` = 0 .. T - 1 of the sampler from noise x_T.

        The evaluations before it run without gradient, as in DMD2 (2405.14867, section 4.5), but by
        DDIM, without new noise.
        """
        z, times = x_T, [torch.full((len(x_T),), t, device=x_T.device) for t in self.times()]
        with torch.no_grad():
            for t, s in zip(times[:number], times[1:]):
                z = self.ddim_step(model, z, t, s, y=y)
        # older versions of torch reuse weights that autocast has cast without gradient
        torch.clear_autocast_cache()
        return self.predict(model, z, times[number], y)[0]

    def two_step_target(self, teacher, z_t, t, y=None, clip=None):
        """x_target of progressive distillation (Salimans & Ho 2022, Algorithm 2).

        Two DDIM steps of the teacher (this schedule) lead from z_t over z_mid to z_s, s = t - 2
        steps; x_target is the x with which one DDIM step lands on the same z_s:
        x_target = (z_s - r z_t) / (alpha_s - r alpha_t), r = sigma_s / sigma_t.

        clip: limit x_pred to [-1, 1] in both steps. None: for teachers that predict eps alone, as
            samplers do: dividing by a tiny alpha_t otherwise gives targets of 10 to 10,000, which
            dominate the loss. The released code clips none.
        """
        clip = self.mean_type == 'epsilon' if clip is None else clip
        mid, s = self.before(t), self.before(self.before(t))
        z_mid = self.ddim_step(teacher, z_t, t, mid, clip=clip, y=y)
        z_s = self.ddim_step(teacher, z_mid, mid, s, clip=clip, y=y)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.at(t), self.at(s)
        r = sigma_s / sigma_t                               # float64: the denominator is small
        return (z_s - r.to(z_t.dtype) * z_t) / (alpha_s - r * alpha_t).to(z_t.dtype)


def distillation_loss(x_pred, eps_pred, x_target, eps_target, loss_type='both'):
    """Loss per sample (B,), for training on images and for distilling alike.

    'x': mean |x_target - x_pred|^2; 'eps': mean |eps_target - eps_pred|^2; 'both': the larger of
    the two, which is the truncated-SNR weighting max(SNR, 1) (Salimans & Ho 2022, Section 4).
    """
    loss_x = (x_target - x_pred).square().mean((1, 2, 3))
    loss_eps = (eps_target - eps_pred).square().mean((1, 2, 3))
    if loss_type == 'both':
        return torch.maximum(loss_x, loss_eps)
    return {'x': loss_x, 'eps': loss_eps}[loss_type]
