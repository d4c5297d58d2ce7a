"""A file that is there whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """What is written in the block is at ``path`` after it; if it fails, nothing has changed.

    Raises:
        OSError: The folder is not there or cannot be written.
    """
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    file = part.open("xb")
    try:
        with file:
            yield file
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
