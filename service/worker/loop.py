"""The worker's loop: the only thread that calls the engine.

One turn:

1. take in what the reader admitted and who cancelled (wait only when there is nothing to do);
2. end what is cancelled or past its deadline;
3. give free slots to waiting rows;
4. do one action of the scheduler: part of a prefill chunk, a copy, a dispatch of decode steps, a
   step of a search, part of what is scored, or slices of training;
5. send everything that the turn made in one frame.

While nothing waits, a dispatch is read after the next one has been started, so that the device does
not wait for detokenising and sending. What it computes for a row that has just ended is thrown
away.
"""

import logging
import queue
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from model.attribution_questions import AttributionEngine
from model.errors import ModelError
from model.process_memory import give_back_freed_memory
from model.slots import Dispatch, PromptChunk, SampledToken
from service.protocol.messages import (
    Cancel,
    Event,
    Failed,
    Finished,
    FinishReason,
    Piece,
    Timings,
)
from service.protocol.training import ForgetAdapter, TrainingEvent
from service.worker.actions import (
    Action,
    Chunk,
    Copy,
    Decode,
    Idle,
    Join,
    LookUp,
    Prefill,
    ReadScores,
    Row,
    RowKey,
    Search,
    Spread,
    Train,
)
from service.worker.adapter_desk import NO_ADAPTER, AdapterDesk
from service.worker.adapter_store import AdapterStore
from service.worker.admission import Admission, AdmittedRequest
from service.worker.completion import Completion
from service.worker.loop_status import LoopStatus
from service.worker.pace import Pace
from service.worker.paused_prefill import PausedPrefill
from service.worker.rest import Rest
from service.worker.scheduler import PrefillLimits, Scheduler
from service.worker.score_desk import ScoreDesk
from service.worker.score_request import ScoreRequest
from service.worker.search import SearchRun
from service.worker.training_turns import TrainingArrival, TrainingTurns
from service.worker.work_done import WorkDone

log = logging.getLogger(__name__)

Arrival = AdmittedRequest | ScoreRequest | Cancel | ForgetAdapter | TrainingArrival
# Bounds how late a deadline is noticed while nothing else happens.
_IDLE_WAIT_SECONDS = 0.2


class _Unread(NamedTuple):
    """A dispatch that was started, and whose rows are in it."""

    dispatch: Dispatch
    completions: Sequence[Completion]


class Loop:
    """Runs admitted requests on an engine.

    Args:
        engine: Called from this thread only.
        admission: Told when a row leaves the queue.
        arrivals: Filled by the reader.
        send: Takes the events of one turn.
        status: Read by the heartbeat.
        pace: How long a turn may take.
        adapters: None: there are none.
        training: None: nothing trains.
        work: Counts tokens, of training too.
    """

    def __init__(
        self,
        engine: AttributionEngine,
        admission: Admission,
        arrivals: "queue.SimpleQueue[Arrival]",
        send: Callable[[list[Event | TrainingEvent]], None],
        status: LoopStatus,
        pace: Pace | None = None,
        adapters: AdapterDesk | None = None,
        training: TrainingTurns | None = None,
        work: WorkDone | None = None,
    ) -> None:
        self._engine = engine
        self._adapters = adapters or AdapterDesk(engine, AdapterStore())
        self._training = training or TrainingTurns()
        self._admission = admission
        self._arrivals = arrivals
        self._send = send
        self._status = status
        info = engine.info
        limits = PrefillLimits(
            info.chunk_tokens,
            info.packed_tokens,
            info.packed_prompts,
            info.joined_tokens,
            info.joined_rows,
        )
        self._scheduler = Scheduler(info.num_slots, limits, keeps_prefixes=info.keeps_prefixes)
        self._pace = pace or Pace()
        self._work = work or WorkDone(info.buckets)
        self._prefill = PausedPrefill(engine)
        self._rest = Rest(give_back_freed_memory)
        self._scores = ScoreDesk(engine, admission, self._work, self._adapters)
        self._unread: _Unread | None = None
        self._requests: dict[str, AdmittedRequest] = {}
        self._completions: dict[RowKey, Completion] = {}
        self._searches: dict[RowKey, SearchRun] = {}
        self._events: list[Event | TrainingEvent] = []

    def run(self) -> None:
        """Turns for ever; the process ends when the reader sees the API process go."""
        while True:
            self.turn()

    def turn(self) -> None:
        """One turn; see the module."""
        self._take_arrivals()
        self._end_expired(time.monotonic())
        self._training.retry()
        self._scheduler.has_scores = self._scores.has_work
        self._scheduler.has_training = self._training.has_work
        if self._scheduler.is_pressed:
            # What is read may end rows, so before it is said who is next.
            self._read()
        self._adapters.begin_round(None)
        for row in self._scheduler.start_waiting(lambda row: self._adapters.claim(row.adapter)):
            self._start(row)
        self._scheduler.is_training_due = self._training.is_due
        action = self._scheduler.next_action()
        # Not by what admission counts: it also counts what has not been taken in yet.
        self._status.num_running = sum(
            request.started_at is not None for request in self._requests.values()
        )
        self._status.num_scoring = self._scores.num_running
        if not isinstance(action, Idle):
            self._status.enter("step")
        began, has_others = time.monotonic(), self._scheduler.has_others
        self._do(action)
        self._training.note_turn(action, time.monotonic() - began, has_others=has_others)
        self._status.work = self._work.counts
        self._status.adapters = self._adapters.counts
        self._status.training_seconds = self._training.seconds
        self._flush()

    def _do(self, action: Action) -> None:
        match action:
            case LookUp():
                self._look_up(action)
            case Prefill():
                self._go_on_prefilling(action)
            case Join():
                self._join(action)
            case Copy():
                self._copy(action)
            case Spread():
                self._spread(action)
            case Decode():
                self._decode(action)
            case Search():
                self._search(action)
            case ReadScores():
                self._read_scores()
            case Train():
                self._train()
            case Idle():
                self._read()

    def _take_arrivals(self) -> None:
        """Everything that has arrived; waits a moment if there is nothing else to do."""
        if not (self._requests or self._scores.has_work or self._training.has_work):
            self._status.enter("idle")
            try:
                self._take(self._arrivals.get(timeout=_IDLE_WAIT_SECONDS))
            except queue.Empty:
                self._rest.note_idle(time.monotonic())
                return
        self._rest.note_work()
        while not self._arrivals.empty():
            self._take(self._arrivals.get())

    def _take(self, arrival: Arrival) -> None:
        if isinstance(arrival, Cancel):
            self._read()
            if request := self._requests.get(arrival.request_id):
                self._cut(request, "cancelled")
            self._events += self._scores.cancel(arrival.request_id)
            return
        if isinstance(arrival, ScoreRequest):
            self._scores.submit(arrival)
        elif isinstance(arrival, AdmittedRequest):
            self._submit(arrival)
        elif isinstance(arrival, ForgetAdapter):
            self._adapters.drop_forgotten(arrival.digest)
        else:
            self._events += self._training.take(arrival)

    def _submit(self, arrival: AdmittedRequest) -> None:
        self._requests[arrival.request_id] = arrival
        self._adapters.hold(arrival.adapter)
        for completion in arrival.completions:
            self._completions[completion.row.key] = completion
        for search in arrival.searches:
            self._searches[search.row.key] = search
        self._scheduler.submit(arrival.rows)

    def _end_expired(self, now: float) -> None:
        self._events += self._scores.end_expired(now)
        if not any(request.deadline <= now for request in self._requests.values()):
            return
        # What was drawn in time counts.
        self._read()
        for request in [each for each in self._requests.values() if each.deadline <= now]:
            if not request.has_tokens:
                detail = "The time of the request passed before anything was generated."
                self._fail(request, "deadline_exceeded", detail)
            else:
                self._cut(request, "timeout")

    def _start(self, row: Row) -> None:
        """An output got its slot, or a search all of its own."""
        request = self._requests.get(row.key.request_id)
        if request is None:
            return  # it ended with a row that started before this one
        assert row.slot is not None
        self._admission.started(row.key)
        try:
            row.adapter_slot = self._adapters.slot(row.adapter)
        except ModelError as error:
            log.error("%s", error)
            self._fail(request, *NO_ADAPTER)
            return
        if request.started_at is None:
            request.started_at = time.monotonic()
        if search := self._searches.get(row.key):
            search.begin(self._engine)
        else:
            self._engine.begin(row.slot, self._completions[row.key].prompt)

    def _prompted(self, row: Row) -> Completion | SearchRun:
        """Whoever has the prompt that this row prefills."""
        return self._searches.get(row.key) or self._completions[row.key]

    def _look_up(self, action: LookUp) -> None:
        row = action.row
        assert row.slot is not None
        num_blocks = self._engine.restore(row.slot, self._prompted(row).prefix_keys)
        self._scheduler.record_look_up(row, num_blocks)
        self._requests[row.key.request_id].note_cached(row)

    def _go_on_prefilling(self, action: Prefill) -> None:
        """Part of a chunk. A dispatch of the others follows, so it is as long as they can bear."""
        is_accompanied = self._scheduler.num_decoding > 0
        until = time.monotonic() + self._pace.prefill_seconds(is_accompanied=is_accompanied)
        chunks = [self._prompt_chunk(chunk) for chunk in action.chunks]
        if self._prefill.run(action, chunks, until):
            self._work.note_prefill(sum(chunk.end - chunk.start for chunk in action.chunks))
            self._note_prefilled(action)

    def _prompt_chunk(self, chunk: Chunk) -> PromptChunk:
        row = chunk.row
        assert row.slot is not None
        prompted = self._prompted(row)
        token_ids = prompted.prompt[chunk.start : chunk.end]
        touches = prompted.interventions.touches(chunk.start, chunk.end)
        return PromptChunk(row.slot, token_ids, chunk.start, touches, row.adapter_slot)

    def _note_prefilled(self, action: Prefill | Join) -> None:
        """Keeps the blocks that are whole now."""
        self._scheduler.record_prefill(action)
        for chunk in action.chunks:
            prefix_keys = self._prompted(chunk.row).prefix_keys
            num_blocks, rest = divmod(chunk.end, self._engine.info.chunk_tokens)
            if rest == 0 and num_blocks <= len(prefix_keys):
                assert chunk.row.slot is not None
                self._engine.keep(chunk.row.slot, prefix_keys[:num_blocks])

    def _join(self, action: Join) -> None:
        """As `_decode`, with a part of prompts in the same dispatch."""
        completions = self._unfinished(action.rows)
        if not completions:
            self._read()
            return
        chunks = [self._prompt_chunk(chunk) for chunk in action.chunks]
        rows = [completion.decode_row(1) for completion in completions]
        dispatch = self._engine.join(chunks, rows)
        num_tokens = sum(chunk.end - chunk.start for chunk in action.chunks)
        self._work.note_join(num_tokens, len(rows))
        self._read()
        self._flush()
        dispatch.wait()
        self._note_prefilled(action)
        self._unread = _Unread(dispatch, completions)
        self._read()

    def _copy(self, action: Copy) -> None:
        slots = []
        for row in (action.source, *action.targets):
            assert row.slot is not None
            slots.append(row.slot)
        source, *targets = slots
        self._engine.copy(source, targets, action.source.num_prefill_tokens)
        self._scheduler.record_copy(action)

    def _spread(self, action: Spread) -> None:
        source, *targets = action.row.slots
        self._engine.copy(source, targets, action.row.num_prefill_tokens)
        self._scheduler.record_spread(action)

    def _read_scores(self) -> None:
        """A step of the others follows, so it is shorter than one."""
        self._flush()
        is_accompanied = self._scheduler.num_decoding > 0
        until = time.monotonic() + self._pace.score_seconds(is_accompanied=is_accompanied)
        self._events += self._scores.step(until, is_accompanied=is_accompanied)

    def _train(self) -> None:
        """A step of the others follows."""
        self._flush()
        self._events += self._training.train(
            self._pace,
            has_others=self._scheduler.has_others,
            is_accompanied=self._scheduler.num_decoding > 0,
        )

    def _search(self, action: Search) -> None:
        search = self._searches[action.row.key]
        request = self._requests[action.row.key.request_id]
        pieces = search.step(self._engine)
        if pieces is None:
            self._fail_numerically(request)
            return
        self._send_found(request, pieces)
        if search.ends is not None:
            self._leave(search.row)
            search.close(self._engine)
            self._finish_if_done(request)

    def _send_found(self, request: AdmittedRequest, pieces: list[Piece]) -> None:
        if any(piece.token_ids for piece in pieces):
            request.first_token_at = request.first_token_at or time.monotonic()
        self._events.extend(pieces)

    def _decode(self, action: Decode) -> None:
        """Starts a dispatch, reads the one before, and waits until the new one is done."""
        completions = self._unfinished(action.rows)
        if not completions:
            self._read()
            return
        is_pressed = self._scheduler.is_pressed
        if is_pressed or any(completion.may_be_stopping for completion in completions):
            num_steps = 1
        else:
            num_steps = self._pace.num_steps(max(each.num_steps_left for each in completions))
        began = time.monotonic()
        rows = [completion.decode_row(num_steps) for completion in completions]
        dispatch = self._engine.decode(rows, num_steps)
        self._work.note_decode(len(rows), num_steps)
        self._read()
        self._flush()
        dispatch.wait()
        self._pace.note_steps(num_steps, time.monotonic() - began)
        self._unread = _Unread(dispatch, completions)
        is_last = all(completion.num_steps_left == 0 for completion in completions)
        if is_pressed or is_last:
            # Somebody waits for a slot that may be free now, or nothing would hide the reading.
            self._read()

    def _unfinished(self, rows: Sequence[Row]) -> list[Completion]:
        """Outputs that have steps to make that have not been started."""
        completions = [self._completions[row.key] for row in rows]
        return [each for each in completions if each.num_steps_left > 0]

    def _read(self) -> None:
        """Takes in what the last dispatch drew, if that has not been done."""
        if self._unread is None:
            return
        (dispatch, completions), self._unread = self._unread, None
        now = time.monotonic()
        for completion, tokens in zip(completions, dispatch.tokens(), strict=True):
            if completion.end is None and tokens:
                self._take_tokens(completion, tokens, now)
        for request_id in {completion.row.key.request_id for completion in completions}:
            if request := self._requests.get(request_id):
                self._finish_if_done(request)

    def _take_tokens(
        self, completion: Completion, tokens: Sequence[SampledToken], now: float
    ) -> None:
        request = self._requests.get(completion.row.key.request_id)
        if request is None:
            return  # it failed or was cancelled after the dispatch began
        finite = [token for token in tokens if token.is_finite]
        if finite:
            request.first_token_at = request.first_token_at or now
            step = completion.take(finite)
            self._events.append(step.piece)
            if step.end is not None:
                self._leave(completion.row)
                return
        if len(finite) < len(tokens):
            self._fail_numerically(request)

    def _cut(self, request: AdmittedRequest, reason: FinishReason) -> None:
        """Ends every output that still runs; what was generated stands."""
        self._events.extend(
            completion.cut(reason) for completion in request.completions if completion.end is None
        )
        for search in request.searches:
            if search.ends is None:
                self._send_found(request, search.cut(reason))
        self._finish_if_done(request)

    def _finish_if_done(self, request: AdmittedRequest) -> None:
        outputs = request.ends
        if outputs is None:
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
        num_cached = sum(request.num_cached_tokens.values())
        self._events.append(Finished(request.request_id, outputs, timings, num_cached))

    def _fail(self, request: AdmittedRequest, code: str, detail: str) -> None:
        self._forget(request)
        self._events.append(Failed(request.request_id, code, detail))

    def _fail_numerically(self, request: AdmittedRequest) -> None:
        self._fail(request, "numerical", "The model produced a value that is not a number.")

    def _forget(self, request: AdmittedRequest) -> None:
        """Gives back everything that the request holds."""
        del self._requests[request.request_id]
        for row in request.rows:
            self._leave(row)
            self._admission.started(row.key)
            self._completions.pop(row.key, None)
            if search := self._searches.pop(row.key, None):
                search.close(self._engine)
        self._adapters.let_go(request.adapter)

    def _leave(self, row: Row) -> None:
        """Gives back the slot of a row, and its adapter's, if it has them. May be called twice."""
        if row.slot is not None:
            self._adapters.release(row.adapter)
        self._scheduler.remove(row)

    def _flush(self) -> None:
        if self._events:
            self._send(self._events)
            self._events = []
