"""What a run reports: means of finite values, steps that are not finite, the last line."""

import contextlib
import copy
import math
import re

import pytest
import torch
from absl import flags

from helpers import FINISHED, parsing
from runtime.cli import UserError
from runtime.log import Log, Meter

FLAGS = flags.FLAGS


@pytest.fixture(autouse=True)
def max_bad_steps():
    with parsing(lambda: flags.DEFINE_integer('max_bad_steps', 3, '')) as parse:
        parse()
        yield


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


def test_steps_in_a_row_end_the_run():
    """Counted through log lines; a good step in between starts anew."""
    meter = Meter()
    steps(meter, math.nan, math.nan, 1., math.nan)
    meter.means(4, 9)
    steps(meter, math.nan)
    meter.means(5, 9)
    steps(meter, math.nan)
    FLAGS.max_bad_steps = 0     # never
    assert copy.deepcopy(meter).means(6, 9)['bad_steps'] == 1
    FLAGS.max_bad_steps = 3
    with pytest.raises(UserError, match=r'the last 3 steps .*\(loss, loss_intra\)') as e:
        meter.means(6, 9)
    assert e.value.code == 1


@pytest.mark.parametrize('step, start, total, ends', [(2, 0, 2, True), (2, 0, 3, False),
                                                      (3, 0, 3, False), (7, 5, 7, False)])
def test_a_run_without_a_good_step_is_no_end(step, start, total, ends):
    meter = Meter()
    steps(meter, *[1.] * (step - start - 2), math.nan, math.nan)
    words = 'last 2 .* nothing saved'
    with pytest.raises(UserError, match=words) if ends else contextlib.nullcontext():
        assert meter.means(step, total)['bad_steps'] == 2


def test_a_gradient_alone_that_is_not_finite():
    meter = Meter()
    meter.add(loss=1.)
    meter.count(torch.tensor(False))
    with pytest.raises(UserError, match=r'not finite \(a gradient\)'):
        meter.means(1, 1)


def test_lines_of_an_earlier_start(tmp_path):
    """After resuming at step 2, no line of a later step is kept, nor a broken one."""
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'\xff\xfe\n' + b''.join(b'{"step": %d}\n' % i for i in (1, 2, 3))
                     + b'[1]\n{"loss": 1}\n{"step": 1, "l')
    Log(tmp_path, 'name', 2, 5, 8, '--T=8').close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize('start, seconds, time, rate', [
    (0, 3.25, '3.2 s', 31), (2, 59.96, '1 min 0 s', 1), (4, 200, '3 min 20 s', 0)])
def test_summary(tmp_path, monkeypatch, start, seconds, time, rate):
    """Steps, time and speed of this start."""
    clock = iter([0., seconds])
    monkeypatch.setattr('runtime.log.time.perf_counter', lambda: next(clock))
    log = Log(tmp_path, 'name', start, 5, 20, '--T=8')
    line = log.summary(5, './logs/a')
    log.close()
    assert re.match(FINISHED.format(5 - start, './logs/a'), line)
    assert f' in {time}, {rate} images/s' in line
