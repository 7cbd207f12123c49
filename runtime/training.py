"""Verbs of a training loop, a dozen lines each; the loop itself stays in the script."""

import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import distributed, seeding
from runtime.options import UserError


def learning_rate(step, lr, warmup, total_steps, decay):
    """Rate of step 1, 2, ..: linear warm-up, then constant, or a cosine to 0 if `decay`.

    A pure function of the step: nothing to save, nothing to restore.
    """
    rate = lr * min(1., step / warmup) if warmup else lr
    if decay:
        rate *= 0.5 * (1 + math.cos(math.pi * (step - 1) / total_steps))
    return rate


def step_optimizer(optim, params, grad_clip, lr=None):
    """One update; returns the norm of the gradient before clipping (a tensor, not synchronised)."""
    if lr is not None:
        for group in optim.param_groups:
            group['lr'] = lr
    limit = grad_clip if grad_clip > 0 else math.inf
    norm = torch.nn.utils.clip_grad_norm_(params, limit)
    optim.step()
    optim.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, over the trained parameters."""
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_([e for e, _ in pairs], [p for _, p in pairs], 1 - decay)


def frozen(module):
    """`module` in eval mode, without gradients."""
    return module.eval().requires_grad_(False)


def due(step, every, last=None):
    """Whether something done every `every` steps is due (0: never), or `step` is the `last`."""
    return step == last or (every > 0 and step % every == 0)


def draw(batch_size, shape, low, high, generator):
    """t (B,) uniform in low..high (inclusive) and eps (B, *shape) standard normal.

    Drawn for the total batch, so that a sample's draw does not depend on the number of processes.
    """
    device = generator.device
    t = torch.randint(low, high + 1, (batch_size,), generator=generator, device=device)
    return t, torch.randn((batch_size, *shape), generator=generator, device=device)


def autocast(amp, device):
    """Autocast context for the networks: 'none', 'bf16', or 'auto': bf16 where it is fast."""
    wanted = amp == 'bf16' or (amp == 'auto' and has_fast_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def has_fast_bf16(device):
    """Whether the hardware multiplies bfloat16 matrices: tensor cores, or AMX on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        return 'amx_bf16' in Path('/proc/cpuinfo').read_text()
    except OSError:
        return False


class Meter:
    """Means of named scalars between two log lines; adds without synchronising with the device."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, **terms):
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + torch.as_tensor(value).detach().float()
        self.count += 1

    def mean(self):
        """{name: float} over all processes, then empty. The one synchronisation point."""
        names = sorted(self.sums)
        values = torch.stack([self.sums[n] for n in names]) / self.count
        values = (distributed.all_reduce_sum(values) / distributed.world_size()).tolist()
        self.sums, self.count = {}, 0
        return dict(zip(names, values))


class _PlainLines:
    """Standard error for a log file: tqdm's output without control characters."""

    def write(self, text):
        text = text.replace('\r', '').strip()
        if text:
            sys.stderr.write(text + '\n')

    def flush(self):
        sys.stderr.flush()


def progress(total=None, desc='', initial=0, unit='step'):
    """A tqdm bar on a terminal; in a log file one plain line every half minute at most."""
    watched = sys.stderr.isatty()
    every = 0.5 if watched else 30
    return tqdm(total=total, initial=initial, desc=desc, unit=unit, dynamic_ncols=watched,
                mininterval=every, maxinterval=2 * every, leave=watched, ascii=not watched,
                disable=not distributed.is_main(), file=None if watched else _PlainLines(),
                bar_format=None if watched else '{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}'
                ', {rate_fmt}{postfix}]')


def _lines_until(path, step):
    """Whole lines of a metrics.jsonl up to `step`; half a line, left by a full disk, is dropped."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            if json.loads(line)['step'] <= step:
                yield line
        except (ValueError, KeyError):
            continue


class Log:
    """Where a run can be watched: a bar, `metrics.jsonl` and TensorBoard; first process only."""

    def __init__(self, logdir, desc, step, total_steps, images_per_step):
        self.bar = progress(total_steps, desc, step)
        self.images_per_step, self.since = images_per_step, (time.perf_counter(), step)
        self.file = self.board = None
        if distributed.is_main():
            from tensorboardX import SummaryWriter
            path = Path(logdir) / 'metrics.jsonl'
            keep = ''.join(line + '\n' for line in _lines_until(path, step))
            path.with_suffix('.tmp').write_text(keep)       # no step twice after resuming
            path.with_suffix('.tmp').replace(path)
            self.file = path.open('a')
            self.board = SummaryWriter(str(logdir), purge_step=step + 1)

    def write(self, step, **scalars):
        """One line of scalars, with images/s since the last line."""
        now = time.perf_counter()
        if not math.isfinite(scalars['loss']):
            raise UserError(f'the loss is {scalars["loss"]} at step {step} and training has '
                            f'diverged; lower --lr or --grad_clip and run again (it goes on from '
                            f'the last checkpoint)', code=1)
        scalars['images_per_s'] = (step - self.since[1]) * self.images_per_step / (
            now - self.since[0])
        self.since = (now, step)
        if self.file:
            self.file.write(json.dumps(dict(step=step, **scalars)) + '\n')
            self.file.flush()
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)
        self.bar.set_postfix_str(f'loss {scalars["loss"]:.4g}, {scalars["images_per_s"]:.0f} img/s',
                                 refresh=False)

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()
            self.board.close()


def save_grid(images, path, nrow=8, scale=1):
    """Write images (B, 3, H, W) in [-1, 1] as one PNG grid, enlarged `scale` times."""
    import runtime.torchvision_cpu  # noqa: F401
    from torchvision.utils import make_grid
    from PIL import Image
    grid = make_grid(images.detach().float().cpu(), nrow=nrow, padding=1, pad_value=1)
    grid = grid.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(grid)
    size = (picture.width * scale, picture.height * scale)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.resize(size, Image.NEAREST).save(path)


@torch.no_grad()
def save_samples(diffusion, network, x_T, y, path, amp='none'):
    """Sample a grid from fixed x_T and labels on the first process; draws no random number."""
    if not distributed.is_main():
        return
    training = network.training
    network.eval()
    with autocast(amp, x_T.device):
        images = diffusion.sample(network, x_T, y=y)
    network.train(training)
    save_grid(images, path, nrow=max(1, round(len(x_T) ** 0.5)), scale=max(1, 64 // x_T.shape[-1]))


def seed_dropout(seed, step, T):
    """Restart torch's default generator, from which dropout draws, at every step."""
    torch.manual_seed(seeding.mix(seed, seeding.DROPOUT, T, step, distributed.rank()))


def make_logdir(logdir):
    """Create the folder of a run (first process), or say in one sentence why it cannot be."""
    with distributed.main_first():
        try:
            Path(logdir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'--logdir {logdir} cannot be made a folder ({error.strerror}); '
                            f'choose another', code=2)


def fixed_noise(seed, count, img_size, device):
    """x_T of the sample grids: the same images at every step and in every run of this seed."""
    return seeding.noise_of_images(seed, range(count), (3, img_size, img_size), device)


def fixed_labels(count, class_num, conditional, device):
    """Labels 0, 1, 2, .. of a sample grid, in turn; None for an unconditional network."""
    return torch.arange(count, device=device) % class_num if conditional else None
