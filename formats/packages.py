"""Optional packages, of requirements-export.txt."""

import importlib

from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision


def check_packages(names):
    """Refuse to go on without these optional packages."""
    torchvision()       # diffusers imports it if it is installed
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f'the package {name} is missing; run pip install -r '
                            f'requirements-export.txt', code=1)
