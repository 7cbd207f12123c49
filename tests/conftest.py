"""Puts the repository root on the path, keeps the tests on one thread and out of the user's cache.

Two threads wait for each other on a busy machine, which made single tests ten times slower.
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='rdd-tests-')
atexit.register(shutil.rmtree, os.environ['XDG_CACHE_HOME'], ignore_errors=True)
