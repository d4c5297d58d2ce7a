"""A fine-tune job: followed, waited for, watched and cancelled, from wherever its id is known.

A job belongs to the service. It goes on when this process ends, and when the service is started
again; another process finds it by its id.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from typing import Self

from service.client.call import read
from service.client.errors import JobFailed, TimedOut
from service.client.job_events import JobEvent, JobEventReader, typed
from service.client.job_progress import JobProgress
from service.client.job_views import JobView, view_for
from service.client.jobs import (
    JobError,
    JobState,
    JobStatus,
    StoredEvents,
    cancel_job_call,
    job_call,
    stored_events_call,
)
from service.client.retries import RetryRules
from service.client.transport import AsyncTransport, Transport

# It is asked for after a tenth of the time that it has been waited for, within these bounds.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


class _Known:
    """What the service said last.

    Attributes:
        state: All of it. It does not change by itself: `refresh` asks again.
    """

    def __init__(self, state: JobState) -> None:
        self.state = state

    def __repr__(self) -> str:
        state = self.state
        version = "" if state.version is None else f", version {state.version}"
        return (
            f"<job {state.id} of {state.adapter}: {state.status}, "
            f"step {state.step} of {state.total_steps}{version}>"
        )

    @property
    def id(self) -> str:
        """By which every process finds the job."""
        return self.state.id

    @property
    def adapter(self) -> str:
        """The adapter that gets its versions."""
        return self.state.adapter

    @property
    def status(self) -> JobStatus:
        """As last told."""
        return self.state.status

    @property
    def version(self) -> int | None:
        """The newest one that it made, as last told."""
        return self.state.version

    def _pause(self, began: float, timeout_s: float | None) -> float:
        """Seconds until it is asked for again."""
        waited = time.monotonic() - began
        if timeout_s is not None and waited >= timeout_s:
            raise TimedOut(f"Job {self.id} has not ended within {timeout_s:g} s. It goes on.")
        pause = min(max(waited / 10, _SHORTEST_PAUSE), _LONGEST_PAUSE)
        return pause if timeout_s is None else min(pause, timeout_s - waited)

    def _check(self) -> Self:
        """This job, if it did what was asked of it."""
        if self.state.status == "failed":
            error = self.state.error or JobError(code="unknown", detail=None)
            raise JobFailed(self.id, error.code, error.detail)
        return self


class Job(_Known):
    """A job of a `GemmaClient`, by `GemmaClient.finetune`, `job` or `jobs`."""

    def __init__(self, transport: Transport, state: JobState) -> None:
        super().__init__(state)
        self._transport = transport

    def refresh(self) -> JobState:
        """Asks how far it is."""
        self.state = read(JobState, self._transport.send(job_call(self.id)))
        return self.state

    def cancel(self) -> JobState:
        """Ends it; one that has ended stays as it is. Versions that it made stay."""
        self.state = read(JobState, self._transport.send(cancel_job_call(self.id)))
        return self.state

    def events(self, after: int = 0) -> Generator[JobEvent]:
        """All that happened to it and all that happens, to its end.

        A connection that breaks is opened again, and nothing is missed or told twice.

        Args:
            after: `id` of the last event that is known already.
        """
        return self._transport.follow(JobEventReader(self.id, after))

    def history(self, after: int = 0) -> list[JobEvent]:
        """What has happened to it by now."""
        found: list[JobEvent] = []
        while True:
            call = stored_events_call(self.id, after)
            page = read(StoredEvents, self._transport.send(call))
            found.extend(event for each in page.events if (event := typed(each)) is not None)
            if not page.has_more:
                return found
            after = page.events[-1].id

    def wait(self, timeout_s: float | None = None) -> Self:
        """Returns when it has ended.

        Raises:
            JobFailed: It failed.
            TimedOut: It has not ended in time, and goes on.
        """
        began = time.monotonic()
        rules = RetryRules(None, self._transport.rules.timeout_s)
        while True:
            self.state = read(JobState, self._transport.send(job_call(self.id), rules))
            if self.state.has_ended:
                return self._check()
            time.sleep(self._pause(began, timeout_s))

    def watch(self, view: JobView | None = None) -> Self:
        """Shows how far it is until it has ended: a plot in a notebook, a bar on a terminal.

        To interrupt it ends the view and not the job.

        Args:
            view: Another way to show it.

        Raises:
            JobFailed: It failed.
        """
        shown = view_for() if view is None else view
        progress = JobProgress.of(self.state)
        try:
            with closing(self.events()) as events:
                for event in events:
                    progress.take(event)
                    shown.show(progress)
        finally:
            shown.close()
        self.refresh()
        return self._check()


class AsyncJob(_Known):
    """The same for asyncio."""

    def __init__(self, transport: AsyncTransport, state: JobState) -> None:
        super().__init__(state)
        self._transport = transport

    async def refresh(self) -> JobState:
        self.state = read(JobState, await self._transport.send(job_call(self.id)))
        return self.state

    async def cancel(self) -> JobState:
        self.state = read(JobState, await self._transport.send(cancel_job_call(self.id)))
        return self.state

    def events(self, after: int = 0) -> AsyncGenerator[JobEvent]:
        return self._transport.follow(JobEventReader(self.id, after))

    async def history(self, after: int = 0) -> list[JobEvent]:
        found: list[JobEvent] = []
        while True:
            call = stored_events_call(self.id, after)
            page = read(StoredEvents, await self._transport.send(call))
            found.extend(event for each in page.events if (event := typed(each)) is not None)
            if not page.has_more:
                return found
            after = page.events[-1].id

    async def wait(self, timeout_s: float | None = None) -> Self:
        began = time.monotonic()
        rules = RetryRules(None, self._transport.rules.timeout_s)
        while True:
            self.state = read(JobState, await self._transport.send(job_call(self.id), rules))
            if self.state.has_ended:
                return self._check()
            await asyncio.sleep(self._pause(began, timeout_s))

    async def watch(self, view: JobView | None = None) -> Self:
        shown = view_for() if view is None else view
        progress = JobProgress.of(self.state)
        try:
            async with aclosing(self.events()) as events:
                async for event in events:
                    progress.take(event)
                    shown.show(progress)
        finally:
            shown.close()
        await self.refresh()
        return self._check()
