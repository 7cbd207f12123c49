"""torchvision with a torch without CUDA, in a fresh process."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = '''
import sys
from runtime.torchvision_cpu import torchvision
assert 'torchvision' not in sys.modules         # imported when asked for, not before
package = torchvision()
assert torchvision() is package                 # a second time changes nothing
import torch, torchvision as imported
assert imported is package
from torchvision.models import resnet18
from torchvision.transforms import Resize
from torchvision.utils import make_grid
assert resnet18(num_classes=3).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
assert Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)
assert make_grid(torch.zeros(4, 3, 2, 2)).shape[0] == 3
assert package.models.resnet18 is resnet18 and package.datasets.CIFAR10 and package.utils
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
    print('told:', error)
'''


def run(program, *args):
    done = subprocess.run([sys.executable, '-c', program, *args], cwd=str(ROOT),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import():
    assert run(PROGRAM).startswith('fine')


def test_other_problems_are_not_hidden(tmp_path):
    """A torchvision that fails although its operators are there, for a reason of its own."""
    (tmp_path / 'torchvision').mkdir()
    (tmp_path / 'torchvision/__init__.py').write_text('raise RuntimeError("something else")\n')
    assert run(OTHER_PROBLEM, str(tmp_path)) == 'told: something else\n'
