"""torchvision beside a torch without CUDA, in a fresh process."""

import subprocess
import sys
from pathlib import Path

PROGRAM = '''
import runtime.torchvision_cpu
import torch, torchvision
from torchvision.models import resnet18
from torchvision.transforms import Resize
from torchvision.utils import make_grid
import runtime.torchvision_cpu as again
again.repair()                                  # a second time changes nothing
assert resnet18(num_classes=3).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
assert Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)
assert make_grid(torch.zeros(4, 3, 2, 2)).shape[0] == 3
assert torch.ops.torchvision.nms is not None    # the schema is there, ours or torchvision's own
print('fine', torchvision.__version__)
'''


def test_import():
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, '-c', PROGRAM], cwd=str(root), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('fine')
