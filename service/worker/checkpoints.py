"""Checkpoints of one job, in a folder of its own: records named by their step.

The last two are kept, so that one that is damaged, or of a step that nobody else remembers, has
another before it. All of this is done by a thread that calls no model; see
`service.worker.file_work`.
"""

import errno
import logging
from pathlib import Path

from service.worker.durable_files import (
    RecordDamaged,
    read_record,
    record_names,
    remove_leftovers,
    remove_record,
    write_record,
)

log = logging.getLogger(__name__)

NUM_KEPT = 2
_SUFFIX = ".checkpoint"
# There is no room now; there may be later.
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def is_full(error: OSError) -> bool:
    """Whether a file could not be written because the disk, or a quota of it, is full."""
    return error.errno in _FULL


def write_checkpoint(folder: Path, step: int, content: bytes) -> None:
    """Makes a checkpoint last, and removes those that are not needed any more.

    Raises:
        OSError: It cannot be written; those before it stay.
    """
    write_record(folder, _name(step), content)
    names = _names(folder)
    # One of a later step was damaged or forgotten, or this would not be written.
    kept = [name for name in names if name <= _name(step)][-NUM_KEPT:]
    for name in names:
        if name not in kept:
            remove_record(folder / name)


def newest_checkpoint(folder: Path, last_step: int) -> bytes | None:
    """The newest that is whole, up to a step; None if there is none.

    Removes what was never finished.

    Raises:
        OSError: The folder cannot be used.
    """
    remove_leftovers(folder, _SUFFIX)
    for name in reversed(_names(folder)):
        if name > _name(last_step):
            continue
        try:
            return read_record(folder / name)
        except RecordDamaged as error:
            log.warning("%s The checkpoint before it is used.", error)
    return None


def _name(step: int) -> str:
    return f"{step:08}{_SUFFIX}"


def _names(folder: Path) -> list[str]:
    return [name for name in record_names(folder) if name.endswith(_SUFFIX)]
