"""Puts the repository root on the path and keeps the tests on one thread.

Two threads wait for each other on a busy machine, which made single tests ten times slower.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
