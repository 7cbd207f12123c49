"""tools/gradients.py: norms and angles of terms whose gradients are known."""

from collections import defaultdict

import pytest
import torch

from helpers import command, fork_all
from tools import gradients
from wiring import make_inputs


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


def test_terms_of_a_run(tmp_path):
    """Every term of the objective has a row; --until of a flagfile does not add further stages."""
    make_inputs(tmp_path)
    words = ('--dataset=digits --img_size=8 --batch_size=8 --num_workers=0 --total_steps=2 '
             '--log_step=1 --queue_size=64 --queue_update=10 --contrast_size=16 '
             '--classifier=convnet_small --logits --until=1').split()
    (code, said, error), = fork_all(dict(it=[command([
        'tools/gradients.py', *words, f'--base_ckpt={tmp_path}/teacher',
        f'--classifier_path={tmp_path}/classifier'])]))['it']
    assert code == 0, error
    rows = [line.split('|')[1].strip() for line in said.splitlines() if line.startswith('| loss')]
    assert rows == ['loss_feature', 'loss_intra', 'loss_memory', 'loss_pd']
    assert said.count('finished: ') == 1
