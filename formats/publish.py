"""The folder of an export: whole or not at all."""

import contextlib

from formats.packages import first_line
from runtime.cli import UserError
from runtime.files import replacing_folder


@contextlib.contextmanager
def publish(output):
    """`with publish(output) as folder:` gives a temporary folder to write to.

    It becomes `output` when the block is complete; after an error nothing is left of it.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(output) as folder:
            yield folder
    except Exception as error:
        if not isinstance(error, OSError) and 'os error' not in str(error):
            raise       # safetensors has an exception of its own for a full disk
        raise UserError(f'--output {output} cannot be written ({first_line(error)}); make room, or '
                        f'choose another', code=1)
