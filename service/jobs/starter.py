"""Starts jobs: those that run go on after a restart, and one that waits begins when it may.

A job belongs to the model that it was made for. While another one is served it waits, as `paused`
if it had begun and `queued` if not, and takes nobody's place.
"""

import asyncio
import logging
import sqlite3

from service.errors import ServiceError, StorageFull
from service.jobs import tables
from service.jobs.open_jobs import OpenJobs
from service.jobs.store import Store
from service.jobs.worker_calls import WorkerCalls
from service.protocol.training import PrepareJob, StartJob

log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0


class Starter:
    """Starts one job after the other.

    Args:
        store: Has the tables.
        calls: To the worker.
        open_jobs: That have not ended.
        max_running: Jobs that may run at once.
    """

    def __init__(
        self, store: Store, calls: WorkerCalls, open_jobs: OpenJobs, max_running: int
    ) -> None:
        self._store = store
        self._calls = calls
        self._open = open_jobs
        self._max_running = max_running

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._open.wake.wait()
            self._open.wake.clear()
            while self._open.worker.is_ready and (job_id := self._next_to_start()) is not None:
                try:
                    await self._start(job_id)
                except StorageFull as error:
                    log.error("%s", error.detail)
                    await asyncio.sleep(_RETRY_SECONDS)
                except ServiceError as error:
                    if error.retryable:
                        break  # the worker has died; the next one wakes us
                    detail = error.errors[0].detail if error.errors else error.detail
                    await self._open.move(job_id, "failed", code=error.code, detail=detail)
                except Exception:
                    # A bug, which costs this job; the rest must still start.
                    log.exception("a job met a bug when it was to start")
                    await self._open.move(job_id, "failed", code="internal")

    def _next_to_start(self) -> str | None:
        num_running = 0
        for job_id, known in self._open.by_id.items():
            if known.is_elsewhere:
                continue
            if known.status != "queued":
                num_running += 1
                if not known.is_started:
                    return job_id
        if num_running >= self._max_running:
            return None
        waiting = (
            job_id
            for job_id, known in self._open.by_id.items()
            if known.status == "queued" and not known.is_elsewhere
        )
        return next(waiting, None)

    async def _start(self, job_id: str) -> None:
        known = self._open.by_id[job_id]
        life = self._open.worker.life
        record, command = await self._store.read(
            lambda db: (tables.job(db, job_id), _command_of_open(db, job_id))
        )
        if command is None:
            return
        if record.preset_digest != self._open.worker.preset_digest:
            # Whoever serves that model again lets it go on.
            known.is_elsewhere = True
            if record.status != "queued":
                detail = "It was made for another model than the one that is served now."
                await self._open.move(job_id, "paused", detail=detail)
            return
        if not known.is_prepared:
            await self._calls.prepare(command)
        if record.status != "running":
            await self._open.move(job_id, "running")
        if life != self._open.worker.life or job_id not in self._open.by_id:
            self._calls.forget(job_id)
            return
        known.is_prepared = known.is_started = True
        publish_every = record.publish or record.num_steps
        folder = str(self._open.folders.checkpoint(job_id))
        self._calls.send(StartJob(job_id, folder, publish_every, record.step))


def _command_of_open(db: sqlite3.Connection, job_id: str) -> PrepareJob | None:
    return None if tables.job(db, job_id).has_ended else tables.command(db, job_id)
