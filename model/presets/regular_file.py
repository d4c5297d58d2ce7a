"""Opens the files of a preset, and nothing else.

A preset may come from anywhere, so no file in it can lead out of its directory: symbolic links
are refused in every component, and so are pipes, devices and sockets.
"""

import errno
import os
import re
import stat
from io import BufferedReader
from pathlib import Path, PurePosixPath

from model.errors import PresetFileInvalid, PresetFileMissing

# How huggingface_hub lays out its own cache, in which every file is a link.
_HUB_CACHE = re.compile(r"/models--([A-Za-z0-9._-]+?)--([A-Za-z0-9._-]+)/snapshots/([^/]+)/")


def open_regular_file(directory: Path, name: str) -> BufferedReader:
    """The file ``name`` (relative, with ``/``) below ``directory``, open for reading.

    ``directory`` itself is the caller's choice and may be a link; what lies below it may not.
    """
    *folders, last = _parts(name)
    try:
        # O_NONBLOCK: opening a pipe would otherwise wait for a writer that never comes.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        parent = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            for folder in folders:
                child = os.open(folder, flags | os.O_DIRECTORY, dir_fd=parent)
                os.close(parent)
                parent = child
            descriptor = os.open(last, flags, dir_fd=parent)
        finally:
            os.close(parent)
    except OSError as error:
        raise _translated(directory / name, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PresetFileInvalid(
            f"{directory / name} is not a regular file; put a plain file there."
        )
    return os.fdopen(descriptor, "rb")


def read_regular_file(directory: Path, name: str, max_bytes: int) -> bytes:
    """The whole content, refused if it is longer than ``max_bytes``."""
    with open_regular_file(directory, name) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise PresetFileInvalid(
            f"{directory / name} is larger than {max_bytes:,} bytes, the most such a file may have."
        )
    return content


def require_regular_file(directory: Path, name: str) -> Path:
    """The path of a file that is there and is regular. Does not open it."""
    path = directory.joinpath(*_parts(name))
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise _translated(path, error) from error
    if stat.S_ISLNK(mode):
        raise PresetFileInvalid(_link_message(path))
    if not stat.S_ISREG(mode):
        raise PresetFileInvalid(f"{path} is not a regular file; put a plain file there.")
    return path


def _parts(name: str) -> tuple[str, ...]:
    parts = PurePosixPath(name).parts
    assert parts, "an empty name must be refused before it gets here"
    assert not {"..", "/"} & set(parts), f"{name!r} must be refused before it gets here"
    return parts


def _translated(path: Path, error: OSError) -> PresetFileMissing | PresetFileInvalid:
    if error.errno == errno.ENOENT:
        return PresetFileMissing(f"{path} is missing; the preset needs it.")
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return PresetFileInvalid(_link_message(path))
    return PresetFileInvalid(f"{path} cannot be opened: {error.strerror}.")


def _link_message(path: Path) -> str:
    if hub_cache := _HUB_CACHE.search(path.as_posix()):
        owner, name, revision = hub_cache.groups()
        return (
            f"{path} is a link, as all files in the cache of Hugging Face are. Give "
            f"hf://{owner}/{name} instead of the path, or make a directory of plain files: "
            f"hf download {owner}/{name} --revision {revision} --local-dir DIR"
        )
    return (
        f"{path} is a symbolic link, or a part of its path is not a folder; copy the file itself "
        "into the preset."
    )
