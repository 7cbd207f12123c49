"""tools/rounding.py: what bfloat16 adds to the loss of progressive distillation."""

import torch

from diffusion import Diffusion, distillation_loss
from helpers import launch
from model import UNet
from runtime import checkpoint
from runtime.models import load_model
from tools import rounding


def teacher(folder):
    torch.manual_seed(0)
    network = UNet(8, 32, [1, 1], [1], 1)
    for p in network.parameters():      # layers that start near 0 would hide the rest
        if p.requires_grad:
            p.data += .05 * torch.randn_like(p)
    checkpoint.save(folder / 'ckpt.pt', dict(net_model=network.state_dict(), T=8, time_scale=1,
                                             img_size=8))
    return folder


def test_three_precisions(tmp_path):
    """The first is the loss in float32; the tail in bfloat16 as well changes what follows."""
    model = load_model(teacher(tmp_path))
    x_0, student = torch.randn(4, 3, 8, 8), Diffusion(4, 2)
    losses = rounding.losses_at(model, student, x_0, None, 3)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(3))
    t = torch.full((4,), 6)
    z_t = student.add_noise(x_0, eps, t)
    with torch.no_grad():
        x_target = model.diffusion.two_step_target(model.network, z_t, t)
        pred = student.predict(model.network, z_t, t)
    expected = distillation_loss(*pred, x_target, student.eps_of(z_t, x_target, t)).mean()
    assert losses[0] == expected.double() and len(losses.unique()) == 3
    assert not model.network.tail[-1]._forward_hooks


def test_table(tmp_path):
    out = launch(['tools/rounding.py', f'--base_ckpt={teacher(tmp_path)}', '--images=2'])
    assert 'PD from 8 to 4 steps' in out
    lines = [line for line in out.splitlines() if line.startswith('| ')]
    assert [line.split(' |')[0] for line in lines[2:]] == ['| 1 to 1', '| 2 to 2', '| 3 to 3',
                                                           '| 4 to 4', '| all']
    assert lines[-1].count('%') == 2
