"""The folder for what must last, used by one service at a time."""

import fcntl
import os
from pathlib import Path


class DataDirectoryInUse(Exception):
    """Another service holds the folder."""


class DataDirectory:
    """A private folder and the lock on it, which the kernel drops when this process ends."""

    def __init__(self, path: Path) -> None:
        """Creates the folder if needed and locks it.

        Raises:
            DataDirectoryInUse: Another service holds it.
            OSError: It cannot be created or written.
        """
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = path
        self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise DataDirectoryInUse(
                f"Another service uses {path}. Stop it, or set GEMMA_DATA_DIR to another folder."
            ) from error

    def close(self) -> None:
        os.close(self._lock)
