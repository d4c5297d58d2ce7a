"""What the worker tells of jobs, in its order: committed first, and then heard of by others.

Steps that came together are committed together, everything else alone. While there is no room on
the disk, all of it waits.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from service.errors import ServiceError, StorageFull
from service.jobs import tables, version_changes
from service.jobs.job_changes import NewEvent, with_eval, with_step
from service.jobs.open_jobs import OpenJob, OpenJobs, add_events
from service.jobs.records import JobRecord
from service.jobs.store import Store
from service.jobs.version_changes import Changes, Published
from service.jobs.versions import Versions
from service.protocol.training import (
    JobEnded,
    JobEval,
    JobPaused,
    JobStep,
    JobVersion,
    TrainingEvent,
)

log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Lost:
    """In the queue of events: the worker has ended."""


@dataclass(frozen=True, slots=True)
class _Saved:
    """In the queue of events: what a job ended with lasts, or does not yet."""

    job_id: str
    trouble: ServiceError | None = None


class Progress:
    """Takes events of all jobs, one after the other.

    Args:
        store: Has the tables.
        versions: That jobs make.
        open_jobs: That have not ended.
    """

    def __init__(self, store: Store, versions: Versions, open_jobs: OpenJobs) -> None:
        self._store = store
        self._versions = versions
        self._open = open_jobs
        self._inbox: asyncio.Queue[TrainingEvent | _Lost | _Saved] = asyncio.Queue()

    def deliver(self, event: TrainingEvent) -> None:
        """Something happened to a job."""
        self._inbox.put_nowait(event)

    def worker_lost(self) -> None:
        """Nothing more comes of what it was told last."""
        self._inbox.put_nowait(_Lost())

    async def settled(self) -> None:
        """Returns when everything that was told so far is committed."""
        await self._inbox.join()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            waiting = [await self._inbox.get()]
            while not self._inbox.empty():
                waiting.append(self._inbox.get_nowait())
            while waiting:
                num_steps = 0
                while num_steps < len(waiting) and isinstance(waiting[num_steps], JobStep):
                    num_steps += 1
                group = waiting[: max(num_steps, 1)]
                del waiting[: len(group)]
                await self._take(group)
                for _ in group:
                    self._inbox.task_done()

    async def _take(self, group: Sequence[TrainingEvent | _Lost | _Saved]) -> None:
        """Steps that came together, or one event of another kind."""
        while True:
            try:
                return await self._take_once(group)
            except StorageFull as error:
                log.error("%s", error.detail)
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception:
                # A bug, which costs this event; the rest must still be told.
                log.exception("an event of a job met a bug")
                return

    async def _take_once(self, group: Sequence[TrainingEvent | _Lost | _Saved]) -> None:
        match group[0]:
            case JobStep():
                await self._steps([step for step in group if isinstance(step, JobStep)])
            case JobEval() as told:
                await self._evaluated(told)
            case JobVersion() as told:
                await self._published(told)
            case JobPaused(job_id=job_id, detail=detail):
                await self._open.move(job_id, "paused", detail=detail)
            case JobEnded() as told:
                await self._ended(told)
            case _Lost():
                await self._versions.forget_memory()
                for known in self._open.by_id.values():
                    known.ended = None
            case _Saved() as saved:
                await self._saved(saved)
            case _ as other:
                raise AssertionError(f"{type(other)} is an answer, and nobody asked")

    async def _steps(self, steps: Sequence[JobStep]) -> None:
        now = time.time()

        def change(db: sqlite3.Connection) -> tuple[dict[str, JobRecord], list[JobStep]]:
            records: dict[str, JobRecord] = {}
            new = []
            for told in steps:
                before = records.get(told.job_id) or tables.job(db, told.job_id)
                record, events = with_step(before, told, now)
                records[told.job_id] = record
                add_events(db, record.id, events, now)
                if record.step != before.step:
                    new.append(told)
            for record in records.values():
                tables.put_job(db, record)
            return records, new

        records, new = await self._store.write(change)
        for told in new:
            self._open.meter.step(told.num_rows, told.num_tokens, told.tokens_per_second)
        for record in records.values():
            self._open.note(record)

    async def _evaluated(self, told: JobEval) -> None:
        now = time.time()

        def change(db: sqlite3.Connection) -> tuple[JobRecord, Published | None]:
            record, events = with_eval(tables.job(db, told.job_id), told)
            add_events(db, record.id, events, now)
            tables.put_job(db, record)
            published = version_changes.promote(db, record) if events else None
            if published is not None:
                add_events(db, record.id, [_version_event(record, published)], now)
            return record, published

        record, published = await self._store.write(change)
        if published is not None:
            self._versions.apply(published.changes)
            self._versions.save_live(record.adapter)
        self._open.note(record)

    async def _published(self, told: JobVersion) -> None:
        now = time.time()

        def change(db: sqlite3.Connection) -> tuple[JobRecord, Published | Changes]:
            record = tables.job(db, told.job_id)
            if record.has_ended:
                # It was cancelled when this was on its way.
                is_held = tables.is_held(db, told.digest)
                return record, Changes(released=[] if is_held else [told.digest])
            published = version_changes.publish(db, record, told, now)
            record = replace(record, version=max(published.version.number, record.version or 0))
            tables.put_job(db, record)
            if published.is_news:
                add_events(db, record.id, [_version_event(record, published)], now)
            return record, published

        record, published = await self._store.write(change)
        if isinstance(published, Changes):
            self._versions.apply(published)
            return
        self._versions.apply(published.changes)
        self._open.meter.published(time.time() - now)
        if published.is_live:
            self._versions.save_live(record.adapter)
        known = self._open.by_id.get(record.id)
        if told.is_last and known is not None:
            self._save_last(known, record, published.version.number)
        self._open.note(record)

    def _save_last(self, known: OpenJob, record: JobRecord, number: int) -> None:
        """What a job ends with must last before the job has succeeded."""

        def trouble(error: ServiceError) -> None:
            self._inbox.put_nowait(_Saved(record.id, error))

        def done(task: "asyncio.Task[bool]") -> None:
            if not task.cancelled() and task.result():
                self._inbox.put_nowait(_Saved(record.id))

        known.saving = self._versions.keep_saving(record.adapter, number, trouble)
        known.saving.add_done_callback(done)

    async def _saved(self, saved: _Saved) -> None:
        known = self._open.by_id.get(saved.job_id)
        if known is None:
            return
        if saved.trouble is None:
            known.saving = None
            await self._succeed_if_done(saved.job_id, known)
        elif saved.trouble.retryable:
            await self._open.move(saved.job_id, "paused", detail=saved.trouble.detail)
        else:
            error = saved.trouble
            await self._open.move(saved.job_id, "failed", code=error.code, detail=error.detail)

    async def _ended(self, told: JobEnded) -> None:
        known = self._open.by_id.get(told.job_id)
        if known is None:
            # It was cancelled here, and the worker may have written until now.
            await asyncio.to_thread(self._open.folders.remove_checkpoint, told.job_id)
            return
        if told.end == "succeeded":
            known.ended = told
            await self._succeed_if_done(told.job_id, known)
        else:
            await self._open.move(told.job_id, told.end, code=told.code, detail=told.detail)

    async def _succeed_if_done(self, job_id: str, known: OpenJob) -> None:
        if known.ended is not None and known.saving is None:
            await self._open.move(job_id, "succeeded")


def _version_event(record: JobRecord, published: Published) -> NewEvent:
    version = published.version
    data = {
        "version": version.number,
        "adapter": record.adapter,
        "step": version.step,
        "digest": version.digest,
        "live": published.is_live,
    }
    return NewEvent("version", data)
