"""Questions to the worker that it answers with one event each, and what it says unasked."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar
from uuid import uuid4

from service.errors import (
    ERROR_BY_CODE,
    FieldError,
    InternalError,
    InvalidField,
    ServiceError,
    StorageFull,
    WorkerRestarting,
)
from service.protocol.training import (
    AdapterExported,
    AdapterFailed,
    AdapterImported,
    AdapterSaved,
    CancelJob,
    ExportAdapter,
    HaltJobs,
    ImportAdapter,
    JobPrepared,
    JobRefused,
    JobsHalted,
    Layout,
    PrepareJob,
    SaveAdapter,
    TrainingCommand,
    TrainingEvent,
)

_Answer = TypeVar("_Answer", AdapterSaved, AdapterImported, AdapterExported)
# Of jobs, in the words of the error table.
_OTHER_CODES: dict[str, type[ServiceError]] = {
    "invalid_row": InvalidField,
    "storage_error": StorageFull,
}


class WorkerCalls:
    """What is asked of the worker about jobs and versions.

    Args:
        send: Takes one command; raises a `ServiceError` while no worker is ready.
    """

    def __init__(self, send: Callable[[TrainingCommand], None]) -> None:
        self.send = send
        self._waiting: dict[str, asyncio.Future[TrainingEvent]] = {}

    async def prepare(self, command: PrepareJob) -> JobPrepared:
        """Makes tokens of the rows of a job.

        Raises:
            ServiceError: They are not right, or the worker is not there.
        """
        answer = await self._ask(command.job_id, command)
        if isinstance(answer, JobRefused):
            errors = tuple(FieldError(each.pointer, each.detail) for each in answer.errors)
            raise _error_class(answer.code)(answer.detail, errors=errors)
        assert isinstance(answer, JobPrepared), f"expected JobPrepared, got {type(answer)}"
        return answer

    def forget(self, job_id: str) -> None:
        """Ends a job there, or lets go of one that was only prepared."""
        with contextlib.suppress(ServiceError):  # no worker, so nobody knows it
            self.send(CancelJob(job_id))

    async def halt(self) -> None:
        """Ends training there; returns when what was done lasts.

        Raises:
            ServiceError: There is no worker.
        """
        request_id = uuid4().hex
        await self._ask(request_id, HaltJobs(request_id))

    async def save(self, digest: str, folder: str) -> AdapterSaved:
        """Makes a version last in ``folder``."""
        request_id = uuid4().hex
        return await self._ask_of(SaveAdapter(request_id, digest, folder), AdapterSaved)

    async def import_file(self, path: str, layout: Layout) -> AdapterImported:
        """Makes a version of a file."""
        request_id = uuid4().hex
        return await self._ask_of(ImportAdapter(request_id, path, layout), AdapterImported)

    async def export_file(self, digest: str, path: str, layout: Layout) -> AdapterExported:
        """Writes a version as a file."""
        request_id = uuid4().hex
        return await self._ask_of(ExportAdapter(request_id, digest, path, layout), AdapterExported)

    def deliver(self, event: TrainingEvent) -> bool:
        """Whether somebody has waited for this event, and has it now."""
        match event:
            case JobPrepared() | JobRefused():
                key = event.job_id
            case AdapterSaved() | AdapterImported() | AdapterExported() | AdapterFailed():
                key = event.request_id
            case JobsHalted():
                key = event.request_id
            case _:
                return False
        if (waiting := self._waiting.get(key)) is not None and not waiting.done():
            waiting.set_result(event)
        return True

    def fail_all(self) -> None:
        """The worker has ended, so nothing will be answered."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(WorkerRestarting("The worker ended while it held this."))

    async def _ask_of(
        self, command: SaveAdapter | ImportAdapter | ExportAdapter, kind: type[_Answer]
    ) -> _Answer:
        answer = await self._ask(command.request_id, command)
        if isinstance(answer, AdapterFailed):
            raise _error_class(answer.code)(answer.detail)
        assert isinstance(answer, kind), f"expected {kind}, got {type(answer)}"
        return answer

    async def _ask(self, key: str, command: TrainingCommand) -> TrainingEvent:
        self.send(command)
        self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            return await self._waiting[key]
        finally:
            del self._waiting[key]


def _error_class(code: str) -> type[ServiceError]:
    return _OTHER_CODES.get(code) or ERROR_BY_CODE.get(code, InternalError)
