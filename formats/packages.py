"""Optional packages, of requirements-export.txt."""

import importlib
import logging

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
    # what diffusers would warn of is checked here, and refused in one sentence
    logging.getLogger('diffusers').setLevel(logging.CRITICAL)


def first_line(error):
    """The first line of what an exception says that is not empty, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
