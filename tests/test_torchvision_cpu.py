"""torchvision with a torch without CUDA, in a fresh process."""

from helpers import launch

PROGRAM = '''
import sys
from runtime.torchvision_cpu import torchvision
assert 'torchvision' not in sys.modules         # imported when asked for, not before
package = torchvision()
assert torchvision() is package                 # a second time changes nothing
import torch, torchvision as imported
assert imported is package and package.datasets.CIFAR10
assert package.models.resnet18(num_classes=3).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
assert package.transforms.Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)
assert torch.ops.torchvision.nms is not None    # the schema is there, ours or torchvision's own
print('fine', package.__version__)
'''
OTHER_PROBLEM = '''
import sys, torch
sys.path.insert(0, sys.argv[1])
from runtime.torchvision_cpu import declare_operators, torchvision
if not hasattr(torch.ops.torchvision, 'nms'):
    declare_operators()
try:
    torchvision()
except RuntimeError as error:
    print('raised:', error)
'''


def test_import():
    assert launch(['-c', PROGRAM]).startswith('fine')


def test_other_problems_are_not_hidden(tmp_path):
    """A torchvision that fails although its operators are there, for a reason of its own."""
    (tmp_path / 'torchvision').mkdir()
    (tmp_path / 'torchvision/__init__.py').write_text('raise RuntimeError("something else")\n')
    assert launch(['-c', OTHER_PROBLEM, tmp_path]) == 'raised: something else\n'
