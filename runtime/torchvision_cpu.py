"""Makes torchvision importable with a CPU-only torch.

The default torchvision package is built for CUDA. With a torch without CUDA its compiled library
does not load, the schemas of two operators are never declared, and the import fails with "operator
torchvision::nms does not exist". Nothing here uses these operators, so their schemas are enough.
"""

import functools
import sys

import torch

SCHEMAS = ('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
           'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
libraries = []      # kept alive, and with them the operators


@functools.lru_cache(None)
def torchvision():
    """The package torchvision, repaired if that is needed.

    Call it before importing a package that imports torchvision itself (pytorch_fid, diffusers).
    """
    try:
        import torchvision as package
    except RuntimeError as error:
        if 'torchvision::nms' not in str(error):
            raise
        for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
            del sys.modules[name]       # forget the half-imported package
        libraries.append(torch.library.Library('torchvision', 'DEF'))
        for schema in SCHEMAS:
            libraries[0].define(schema)
        import torchvision as package
    return package
