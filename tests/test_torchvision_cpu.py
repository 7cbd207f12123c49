"""torchvision with a torch without CUDA, in a fresh process."""

from helpers import launch

PROGRAM = '''
import sys, torch
from runtime.torchvision_cpu import torchvision
assert 'torchvision' not in sys.modules         # imported when asked for, not before
sys.path.insert(0, sys.argv[1])
try:
    torchvision()
except RuntimeError as error:
    print('raised:', error)
del sys.path[0]
package = torchvision()
import torchvision as imported
assert torchvision() is package is imported and package.datasets.CIFAR10
assert package.models.resnet18(num_classes=3).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
assert torch.ops.torchvision.nms is not None    # the schema is there, ours or torchvision's own
'''


def test_import(tmp_path):
    """A package that fails for another reason is not repaired."""
    (tmp_path / 'torchvision').mkdir()
    (tmp_path / 'torchvision/__init__.py').write_text('raise RuntimeError("something else")\n')
    assert launch(['-c', PROGRAM, tmp_path]) == 'raised: something else\n'
