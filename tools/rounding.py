"""What bfloat16 adds to the loss of progressive distillation, by time.

  python tools/rounding.py --base_ckpt logs/digits/64 [--dataset digits] [--images 32]
The student is the teacher itself, as at the first step of PD. Both are computed in float32, in
bfloat16 as a run does it, and in bfloat16 with the last convolution as well.
Loss as in PD.py (--loss_type both), a line per range of times and one for all.
"""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

import torch    # noqa: E402
from absl import flags      # noqa: E402

from diffusion import distillation_loss     # noqa: E402
from model import UNet      # noqa: E402
from runtime import cli, data, distributed      # noqa: E402
from runtime.flags import require       # noqa: E402
from runtime.models import load_model       # noqa: E402
from runtime.precision import autocast      # noqa: E402
from tools.measure import table     # noqa: E402

FLAGS = flags.FLAGS
RANGES = 8


def define_flags():
    flags.DEFINE_string('base_ckpt', None, 'folder (or file) of the teacher')
    flags.DEFINE_string('dataset', 'digits', 'digits, fashion_mnist, cifar10, imagenet64 or folder')
    flags.DEFINE_string('data_root', './data', 'folder of the data set')
    flags.DEFINE_integer('images', 32, 'images per time', lower_bound=1)
    flags.DEFINE_integer('times', 16, 'times of the student that are looked at', lower_bound=1)
    flags.DEFINE_string('gpu_id', None, 'GPU to use')


@torch.no_grad()
def main():
    require(base_ckpt='the folder of a teacher, such as ./logs/digits/64')
    device = distributed.init(FLAGS.gpu_id)
    teacher = load_model(FLAGS.base_ckpt).to(device)
    if teacher.diffusion.T % 2 or not isinstance(teacher.network, UNet):
        raise cli.UserError(f'--base_ckpt {FLAGS.base_ckpt} has {teacher.diffusion.T} steps, or a '
                            f'network that runs through diffusers; give a U-Net of this project '
                            f'with an even number of steps')
    x_0, y = images(teacher, device)
    d, T = teacher.diffusion, teacher.diffusion.T // 2
    student = d.with_steps(T)
    steps = torch.linspace(1, T, min(T, FLAGS.times)).round().long().tolist()
    losses = torch.stack([losses_at(teacher, student, x_0, y, step) for step in steps])
    rows = [row(f'{part[0]} to {part[-1]}', values) for part, values in
            zip(split(steps), split(losses))]
    print(f'{FLAGS.base_ckpt}: PD from {teacher.diffusion.T} to {T} steps, on {device}\n')
    print(table(['step of the student', 'float32', 'bf16', 'more', 'bf16, last convolution too',
                 'more'],
                rows + [row('all', losses)]))


def images(teacher, device):
    """x_0 and labels of the first images; labels None if the network takes none."""
    dataset = data.make_dataset(FLAGS.dataset, FLAGS.data_root, teacher.img_size, train=True)
    pixels, y, _ = next(data.in_order(dataset, FLAGS.images, device))
    return pixels.float() / 127.5 - 1, y if teacher.arch['conditional'] else None


def losses_at(teacher, diffusion, x_0, y, step):
    """(3,) mean losses at a step of the student: float32, bf16, bf16 with the last convolution."""
    network, rng = teacher.network, torch.Generator().manual_seed(step)
    eps = torch.randn(x_0.shape, generator=rng).to(x_0.device)
    t = diffusion.visited[step].repeat(len(x_0))
    z_t = diffusion.add_noise(x_0, eps, t)
    found = []
    for amp, rounded in (('none', False), ('bf16', False), ('bf16', True)):
        with autocast(amp, x_0.device), tail_in_bf16(network, rounded):
            x_target = teacher.diffusion.two_step_target(network, z_t, t, y)
            x_pred, eps_pred = diffusion.predict(network, z_t, t, y)
        eps_target = diffusion.eps_of(z_t, x_target, t)
        found.append(distillation_loss(x_pred, eps_pred, x_target, eps_target).mean())
    return torch.stack(found).double()


@contextlib.contextmanager
def tail_in_bf16(network, wanted):
    """Inside, if `wanted`, the last convolution is computed in bfloat16 as well."""
    conv = network.tail[-1]

    def rounded(module, inputs):
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return module._conv_forward(inputs[0], module.weight, module.bias)

    hook = conv.register_forward_hook(lambda module, inputs, _: rounded(module, inputs))
    try:
        if not wanted:
            hook.remove()
        yield
    finally:
        hook.remove()


def split(values):
    size = -(-len(values) // RANGES)
    return [values[i:i + size] for i in range(0, len(values), size)]


def row(name, losses):
    full, *others = losses.mean(0).tolist()
    cells = [name, f'{full:.3g}']
    for loss in others:
        cells += [f'{loss:.3g}', f'{100 * (loss / full - 1):+.1f} %']
    return cells


if __name__ == '__main__':
    define_flags()
    cli.run(main)
