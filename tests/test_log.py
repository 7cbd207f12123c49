"""What a run reports: means of finite values, steps that are not finite, the last line."""

import math
from types import SimpleNamespace

import pytest
import torch

from runtime.cli import UserError
from runtime.log import Log, Meter


@pytest.fixture(autouse=True)
def flags(monkeypatch):
    flags = SimpleNamespace(max_bad_steps=3)
    monkeypatch.setattr('runtime.log.FLAGS', flags)
    return flags


def steps(meter, *losses):
    """Steps with these losses, of which those that are not finite are not applied."""
    for loss in losses:
        meter.add(loss=torch.tensor(loss), loss_intra=torch.tensor(loss), loss_feature=1.)
        meter.count(torch.tensor(math.isfinite(loss)))


def test_means_are_those_of_finite_values():
    meter = Meter()
    steps(meter, 1., math.nan, 3., -math.inf)
    assert meter.means(4, 9) == dict(loss=2., loss_intra=2., loss_feature=1., bad_steps=2)
    steps(meter, math.nan)
    means = meter.means(5, 9)
    assert math.isnan(means['loss']) and means['bad_steps'] == 1


def test_steps_in_a_row_end_the_run(flags):
    """Counted through log lines; a good step in between starts anew."""
    meter = Meter()
    for losses in [math.nan, math.nan, 1., math.nan], [math.nan]:
        steps(meter, *losses)
        meter.means(5, 9)
    steps(meter, math.nan)
    with pytest.raises(UserError, match=r'the last 3 steps .*\(loss, loss_intra\)') as e:
        meter.means(6, 9)
    assert e.value.code == 1
    flags.max_bad_steps = 0     # never
    assert meter.means(6, 9)['bad_steps'] == 1


def test_a_gradient_alone_that_is_not_finite():
    meter = Meter()
    meter.add(loss=1.)
    meter.count(torch.tensor(False))
    with pytest.raises(UserError, match=r'not finite \(a gradient\)'):
        meter.means(1, 1)


def test_lines_of_an_earlier_start(tmp_path):
    """After resuming at step 2, no line of a later step is kept, nor a broken one."""
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'\xff\xfe\n{"step": 1}\n{"step": 2}\n{"step": 3}\n'
                     b'[1]\n{"loss": 1}\n{"step": 1, "l')
    Log(tmp_path, 'name', 2, 5, 8, '--T=8').close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize('start, seconds, words', [
    (2, 3.25, '3 steps in 3.2 s, 18 images/s'), (4, 59.96, '1 step in 1 min 0 s, 0 images/s')])
def test_summary(tmp_path, monkeypatch, start, seconds, words):
    """Steps, time and speed of this start."""
    clock = iter([0., seconds])
    monkeypatch.setattr('runtime.log.time.perf_counter', lambda: next(clock))
    log = Log(tmp_path, 'name', start, 5, 20, '--T=8')
    assert log.summary(5, 'logs/a') == f'finished: {words}; checkpoint and log are in logs/a'
    log.close()
