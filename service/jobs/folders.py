"""The files of jobs and versions in the data folder.

::

    service.sqlite
    adapters/<digest>/       a version that lasts
    checkpoints/<job>/       what a running job goes on from
    passing/                 files on their way in or out, gone at every start

The tables say which of them belong to something. What does not is removed at the start: a process
that died between a file and its row leaves such things behind.
"""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

log = logging.getLogger(__name__)


class Folders:
    """Those below one data folder; made if they are not there."""

    def __init__(self, path: Path) -> None:
        path = self.path = path.absolute()
        self._adapters = path / "adapters"
        self._checkpoints = path / "checkpoints"
        self._passing = path / "passing"
        shutil.rmtree(self._passing, ignore_errors=True)
        for folder in (self._adapters, self._checkpoints, self._passing):
            folder.mkdir(mode=0o700, exist_ok=True)

    def adapter(self, digest: str) -> Path:
        """Of one version."""
        return self._adapters / digest.removeprefix("sha256:")

    def checkpoint(self, job_id: str) -> Path:
        """Of one job."""
        return self._checkpoints / job_id

    def passing_file(self) -> Path:
        """A new name for a file that nobody keeps."""
        return self._passing / uuid4().hex

    def remove_adapter(self, digest: str) -> None:
        _remove(self.adapter(digest))

    def remove_checkpoint(self, job_id: str) -> None:
        _remove(self.checkpoint(job_id))

    def remove_orphans(self, digests: Iterable[str], job_ids: Iterable[str]) -> None:
        """All but the folders of these versions and jobs."""
        wanted = {self.adapter(digest) for digest in digests}
        wanted |= {self.checkpoint(job_id) for job_id in job_ids}
        for folder in (*self._adapters.iterdir(), *self._checkpoints.iterdir()):
            if folder not in wanted:
                log.warning("removing %s, which belongs to nothing", folder)
                _remove(folder)


def _remove(path: Path) -> None:
    """A folder is moved away first, so that nobody ever meets half of one."""
    doomed = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        doomed.unlink(missing_ok=True)
