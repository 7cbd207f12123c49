"""Makes `import torchvision` work beside a CPU-only torch.

The torchvision of the Python package index is built for CUDA. Beside a torch without CUDA its
compiled library does not load, the schemas of two operators are never declared, and the import
dies with "operator torchvision::nms does not exist". Nothing here uses these operators, so their
schemas alone are enough. Import this module before the first `import torchvision`.
"""

import sys

import torch

SCHEMAS = ('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
           'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
_library = None     # the schemas live as long as this object


def repair():
    """Import torchvision; declare the missing operators only if exactly that made it fail."""
    global _library
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if torch.version.cuda is not None or 'torchvision::nms' not in str(error):
            raise
        _library = torch.library.Library('torchvision', 'DEF')
        for schema in SCHEMAS:
            _library.define(schema)
        for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
            del sys.modules[name]       # forget the half-imported package
        import torchvision  # noqa: F401


repair()
