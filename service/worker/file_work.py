"""Checkpoints written and read by a thread of their own, which calls no model.

A flush can take long, and the loop does not wait for it: what came of it arrives like a request.
"""

import errno
import logging
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.worker.checkpoints import newest_checkpoint, write_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointRead:
    """The newest whole checkpoint of a job's folder, if there is one; or why it cannot be used."""

    job: Any
    content: bytes | None
    error: OSError | None = None


@dataclass(frozen=True, slots=True)
class CheckpointWritten:
    """A checkpoint lasts; or why it does not."""

    job: Any
    error: OSError | None = None


FileResult = CheckpointRead | CheckpointWritten


class FileWork:
    """What is to be written and read, in order.

    Args:
        deliver: Takes results, on the thread.
        executor: Of one thread.
    """

    def __init__(
        self, deliver: Callable[[FileResult], None], executor: Executor | None = None
    ) -> None:
        self._deliver = deliver
        self._executor = executor or ThreadPoolExecutor(1, "checkpoints")

    def read(self, job: Any, folder: Path, last_step: int) -> None:
        """Looks for the checkpoint that ``job`` goes on from, of a step up to ``last_step``."""
        self._executor.submit(self._read, job, folder, last_step)

    def write(self, job: Any, folder: Path, step: int, content: bytes) -> None:
        """Makes what ``job`` is after a step last."""
        self._executor.submit(self._write, job, folder, step, content)

    def _read(self, job: Any, folder: Path, last_step: int) -> None:
        try:
            self._deliver(CheckpointRead(job, newest_checkpoint(folder, last_step)))
        except Exception as error:
            self._deliver(CheckpointRead(job, None, _told(error)))

    def _write(self, job: Any, folder: Path, step: int, content: bytes) -> None:
        try:
            write_checkpoint(folder, step, content)
        except Exception as error:
            self._deliver(CheckpointWritten(job, _told(error)))
        else:
            self._deliver(CheckpointWritten(job))


def _told(error: Exception) -> OSError:
    """A bug here must not leave a job waiting for ever."""
    if isinstance(error, OSError):
        return error
    log.exception("a checkpoint cannot be handled")
    return OSError(errno.EIO, f"{type(error).__name__}, which the log explains")
