"""What a run reports: means of finite values, steps that are not finite, the last line."""

import json
import math
import re

import pytest
import torch

from helpers import FINISHED
from runtime.cli import UserError
from runtime.log import Meter, summary


def test_meter():
    meter = Meter()
    for value in (1., math.nan, 3., -math.inf):
        meter.add(loss=torch.tensor(value), norm=2.)
        meter.end_step(torch.tensor(math.isfinite(value)))
    assert meter.mean() == dict(loss=2., norm=2., bad_steps=2)
    meter.add(loss=torch.tensor(math.nan))
    meter.end_step(torch.tensor(False))
    means = meter.mean()
    assert math.isnan(means['loss']) and means['bad_steps'] == 1


def test_meter_stops_after_steps_in_a_row():
    meter = Meter()
    for step, value in enumerate((math.nan, 1., math.nan, math.nan, math.nan), 1):
        meter.add(loss=torch.tensor(value), loss_intra=torch.tensor(value), loss_feature=1.)
        meter.end_step(torch.tensor(math.isfinite(value)))
        if step < 5:
            meter.check(step, 3)
    meter.check(5, 0)       # 0: never
    with pytest.raises(UserError, match=r'step 5 the last 3 steps in a row .*\(loss_intra\)') as e:
        meter.check(5, 3)
    assert e.value.code == 1


def test_meter_goes_on_from_its_state():
    whole, half = Meter(), Meter()
    for meter in (whole, half):
        meter.add(loss=torch.tensor(.1), grad_norm=torch.tensor(.7))
        meter.end_step(torch.tensor(False))
    state = half.state_dict()
    state['sums']['old'] = [1., 1., 0.]         # a term that is not used any more
    half = Meter(json.loads(json.dumps(state)))
    for meter in (whole, half):
        meter.add(loss=torch.tensor(.3), grad_norm=torch.tensor(math.inf))
        meter.end_step(torch.tensor(False))
    with pytest.raises(UserError, match='last 2 steps'):
        half.check(2, 2)
    assert whole.mean() == half.mean() and Meter(None).state_dict()['sums'] == {}


@pytest.mark.parametrize('seconds, time, rate', [(3.25, '3.2 s', 30.8), (59.96, '1 min 0 s', 1.7),
                                                 (200, '3 min 20 s', .5)])
def test_summary(seconds, time, rate):
    line = summary(5, seconds, 100, './logs/a')
    assert re.match(FINISHED.format(5, './logs/a'), line) and f' in {time}, ' in line
    shown = float(re.search(r'([\d.]+) images/s', line).group(1))
    assert shown == pytest.approx(rate, abs=.5)
