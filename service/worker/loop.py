"""The worker's loop: the only thread that calls the engine.

One turn:

1. take in what the reader admitted and who cancelled (wait only when there is nothing to do);
2. end what is cancelled or past its deadline;
3. give free slots to waiting rows;
4. do one action of the scheduler: a prefill chunk, a copy, or a decode step of all rows;
5. send everything that the turn made in one frame.
"""

import queue
import time
from collections.abc import Callable

from model.slots import Engine
from service.protocol.messages import (
    Cancel,
    Event,
    Failed,
    Finished,
    FinishReason,
    Phase,
    Timings,
)
from service.worker.admission import Admission, AdmittedRequest
from service.worker.completion import Completion
from service.worker.scheduler import Copy, Decode, Idle, Prefill, RowKey, Scheduler

Arrival = AdmittedRequest | Cancel
# Bounds how late a deadline is noticed while nothing else happens.
_IDLE_WAIT_SECONDS = 0.2


class LoopStatus:
    """What the loop is doing, for the heartbeat's thread to read."""

    def __init__(self) -> None:
        self.turn = 0
        self.num_running = 0
        self._phase: tuple[Phase, float] = ("start", time.monotonic())

    @property
    def phase(self) -> tuple[Phase, float]:
        """The phase and the monotonic second at which it began."""
        return self._phase

    def enter(self, phase: Phase) -> None:
        """Begins a phase; entering the same one again is progress too."""
        self._phase = (phase, time.monotonic())
        self.turn += 1


class Loop:
    """Runs admitted requests on an engine.

    Args:
        engine: Called from this thread only.
        admission: Told when a row leaves the queue.
        arrivals: Filled by the reader.
        send: Takes the events of one turn.
        status: Read by the heartbeat.
    """

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        arrivals: "queue.SimpleQueue[Arrival]",
        send: Callable[[list[Event]], None],
        status: LoopStatus,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._arrivals = arrivals
        self._send = send
        self._status = status
        self._scheduler = Scheduler(engine.info.num_slots, engine.info.chunk_tokens)
        self._requests: dict[str, AdmittedRequest] = {}
        self._completions: dict[RowKey, Completion] = {}
        self._events: list[Event] = []

    def run(self) -> None:
        """Turns for ever; the process ends when the reader sees the API process go."""
        while True:
            self.turn()

    def turn(self) -> None:
        """One turn; see the module."""
        self._take_arrivals()
        self._end_expired(time.monotonic())
        for row in self._scheduler.start_waiting():
            self._note_start(row.key)
        action = self._scheduler.next_action()
        # Not by what admission counts: it also counts what has not been taken in yet.
        self._status.num_running = sum(
            request.started_at is not None for request in self._requests.values()
        )
        match action:
            case Prefill():
                self._status.enter("step")
                self._prefill(action)
            case Copy():
                self._status.enter("step")
                self._copy(action)
            case Decode():
                self._status.enter("step")
                self._decode(action)
            case Idle():
                pass
        self._flush()

    def _take_arrivals(self) -> None:
        """Everything that has arrived; waits a moment if there is nothing else to do."""
        if not self._requests:
            self._status.enter("idle")
            try:
                self._take(self._arrivals.get(timeout=_IDLE_WAIT_SECONDS))
            except queue.Empty:
                return
        while not self._arrivals.empty():
            self._take(self._arrivals.get())

    def _take(self, arrival: Arrival) -> None:
        if isinstance(arrival, Cancel):
            if request := self._requests.get(arrival.request_id):
                self._cut(request, "cancelled")
            return
        self._requests[arrival.request_id] = arrival
        for completion in arrival.completions:
            self._completions[completion.row.key] = completion
        self._scheduler.submit(completion.row for completion in arrival.completions)

    def _end_expired(self, now: float) -> None:
        for request in [each for each in self._requests.values() if each.deadline <= now]:
            if request.first_token_at is None:
                detail = "The time of the request passed before anything was generated."
                self._fail(request, "deadline_exceeded", detail)
            else:
                self._cut(request, "timeout")

    def _note_start(self, key: RowKey) -> None:
        self._admission.started(key)
        request = self._requests[key.request_id]
        if request.started_at is None:
            request.started_at = time.monotonic()

    def _prefill(self, action: Prefill) -> None:
        completion = self._completions[action.row.key]
        assert action.row.slot is not None
        chunk = completion.prompt[action.start : action.end]
        self._engine.prefill(action.row.slot, chunk, action.start)
        self._scheduler.record_prefill(action)

    def _copy(self, action: Copy) -> None:
        slots = []
        for row in (action.source, *action.targets):
            assert row.slot is not None
            slots.append(row.slot)
        source, *targets = slots
        self._engine.copy(source, targets, action.source.num_prefill_tokens)
        self._scheduler.record_copy(action)

    def _decode(self, action: Decode) -> None:
        completions = [self._completions[row.key] for row in action.rows]
        tokens = self._engine.decode([completion.decode_row() for completion in completions])
        now = time.monotonic()
        for completion, token in zip(completions, tokens, strict=True):
            request = self._requests.get(completion.row.key.request_id)
            if request is None:
                continue  # another output of this request was not finite
            if not token.is_finite:
                detail = "The model produced a value that is not a number."
                self._fail(request, "numerical", detail)
                continue
            request.first_token_at = request.first_token_at or now
            step = completion.take(token)
            self._events.append(step.piece)
            if step.end is not None:
                self._scheduler.remove(completion.row)
        for request_id in {row.key.request_id for row in action.rows}:
            if request := self._requests.get(request_id):
                self._finish_if_done(request)

    def _cut(self, request: AdmittedRequest, reason: FinishReason) -> None:
        """Ends every output that still runs; what was generated stands."""
        self._events.extend(
            completion.cut(reason) for completion in request.completions if completion.end is None
        )
        self._finish_if_done(request)

    def _finish_if_done(self, request: AdmittedRequest) -> None:
        ends = [completion.end for completion in request.completions]
        outputs = tuple(end for end in ends if end is not None)
        if len(outputs) < len(ends):
            return
        self._forget(request)
        now = time.monotonic()
        started_at = request.started_at or now
        first_token = request.first_token_at
        timings = Timings(
            queue_seconds=started_at - request.admitted_at,
            first_token_seconds=None if first_token is None else first_token - request.admitted_at,
            total_seconds=now - request.admitted_at,
        )
        self._events.append(Finished(request.request_id, outputs, timings))

    def _fail(self, request: AdmittedRequest, code: str, detail: str) -> None:
        self._forget(request)
        self._events.append(Failed(request.request_id, code, detail))

    def _forget(self, request: AdmittedRequest) -> None:
        """Gives back everything that the request holds."""
        del self._requests[request.request_id]
        for completion in request.completions:
            self._scheduler.remove(completion.row)
            self._admission.started(completion.row.key)
            del self._completions[completion.row.key]

    def _flush(self) -> None:
        if self._events:
            self._send(self._events)
            self._events = []
