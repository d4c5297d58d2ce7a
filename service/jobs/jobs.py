"""Fine-tune jobs from their request to their end.

::

    request --PrepareJob--> rows are right --commit--> 202, queued
    a place is free --commit: running--> StartJob --> events, one after the other --> an end

The tables are the truth. When a worker is ready, every job that runs is prepared and started again
(`starter`), and goes on from its checkpoint; what the worker tells is taken in its order
(`progress`).
"""

import asyncio
import contextlib
import sqlite3
import time
from dataclasses import dataclass
from uuid import uuid4

from service.errors import AdapterNotFound, FieldError, InvalidField, JobLimit, ServiceError
from service.jobs import tables
from service.jobs.folders import Folders
from service.jobs.idempotency import Once
from service.jobs.open_jobs import OpenJob, OpenJobs, Worker, moved
from service.jobs.progress import Progress
from service.jobs.records import JobRecord, Promotion, StoredEvent
from service.jobs.starter import Starter
from service.jobs.store import Store
from service.jobs.versions import Versions
from service.jobs.worker_calls import WorkerCalls
from service.observability import TrainingMeter
from service.protocol.training import (
    Hyperparameters,
    JobPrepared,
    PrepareJob,
    Row,
    TrainingEvent,
)


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a job shall do; every number is in its range.

    Attributes:
        tenant: Who wants it.
        adapter: Name of what it makes versions of.
        hyperparameters: How it trains.
        rows: To learn from.
        validation: To measure on, or the share that is set apart.
        init: Name and number of the version to go on from.
        publish: Steps between versions; None: at the end only.
        is_promoted: Whether versions may become live.
        promotion: On which condition.
        metadata: Of the client.
        data_digest: Of the rows.
    """

    tenant: str
    adapter: str
    hyperparameters: Hyperparameters
    rows: tuple[Row, ...]
    validation: tuple[Row, ...] | float
    init: tuple[str, int] | None
    publish: int | None
    is_promoted: bool
    promotion: Promotion | None
    metadata: dict[str, str | int | float | bool]
    data_digest: str


@dataclass(frozen=True, slots=True)
class JobLimits:
    """How many jobs run and wait, and how long one may be."""

    running: int
    queued: int
    steps: int


class Jobs:
    """All jobs of one service.

    Args:
        store: Has the tables.
        folders: Of the data folder.
        versions: That jobs make.
        calls: To the worker.
        limits: Of the service.
        meter: Counts.
    """

    def __init__(
        self,
        store: Store,
        folders: Folders,
        versions: Versions,
        calls: WorkerCalls,
        limits: JobLimits,
        meter: TrainingMeter,
    ) -> None:
        self._store = store
        self._versions = versions
        self._calls = calls
        self._limits = limits
        self._num_reserved = 0
        self._committing: set[asyncio.Task[None]] = set()
        self._open = OpenJobs(store, folders, meter)
        self._progress = Progress(store, versions, self._open)
        self._starter = Starter(store, calls, self._open, limits.running)

    # --- asked by routes ----------------------------------------------------------------------

    async def prepare(self, asked: JobRequest) -> tuple[PrepareJob, JobPrepared]:
        """Rows as tokens; the worker holds them until the job starts or is forgotten.

        Raises:
            ServiceError: Something is not right; errors have pointers into the request.
        """
        init = None if asked.init is None else await self._lasting_init(asked.init)
        command = PrepareJob(
            job_id=f"ft_{uuid4().hex}",
            tenant=asked.tenant,
            hyperparameters=asked.hyperparameters,
            rows=asked.rows,
            validation=asked.validation,
            init=init,
        )
        try:
            prepared = await self._calls.prepare(command)
            if prepared.num_steps > self._limits.steps:
                pointer = "/epochs" if asked.hyperparameters.steps is None else "/steps"
                detail = f"makes {prepared.num_steps} steps; at most {self._limits.steps} may be"
                raise InvalidField(
                    "The job would be too long.", errors=(FieldError(pointer, detail),)
                )
        except BaseException:
            self._calls.forget(command.job_id)
            raise
        return command, prepared

    async def create(self, asked: JobRequest, once: Once) -> JobRecord:
        """A durable job, which starts as soon as there is a place for it.

        Raises:
            JobLimit: As many run and wait as may.
            StorageFull: There is no room for its record.
            ServiceError: Something is not right with it.
        """
        limit = self._limits.running + self._limits.queued
        if len(self._open.by_id) + self._num_reserved >= limit:
            raise JobLimit(
                f"{self._limits.running} jobs run and {self._limits.queued} wait; wait until one "
                "has ended, or cancel one."
            )
        self._num_reserved += 1
        try:
            life = self._open.worker.life
            command, prepared = await self.prepare(asked)
            record = self._record(asked, command, prepared)
            # A client that leaves now leaves a job behind, or none, but nothing between.
            task = asyncio.create_task(self._commit(record, command, once, life))
            self._committing.add(task)
            task.add_done_callback(self._committing.discard)
            await asyncio.shield(task)
        finally:
            self._num_reserved -= 1
        return record

    async def _commit(self, record: JobRecord, command: PrepareJob, once: Once, life: int) -> None:
        """Makes a prepared job last, and has it started."""

        def change(db: sqlite3.Connection) -> None:
            if record.init is not None:
                name, _, number = record.init.partition("@")
                tables.version(db, name, int(number))
            tables.add_job(db, record, command)
            tables.add_event(db, record.id, "status", {"status": "queued"}, record.created)
            once.note(db, record.id)

        try:
            await self._store.write(change)
        except BaseException:
            self._calls.forget(record.id)
            raise
        is_prepared = life == self._open.worker.life and self._open.worker.is_ready
        self._open.by_id[record.id] = OpenJob("queued", is_prepared)
        self._open.count()
        self._open.wake.set()

    def forget(self, job_id: str) -> None:
        """Lets the worker forget a job that was only prepared."""
        self._calls.forget(job_id)

    async def job(self, job_id: str, tenant: str) -> JobRecord:
        """Raises `JobNotFound`."""
        return await self._store.read(lambda db: tables.job(db, job_id, tenant))

    async def jobs(
        self, tenant: str, after: str | None, limit: int
    ) -> tuple[list[JobRecord], bool]:
        """The newest first, those before ``after``; and whether there are more."""
        return await self._store.read(lambda db: tables.jobs(db, tenant, after, limit))

    async def ended(self, job_id: str, tenant: str, seconds: float) -> JobRecord:
        """The job once it has ended, or as it is when the time is over."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    change = self._open.feed.change(job_id)
                    record = await self.job(job_id, tenant)
                    if record.has_ended:
                        return record
                    await change.wait()
        except TimeoutError:
            return await self.job(job_id, tenant)

    async def events(self, job_id: str, after: int, limit: int) -> list[StoredEvent]:
        """Those that are there."""
        return await self._store.read(lambda db: tables.events(db, job_id, after, limit))

    async def next_events(
        self, job_id: str, after: int, limit: int
    ) -> tuple[list[StoredEvent], bool]:
        """At least one, unless the job has ended and there are no more; and whether it has ended.

        May be given up and called again.
        """
        while True:
            change = self._open.feed.change(job_id)
            found, record = await self._store.read(
                lambda db: (tables.events(db, job_id, after, limit), tables.job(db, job_id))
            )
            if found or record.has_ended:
                return found, record.has_ended
            await change.wait()

    async def cancel(self, job_id: str, tenant: str) -> JobRecord:
        """Ends a job. One that has ended already stays as it is."""

        def change(db: sqlite3.Connection) -> tuple[JobRecord, bool]:
            record = tables.job(db, job_id, tenant)
            if record.has_ended:
                return record, False
            return moved(db, record, "cancelled"), True

        record, is_new = await self._store.write(change)
        if is_new:
            self._calls.forget(job_id)
            await self._open.let_go(record)
        return record

    # --- told by the service ------------------------------------------------------------------

    def open(self) -> None:
        """Reads the tables, and removes what belongs to nothing; before there is a loop."""
        self._versions.open()
        records = self._store.write_now(tables.open_jobs)
        present = self._store.write_now(tables.present_versions)
        self._open.by_id.update((record.id, OpenJob(record.status)) for record in records)
        self._open.folders.remove_orphans(
            [version.digest for version in present], [record.id for record in records]
        )
        self._open.count()

    def worker_ready(self, preset_digest: str) -> None:
        """A worker that knows nothing yet."""
        self._open.worker = Worker(preset_digest, self._open.worker.life + 1, is_ready=True)
        self._versions.worker_ready(preset_digest)
        self._open.wake.set()

    def worker_lost(self) -> None:
        """Jobs go on with the next one."""
        self._open.worker.is_ready = False
        self._calls.fail_all()
        self._versions.worker_lost()
        for known in self._open.by_id.values():
            known.is_prepared = known.is_started = known.is_elsewhere = False
        self._progress.worker_lost()

    def deliver(self, event: TrainingEvent) -> None:
        """What the worker says about a job."""
        if not self._calls.deliver(event):
            self._progress.deliver(event)

    async def halt(self) -> None:
        """Nothing trains any more; returns when everything that was done lasts."""
        if self._open.by_id:
            with contextlib.suppress(ServiceError):  # no worker, so nothing trains
                await self._calls.halt()
        await self._progress.settled()
        await self._versions.settled()
        await self._progress.settled()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._progress.run())
            group.create_task(self._starter.run())

    # --- small things -------------------------------------------------------------------------

    async def _lasting_init(self, init: tuple[str, int]) -> str:
        """The digest of a version, which lasts from now on."""
        name, number = init
        await self._versions.save(name, number)
        version = await self._store.read(lambda db: tables.find_version(db, name, number))
        if version is None or version.place == "gone":
            raise AdapterNotFound("There is no such version to go on from.")
        return version.digest

    def _record(self, asked: JobRequest, command: PrepareJob, prepared: JobPrepared) -> JobRecord:
        validation = asked.validation
        assert self._open.worker.preset_digest is not None, "a worker has prepared it"
        return JobRecord(
            id=command.job_id,
            tenant=asked.tenant,
            adapter=asked.adapter,
            status="queued",
            init=None if asked.init is None else "{}@{}".format(*asked.init),
            init_digest=command.init,
            preset_digest=self._open.worker.preset_digest,
            hyperparameters=asked.hyperparameters,
            num_rows=len(asked.rows),
            num_validation_rows=len(validation) if isinstance(validation, tuple) else validation,
            publish=asked.publish,
            is_promoted=asked.is_promoted,
            promotion=asked.promotion,
            metadata=asked.metadata,
            data_digest=asked.data_digest,
            num_steps=prepared.num_steps,
            seconds=prepared.seconds,
            created=time.time(),
        )
