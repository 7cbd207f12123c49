"""The one way to write a folder: whole or not at all."""

import contextlib
import tempfile
from pathlib import Path

from formats.packages import first_line
from runtime.cli import UserError
from runtime.files import current_umask


@contextlib.contextmanager
def publish(output):
    """`with publish(output) as folder:` gives a temporary folder to write to.

    It becomes `output` when the block is complete; after an error nothing is left of it.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f'{output.name}.') as place:
            folder = Path(place) / 'export'
            folder.mkdir()
            yield folder
            for path in filter(Path.is_file, folder.rglob('*')):
                path.chmod(0o666 & ~current_umask())    # some are made for their owner alone
            if output.exists():
                output.rmdir()
            folder.replace(output)
    except Exception as error:
        if not isinstance(error, OSError) and 'os error' not in str(error):
            raise       # safetensors has an exception of its own for a full disk
        raise UserError(f'--output {output} cannot be written ({first_line(error)}); make room, or '
                        f'choose another', code=1)
