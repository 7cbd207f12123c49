"""tools/gradients.py: norms and angles of terms whose gradients are known."""

from collections import defaultdict

import pytest
import torch

from tools import gradients


def test_known_gradients():
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    found = defaultdict(list)
    gradients.measure([x, y], dict(first=(2., (3 * x[0] + 4 * x[1]).sum()),
                                   other=(.5, (4 * x[0] - 3 * x[1]).sum()),
                                   both=(1., 6 * x[0] + 8 * x[1] + 10 * y[0])), found)
    assert found['first'] == [[7, 5, 10, 1]]                # value, norm, weighted norm, cosine
    assert found['other'] == [[1, 5, 2.5, 0]]
    assert found['both'][0] == pytest.approx([24, 200 ** .5, 200 ** .5, .5 ** .5])
    assert x.grad is None               # the step that follows is not disturbed


def test_table(capsys):
    gradients.print_table(dict(loss_feature=[[1., 2, 3, 1], [3., 4, 5, 1]]))
    assert '| loss_feature | 2 | 3 | 4 | 1.00 |' in capsys.readouterr().out
