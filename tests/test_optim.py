"""Optimisation: a step that is not finite leaves no trace. Values are in test_wiring.py."""

import copy
import math

import pytest
import torch
from torch import nn

from helpers import assert_same
from runtime.distributed import GlobalBatchNorm2d
from runtime.optim import adam, clip_gradient, step_optimizer


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_not_applied(fused, bad):
    """Weights and moments are those of the good step alone, and so are the steps after it."""
    found = []
    for gradients in [[3., -4.]], [[bad, 1.], [3., -4.], [bad, 1.]]:
        p = nn.Parameter(torch.tensor([1., 2.]))
        optim = adam([p], 9., 0.) if fused else torch.optim.Adam([p], lr=9.)
        for gradient in gradients:
            p.grad = torch.tensor(gradient)
            finite = clip_gradient([p], 1.).isfinite()
            assert finite == (bad not in gradient)
            step_optimizer(optim, finite, lr=.1)
            assert p.grad is None
        found.append([p.detach(), optim.state_dict()])
    assert_same(*found)
    torch.testing.assert_close(found[0][0], torch.tensor([.9, 2.1]))    # rate times sign


def test_global_batch_norm():
    """Far from 0 it is as exact as torch's, and images that are not finite leave no trace."""
    one, other = nn.BatchNorm2d(3), GlobalBatchNorm2d(3)
    far = 1000 + .1 * torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(other(far), one(far), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(other.state_dict())
    other(far * math.inf)
    assert_same(before, other.state_dict(), skip=('num_batches_tracked',))
