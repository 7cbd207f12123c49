"""Makes torchvision importable with a CPU-only torch.

The default torchvision package is built for CUDA. With a torch without CUDA its
compiled library does not load, the schemas of two operators are never declared, and the import
fails with "operator torchvision::nms does not exist". Nothing here uses these operators, so their
schemas alone are enough.
"""

import functools
import sys

import torch

SCHEMAS = ('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
           'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')


@functools.lru_cache(None)
def torchvision():
    """The package torchvision, repaired if that is needed.

    Call it before importing a package that imports torchvision itself (pytorch_fid, diffusers).
    """
    try:
        import torchvision as package
    except RuntimeError:
        if torch.version.cuda is not None or hasattr(torch.ops.torchvision, 'nms'):
            raise           # something else is wrong
        for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
            del sys.modules[name]       # forget the half-imported package
        declare_operators()
        import torchvision as package
    return package


@functools.lru_cache(None)
def declare_operators():
    """Declare the two missing operators; the cache keeps the library, and them, alive."""
    library = torch.library.Library('torchvision', 'DEF')
    for schema in SCHEMAS:
        library.define(schema)
    return library
