"""The one way to write a file or a folder: whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

from runtime.cli import UserError

UMASK = os.umask(0)     # to read it means to set it twice
os.umask(UMASK)


@contextlib.contextmanager
def replacing(path):
    """Give the path of a temporary file beside `path`; it becomes `path` when the block ends.

    After an exception `path` is as it was, and the temporary file is gone. Its name is unique, so
    that two processes can do this at the same time, and no file of the user is touched.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=str(path.parent), prefix=f'{path.name}.', suffix='.tmp')
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~UMASK)       # mkstemp makes files for the owner alone
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def check_new_folder(output):
    """Refuse a value of --output, a path, that is neither new nor an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f'--output {output} exists and is not an empty folder; choose another')


@contextlib.contextmanager
def replacing_folder(path):
    """The same for a folder: `path` is new or empty, and becomes what the block has written.

    Folders above it are made if they are missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=str(path.parent), prefix=f'{path.name}.',
                                     suffix='.tmp') as place:
        folder = Path(place) / 'new'
        folder.mkdir()
        yield folder
        for file in filter(Path.is_file, folder.rglob('*')):
            file.chmod(0o666 & ~UMASK)        # some are made for their owner alone
        if path.exists():
            path.rmdir()
        folder.replace(path)
