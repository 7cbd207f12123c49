"""results.jsonl: the scores of a run with their protocol, a JSON line per evaluation."""

import json
import math
from pathlib import Path

from runtime.distributed import print0

NUMBERS = ('fid', 'inception_score', 'inception_std', 'nfe', 'seed', 'num_images')
# equal where scores compare
PROTOCOL = ('reference', 'feature_network', 'num_images', 'reference_images', 'pixels', 'amp')


def append(file, result):
    """Add a line; if the last one was cut off by a full disk, it is ended first."""
    with open(file, 'a+b') as lines:
        if lines.tell():
            lines.seek(-1, 2)
            lines.write(b'' if lines.read(1) == b'\n' else b'\n')
        lines.write(json.dumps(result).encode() + b'\n')


def read(file, ckpt=None):
    """The results in a file, oldest first; [] if there is none. Bad lines are named, left out.

    ckpt: name of a checkpoint in the same folder; scores of others there are left out.
    """
    file, found = Path(file), []
    lines = file.read_bytes().split(b'\n') if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            complete = all(math.isfinite(result[name]) for name in NUMBERS) and all(
                name in result for name in PROTOCOL)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            complete = False
        if complete:
            if ckpt is None or Path(result.get('ckpt', ckpt)).name == ckpt:
                found.append(result)
        elif line.strip():
            print0(f'note: line {number} of {file} is left out: it is no result of ddim_eval.py.')
    return found
