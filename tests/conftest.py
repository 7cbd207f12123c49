"""Puts the repository root on the path, keeps the tests on one thread and out of the user's cache.

Two threads wait for each other on a busy machine, which made single tests ten times slower.
"""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope='session')
def cache(tmp_path_factory):
    """A cache of its own for every process of the tests, and for the scripts that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        yield
