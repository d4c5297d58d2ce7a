"""Directories that appear whole or not at all, whoever dies meanwhile."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

_STAGING_PREFIX = ".converting-"
_LOCK = ".lock"


def make_private_directory(path: Path) -> None:
    """Makes ``path``, and what is missing above it, for its owner alone."""
    if not path.parent.exists():
        make_private_directory(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)


def write_synced(path: Path, content: bytes) -> None:
    """A new file, readable by its owner alone, on the disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Excludes every other process here. Held briefly; the kernel releases it if we die."""
    descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class EntryHold:
    """Keeps an entry from being evicted by anyone until this is closed or forgotten."""

    def __init__(self, descriptor: int) -> None:
        self.close = weakref.finalize(self, os.close, descriptor)


def hold(entry: Path) -> EntryHold | None:
    """A hold on ``entry``, or None if it is not there or is being evicted.

    Raises:
        NotADirectoryError: Something else is in its place.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        descriptor = os.open(entry, flags)
    except FileNotFoundError:
        return None
    held = EntryHold(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        return None
    except OSError:
        pass  # Some network file systems cannot lock directories; there nobody evicts either.
    # It may have been evicted between the two calls; then the hold is on a nameless directory.
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.stat(entry)):
            return held
    held.close()
    return None


def evict(entry: Path) -> bool:
    """Removes ``entry`` unless someone holds it or nobody could tell; says whether it did."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        descriptor = os.open(entry, flags)
    except OSError:  # not a directory, so no entry
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        discard(entry)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextlib.contextmanager
def staging_directory(root: Path) -> Iterator[Path]:
    """An empty private directory in ``root``, removed at the end unless it was installed.

    A lock on it says that its process lives. Whoever comes next removes those without one, so a
    process that is killed again and again does not fill the disk.
    """
    with locked(root):
        remove_orphans(root)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=root))
        descriptor = os.open(staging, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        # Some network file systems cannot lock directories; there nobody removes orphans either.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield staging
    finally:
        os.close(descriptor)
        shutil.rmtree(staging, ignore_errors=True)


def install(staging: Path, entry: Path) -> None:
    """Renames ``staging`` to ``entry`` unless another process was first. Survives a power cut."""
    _sync_directory(staging)
    try:
        staging.rename(entry)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return
    _sync_directory(entry.parent)


def discard(entry: Path) -> None:
    """Removes whatever is at ``entry``. The name is free at once, even if removing takes long."""
    doomed = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=entry.parent))
    entry.rename(doomed / entry.name)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_orphans(root: Path) -> None:
    """Removes what processes that were killed left behind. ``root`` must be locked."""
    for path in root.glob(f"{_STAGING_PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
