"""Makes torchvision importable with a CPU-only torch.

There, the library of the default torchvision package does not load, and its import fails with
"operator torchvision::nms does not exist". Nothing here uses it: its schema is enough.
"""

import functools
import sys

import torch

SCHEMA = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
libraries = []      # kept alive, and with them the operators


@functools.lru_cache(None)
def torchvision():
    """The package; call this before importing one that imports it (pytorch_fid, diffusers)."""
    try:
        import torchvision as package
    except RuntimeError as error:
        if 'torchvision::nms' not in str(error):
            raise
        for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
            del sys.modules[name]       # forget the half-imported package
        libraries.append(torch.library.Library('torchvision', 'DEF'))
        for operator in ('nms', 'qnms'):
            libraries[0].define(operator + SCHEMA)
        import torchvision as package
    return package
