"""The one way to write a file or a folder: whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

UMASK = os.umask(0)     # to read it means to set it twice
os.umask(UMASK)


@contextlib.contextmanager
def replacing(path):
    """Give a new path, at which the block makes a file or a folder; it becomes `path` at the end.

    It lies in a temporary folder beside `path`. After an exception `path` is as it was. Two
    processes can do this at the same time, and a folder replaces no folder with files in it.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=str(path.parent), prefix=f'{path.name}.',
                                     suffix='.tmp') as place:
        temporary = Path(place) / path.name
        yield temporary
        if temporary.is_file():
            with open(temporary, 'rb+') as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def replacing_folder(path):
    """The same for a folder, which is there when the block begins; folders above it are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as folder:
        folder.mkdir()
        yield folder
        for file in filter(Path.is_file, folder.rglob('*')):
            file.chmod(0o666 & ~UMASK)        # some are made for their owner alone
