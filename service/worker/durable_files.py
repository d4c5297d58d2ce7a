"""Files that are there whole or not at all, whatever happens while they are written.

Each is written beside its place, flushed to the disk, and renamed; then the folder is flushed. A
*record* is a file and its manifest, a small JSON file with the size and the SHA-256 of the first.
The manifest comes last, so where there is one, the file was on the disk; and a file that is not
what its manifest says was damaged later.
"""

import hashlib
import json
import os
from pathlib import Path

_TEMPORARY = ".partial"
_MANIFEST = ".json"


class RecordDamaged(Exception):
    """A file is not what its manifest says; the message names it."""


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, that outlast a crash."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    flush_folder(folder.parent)


def write_record(folder: Path, name: str, content: bytes) -> Path:
    """Writes a file and then its manifest; returns the path of the file.

    Raises:
        OSError: There is no room, or the folder cannot be written; nothing half made is left.
    """
    make_folder(folder)
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _write(folder / name, content)
    _write(folder / (name + _MANIFEST), json.dumps(facts).encode())
    return folder / name


def read_record(path: Path) -> bytes:
    """The content of a record.

    Raises:
        RecordDamaged: The file, or its manifest, is missing or is not what was written.
    """
    try:
        facts = json.loads((path.parent / (path.name + _MANIFEST)).read_bytes())
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise RecordDamaged(f"{path} cannot be read: {error}") from error
    if facts != {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}:
        raise RecordDamaged(f"{path} is not what its manifest says.")
    return content


def record_names(folder: Path) -> list[str]:
    """Files that have a manifest, in order of their names."""
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir()]
    return sorted(name.removesuffix(_MANIFEST) for name in names if name.endswith(_MANIFEST))


def remove_record(path: Path) -> None:
    """Removes a manifest and then its file."""
    (path.parent / (path.name + _MANIFEST)).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, suffix: str) -> None:
    """Removes what was begun, of files with this ending, and never got its manifest."""
    whole = set(record_names(folder))
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        is_begun = entry.name.endswith(suffix) and entry.name not in whole
        if is_begun or entry.name.endswith(_TEMPORARY):
            entry.unlink()


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        _write_flushed(temporary, content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def _write_flushed(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
