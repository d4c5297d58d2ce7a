"""What happens to a job, as it is told: each event with a number, so that none is missed.

(StatusEvent | StepEvent | EvalEvent | VersionEvent)*, JobDoneEvent | JobFailedEvent
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TypeAlias

from service.client.call import EVENT_STREAM, Answer, Call, below, read
from service.client.errors import UnexpectedAnswer
from service.client.event_stream import Event, EventReader
from service.client.jobs import JobStatus, StoredEvent


class _JobEvent(Answer):
    """``job.events(after=event.id)`` goes on behind it."""

    id: int = 0


class StatusEvent(_JobEvent):
    """The job waits, runs, or pauses; ``detail`` says why it pauses."""

    status: JobStatus
    detail: str | None = None


class StepEvent(_JobEvent):
    """A step of the optimizer.

    Attributes:
        loss: Of its rows, before it.
        grad_norm: Before it was clipped.
        tokens: Of its rows.
        tokens_per_s: Of this job, since the step before.
        rows_shared: Rows of other jobs that were computed together with its own.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    rows_shared: int


class EvalEvent(_JobEvent):
    """The loss on the validation rows after a step; step 0 is before the first."""

    step: int
    valid_loss: float


class VersionEvent(_JobEvent):
    """A version that can be asked for from now on."""

    version: int
    adapter: str
    step: int
    digest: str
    live: bool


class JobDoneEvent(_JobEvent):
    """The last event of a job that succeeded or was cancelled."""

    status: JobStatus
    step: int
    version: int | None


class JobFailedEvent(_JobEvent):
    """The last event of a job that failed."""

    status: JobStatus
    step: int
    version: int | None
    code: str | None
    detail: str | None


JobEvent: TypeAlias = (
    StatusEvent | StepEvent | EvalEvent | VersionEvent | JobDoneEvent | JobFailedEvent
)
_KINDS: Mapping[str, type[JobEvent]] = MappingProxyType(
    {
        "status": StatusEvent,
        "step": StepEvent,
        "eval": EvalEvent,
        "version": VersionEvent,
        "done": JobDoneEvent,
        "error": JobFailedEvent,
    }
)


def typed(stored: StoredEvent) -> JobEvent | None:
    """An event of a list; None if it is newer than this client."""
    kind = _KINDS.get(stored.event)
    return None if kind is None else kind.model_validate({"id": stored.id, **stored.data})


class JobEventReader:
    """Bytes of a stream of events, over as many connections as it takes.

    Args:
        job_id: Of which job.
        after: Number of the last event that is known; 0: none is.
    """

    def __init__(self, job_id: str, after: int = 0) -> None:
        self._job_id = job_id
        self._events = EventReader()
        self._last = after
        self.is_over = False

    def call(self) -> Call:
        """Asks for what is behind the last event that was read."""
        # Half an event of a connection that broke is told again.
        self._events = EventReader()
        path = below("/finetune", self._job_id, "events")
        return Call("GET", path, accept=EVENT_STREAM, last_event_id=self._last)

    def feed(self, piece: bytes) -> Iterator[JobEvent]:
        """The events that end in ``piece``; one of an unknown name is skipped."""
        for event in self._events.feed(piece):
            number = _number(event)
            # A proxy may repeat what it has sent before.
            if number <= self._last:
                continue
            self._last = number
            self.is_over = event.name in ("done", "error")
            if (kind := _KINDS.get(event.name)) is not None:
                # The number stands beside the data.
                yield read(kind, event.data).model_copy(update={"id": number})


def _number(event: Event) -> int:
    if event.id is None or not event.id.isdecimal():
        raise UnexpectedAnswer("An event of a job has no number.")
    return int(event.id)
