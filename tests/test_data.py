"""Which images make a step: a function of (seed, step) alone, also where workers read them."""

import itertools
import multiprocessing
import os
import signal
import time
from unittest.mock import Mock

import pytest
import torch

from helpers import assert_same
from runtime import data, distributed
from runtime.cli import UserError
from runtime.data import batches, indices_of_step
from runtime.loader import in_workers

CPU = torch.device('cpu')


def ramps():
    """Images that a mirror changes: column j of image i is 10 i + j."""
    images = torch.arange(16)[:, None, None, None] * 10 + torch.arange(2)
    images = images.expand(-1, 3, 2, -1).to(torch.uint8).contiguous()
    return data.Images('ramps', 'train', 2, torch.arange(16), 16, images)


def first(count, *args, **kwargs):
    return list(itertools.islice(batches(*args, **kwargs), count))


def test_order_and_mirrors_are_fixed():
    """Runs that were interrupted go on with the images that they would have had."""
    assert [indices_of_step(10, 4, 3, step).tolist() for step in (0, 2, 7)] == [
        [1, 7, 3, 6], [2, 4, 1, 3], [9, 1, 9, 5]]
    first_rows = [((x_0[:, 0, 0] + 1) * 127.5).round().int().tolist()
                  for x_0, _ in first(2, ramps(), 8, 5, CPU)]
    assert first_rows == [
        [[120, 121], [11, 10], [70, 71], [31, 30], [101, 100], [61, 60], [50, 51], [151, 150]],
        [[111, 110], [131, 130], [0, 1], [140, 141], [21, 20], [41, 40], [80, 81], [90, 91]]]


@pytest.mark.parametrize('flip, augment', [(False, None), (True, lambda image, position: image)])
def test_what_is_not_mirrored(flip, augment):
    """Images without a valid mirror image, and those that `augment` changes."""
    images = ramps()
    images.flip = flip
    for x_0, _ in first(2, images, 8, 5, CPU, augment=augment):
        assert (x_0[..., 0] < x_0[..., 1]).all()


@pytest.mark.parametrize('processes, accum, workers', [
    (2, 1, None), (1, 2, None), (1, 4, None), (2, 2, None), (1, 1, 0), (1, 1, 2), (2, 2, 2)])
def test_processes_and_parts_share_the_batch(monkeypatch, processes, accum, workers):
    """Also of a set that is too large for the device, by workers or without them."""
    whole, parts = first(2, ramps(), 8, 5, CPU), []
    how = dict(accum=accum, num_workers=workers or 0)
    if workers is not None:
        monkeypatch.setattr(data, 'ON_DEVICE', 0)
    monkeypatch.setattr(distributed, 'world_size', lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(distributed, 'rank', lambda: rank)
        parts.append(first(2 * accum, ramps(), 8, 5, CPU, **how))
        assert_same(parts[-1][accum:], first(accum, ramps(), 8, 5, CPU, 1, **how))      # resumed
    # part 0 of process 0, part 0 of process 1, part 1 of process 0, ..
    in_order = [part for together in zip(*parts) for part in together]
    for found, expected in zip(zip(*in_order), zip(*whole)):        # images, labels
        assert torch.equal(torch.cat(found), torch.cat(expected))


# The data set

@pytest.mark.parametrize('labels, found', [
    ([0, 3], 'from 0 to 3'), ([-1, 0], 'from -1 to 0'), ([0, 1, 2], '2 images and 3 labels')])
def test_labels_that_do_not_fit(labels, found):
    with pytest.raises(UserError, match=f'{found}.*, expected one for each, from 0 to 2'):
        data.Images('x', 'train', 1, labels, 3, torch.zeros(2, 3, 1, 1).byte())


def test_fingerprint():
    """It changes with pixels, or the key that stands for them, labels and their order."""
    sets = [ramps() for _ in range(6)]
    sets[1].images[3, 2, 1, 1] += 1
    sets[2].images, sets[2].labels = sets[2].images.flip(0), sets[2].labels.flip(0)
    sets[3].images, sets[3].key = None, 'ab'        # the pixels are not read
    sets[4].labels, sets[4].key = sets[4].labels.flip(0), 'ab'
    sets[5].key = 'cd'
    assert len({one.fingerprint for one in sets}) == 6


# Workers

@pytest.mark.parametrize('workers', [0, 2])
def test_an_error_comes_out_of_a_worker_as_it_was(workers):
    def count_to_five(i):
        if i == 5:
            raise UserError('item 5', code=1)
        return i

    results = in_workers(count_to_five, itertools.count(), workers)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match='item 5') as caught:
        next(results)
    assert caught.value.code == 1
    assert not multiprocessing.active_children()        # the workers have ended


def test_a_worker_that_is_killed():
    results = in_workers(time.sleep, itertools.repeat(.05), 2)
    next(results)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match='was killed.*set --num_workers 0'):
        list(results)
    assert not multiprocessing.active_children()


def test_too_little_shared_memory(monkeypatch):
    full = Mock(side_effect=OSError(28, 'No space left on device'))
    monkeypatch.setattr('runtime.loader.ProcessPoolExecutor', full)
    with pytest.raises(UserError, match='/dev/shm .*--shm-size.*--num_workers 0'):
        next(in_workers(abs, [1], 1))
