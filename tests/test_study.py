"""study.py: intervals by hand, a table, and mistakes. Whole studies take minutes."""

import json

import numpy as np
import pytest
import torch

from helpers import command, fork_all
from model import UNet
from runtime import checkpoint


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('study')
    net = UNet(8, 32, [1, 1], [1], 1)
    checkpoint.save(folder / 'ckpt.pt', dict(net_model=net.state_dict(), T=8, time_scale=1))
    return folder


MISTAKES = dict(
    teacher=(['--base_ckpt=none'], 'there is no checkpoint none'),
    method=(['--methods=PD,TAT'], '--methods TAT is unknown; choose of DDIM, PD, CFD'),
    baseline=(['--methods=RDD'], '--baseline PD is not among --methods RDD'),
    own=(['--method=mine=rm x'], '--method "mine=rm x" is not understood'),
    config=(['--config=NONE'], '--config NONE: there is no .*NONE_PD.txt; write it, or choose of '
            'CIFAR10, DIGITS, IMAGENET64, TEACHER'),
    until=(['--until=3'], '--until 3 is not reached by halving the 8 steps'),
    jobs=(['--jobs=0'], r'--jobs=0: 0 is not an integer in the range \[1, 256\]'),
    logdir=(['--logdir='], '--logdir is missing'))


def test_mistakes(teacher):
    words = ['study.py', f'--base_ckpt={teacher}', '--config=DIGITS', f'--logdir={teacher}/new']
    said = fork_all({name: [command(words, *more)] for name, (more, _) in MISTAKES.items()})
    for name, (_, pattern) in MISTAKES.items():
        code, _, error = said[name][0]
        assert code == 2 and 'Traceback' not in error, error
        with pytest.raises(ValueError, match=pattern):
            raise ValueError(error)
    assert not (teacher / 'new').exists()


def test_interval_by_hand():
    import study
    mean, half = study.interval([1., 2., 3.])
    assert mean == 2 and half == pytest.approx(4.302653 * 1 / 3 ** .5, rel=1e-6)
    assert np.isnan(study.interval([1.])[1])


def test_failed_students_are_named(teacher):
    """The classifier is missing: DDIM is scored nowhere, and the table says what is missing."""
    words = ['study.py', f'--base_ckpt={teacher}', '--config=DIGITS', '--seeds=1', '--until=4',
             '--methods=PD', f'--logdir={teacher}/failed', '--train_flags=--total_steps=1',
             f'--eval_flags=--fid_cache={teacher}/none.npz']
    (code, _, error), = fork_all(dict(it=[command(words)]))['it']
    assert code == 1 and '1 of 1 students are missing' in error, error
    text = (teacher / 'failed/table.md').read_text()
    assert '- PD, seed 0, 4 steps: ' in text and '| PD | - |' in text
    assert json.loads((teacher / 'failed/PD/seed0/4/commands.json').read_text())
    assert torch.is_tensor(checkpoint.read(teacher)['net_model']['head.weight'])
