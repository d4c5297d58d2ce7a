"""The jobs that have not ended, and the worker of now: what more than one part has to know.

The tables are the truth; this is what follows from them, and how far the worker is with each job.
"""

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from service.jobs import tables
from service.jobs.feed import Feed
from service.jobs.folders import Folders
from service.jobs.job_changes import NewEvent, with_status
from service.jobs.records import JobRecord, JobStatus
from service.jobs.store import Store
from service.observability import TrainingMeter
from service.protocol.training import JobEnded


@dataclass(slots=True)
class OpenJob:
    """A job that has not ended.

    Attributes:
        status: As it was committed.
        is_prepared: Whether the worker of now has its rows.
        is_started: Whether it trains there.
        is_elsewhere: Whether it was made for another model than the one of now, and waits for that.
        ended: What the worker said at its end, until that is committed.
        saving: What it ended with is being saved.
    """

    status: JobStatus
    is_prepared: bool = False
    is_started: bool = False
    is_elsewhere: bool = False
    ended: JobEnded | None = None
    saving: "asyncio.Task[bool] | None" = None


@dataclass(slots=True)
class Worker:
    """The worker of now; each one has a life of its own."""

    preset_digest: str | None = None
    life: int = 0
    is_ready: bool = False


@dataclass(slots=True)
class OpenJobs:
    """All jobs that have not ended.

    Attributes:
        store: Has the tables.
        folders: Of the data folder.
        meter: Counts.
        by_id: In the order in which they came.
        feed: Who follows a job.
        worker: Of now.
        wake: Set when a job may have to be started.
    """

    store: Store
    folders: Folders
    meter: TrainingMeter
    by_id: dict[str, OpenJob] = field(default_factory=dict)
    feed: Feed = field(default_factory=Feed)
    worker: Worker = field(default_factory=Worker)
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def move(
        self, job_id: str, status: JobStatus, code: str | None = None, detail: str | None = None
    ) -> None:
        """A job in its next status; one that has ended stays as it is."""

        def change(db: sqlite3.Connection) -> JobRecord:
            record = tables.job(db, job_id)
            return record if record.has_ended else moved(db, record, status, code, detail)

        record = await self.store.write(change)
        if record.has_ended:
            await self.let_go(record)
        else:
            self.note(record)

    async def let_go(self, record: JobRecord) -> None:
        """Of a job that has ended."""
        known = self.by_id.pop(record.id, None)
        if known is not None:
            seconds = (record.finished or record.created) - record.created
            self.meter.ended(record.status, record.error_code, seconds)
        self.note(record)
        self.wake.set()
        await asyncio.to_thread(self.folders.remove_checkpoint, record.id)

    def note(self, record: JobRecord) -> None:
        """Something of the job has been committed."""
        if (known := self.by_id.get(record.id)) is not None:
            known.status = record.status
        self.count()
        self.feed.tell(record.id)

    def count(self) -> None:
        """Shows how many there are."""
        jobs = self.by_id.values()
        num_elsewhere = sum(known.status == "paused" and known.is_elsewhere for known in jobs)
        self.meter.statuses([known.status for known in jobs], num_elsewhere)


def moved(
    db: sqlite3.Connection,
    record: JobRecord,
    status: JobStatus,
    code: str | None = None,
    detail: str | None = None,
) -> JobRecord:
    """The job in its next status, inside of a transaction."""
    now = time.time()
    record, events = with_status(record, status, now, code=code, detail=detail)
    add_events(db, record.id, events, now)
    tables.put_job(db, record)
    return record


def add_events(db: sqlite3.Connection, job_id: str, events: Sequence[NewEvent], now: float) -> None:
    """Behind the job's other events, inside of a transaction."""
    for event in events:
        tables.add_event(db, job_id, event.kind, event.data, now)
