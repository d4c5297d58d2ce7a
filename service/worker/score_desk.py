"""Scores on an engine, a part at a time: what the loop does when it is their turn.

A part is some layers of a chunk, or the head over places that were read. Places wait for the head
until they fill it, or nothing else is to be read, or their request was read to its end and two
chunks since they were; so a score of a few tokens shares it with others, and waits for none of them
long.

Attributions (`service.worker.attribution_desk`) and all of this take turns.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence

from model.attribution_questions import AttributionEngine
from model.errors import ModelError
from model.intervention_slots import Captured
from model.score_slots import SCORE_SLOTS, AskedPlace, PlaceScore, Residual, ScoreChunk
from service.protocol.messages import Event, Failed
from service.worker.adapter_desk import NO_ADAPTER, AdapterDesk
from service.worker.admission import Admission
from service.worker.attribution_desk import AttributionDesk
from service.worker.attribution_jobs import AttributionJob
from service.worker.paused_prefill import run_until
from service.worker.scheduler import PrefillLimits
from service.worker.score_line import Passage, PlacedPiece, Reading, ScoreLine, ScorePiece
from service.worker.score_places import WaitingPlace, WaitingPlaces
from service.worker.score_request import ScoreRequest
from service.worker.work_done import WorkDone

log = logging.getLogger(__name__)

_NOT_FINITE = "The model produced a value that is not a number."


class ScoreDesk:
    """All requests of scores of one worker.

    Args:
        engine: Does the work.
        admission: Told when a passage leaves the queue.
        work: Counts tokens.
        adapters: Of the worker.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        engine: AttributionEngine,
        admission: Admission,
        work: WorkDone,
        adapters: AdapterDesk,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        info = engine.info
        limits = PrefillLimits(info.chunk_tokens, info.packed_tokens, info.packed_prompts)
        self._engine = engine
        self._admission = admission
        self._work = work
        self._adapters = adapters
        self._clock = clock
        self._line = ScoreLine(
            *(SCORE_SLOTS, limits),
            lambda digests: adapters.claim_all(digests, self),
            adapters.release_all,
        )
        self._requests: dict[str, ScoreRequest] = {}
        self._places = WaitingPlaces(info.head_places)
        self._reading: Reading | None = None
        self._layers: Iterator[None] = iter(())
        self._residuals: list[Residual] = []
        # Of each piece that is being read; its request may end meanwhile.
        self._num_captures: list[int] = []
        self._num_chunks = 0
        self._head_places = info.head_places
        self._head_places_of_step = info.head_places_of_step
        self._attributions = AttributionDesk(engine, admission, work, clock)
        self._was_attribution_turn = True

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Requests of which something has been read."""
        return sum(request.started_at is not None for request in self._requests.values())

    def submit(self, request: ScoreRequest) -> None:
        """Lets a request wait for its turn."""
        self._requests[request.request_id] = request
        self._adapters.hold_all(request.adapters)
        self._line.submit(request.passages)
        self._attributions.submit(request.attributions)

    def cancel(self, request_id: str) -> list[Event]:
        """Ends a request, if it is one of scores that goes on."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        return [self._fail(request, "request_cancelled", "The request was cancelled.")]

    def end_expired(self, now: float) -> list[Event]:
        """Ends the requests whose time has passed."""
        detail = "The time of the request passed before everything was scored."
        expired = [request for request in self._requests.values() if request.deadline <= now]
        return [self._fail(request, "deadline_exceeded", detail) for request in expired]

    def step(self, until: float, *, is_accompanied: bool) -> list[Event]:
        """One part of the work, up to about ``until`` (monotonic seconds); how requests ended.

        Accompanied by rows that decode, the head takes no longer than a step.
        """
        head_places = self._head_places_of_step if is_accompanied else self._head_places
        has_texts = bool(self._places) or self._reading is not None or self._line.has_work
        is_turn = not (has_texts and self._was_attribution_turn)
        self._was_attribution_turn = self._attributions.has_work and is_turn
        if self._was_attribution_turn:
            return self._end_attribution(self._attributions.step(until))
        if self._is_head_due():
            return self._measure(head_places)
        events: list[Event] = []
        if self._reading is None:
            events = self._begin_reading()
        if self._reading is None:
            # Adapters are awaited that others use; the head need not wait for them as well.
            return events + (self._measure(head_places) if self._places else [])
        if run_until(self._layers, until, self._clock):
            return events + self._take_residuals()
        return events

    def _is_head_due(self) -> bool:
        is_more_coming = self._reading is not None or self._line.has_work
        return self._places.are_due(self._num_chunks, is_more_coming=is_more_coming)

    def _begin_reading(self) -> list[Event]:
        """Begins with what is next; nothing may be. Requests end whose adapter is gone."""
        now = self._clock()
        pieces: list[PlacedPiece] = []
        chunks: list[ScoreChunk] = []
        num_captures: list[int] = []
        events: list[Event] = []
        self._adapters.begin_round(self)
        for placed in self._line.next_reading().pieces:
            passage, slot, piece = placed
            request = self._requests.get(passage.key.request_id)
            if request is None:
                continue  # it ended with another passage of this chunk
            try:
                adapter = self._adapters.slot(passage.adapter)
            except ModelError as error:
                log.error("%s", error)
                events.append(self._fail(request, *NO_ADAPTER))
                continue
            if passage.num_read == 0:
                self._admission.started(passage.key)
                request.started_at = request.started_at or now
            request = self._requests[passage.key.request_id]
            wanted = tuple(asked.place for asked in piece.asked)
            touches, captures = request.touches(piece), request.captures(piece)
            chunks.append(
                ScoreChunk(
                    *(slot, piece.token_ids, piece.start, wanted),
                    *(touches, captures, adapter),
                )
            )
            pieces.append(placed)
            num_captures.append(len(captures))
        if pieces:
            self._num_captures = num_captures
            self._reading = Reading(tuple(pieces))
            self._layers = self._read(self._engine.read(chunks))
        return events

    def _read(self, reading: Generator[None, None, list[Residual]]) -> Iterator[None]:
        self._residuals = yield from reading

    def _take_residuals(self) -> list[Event]:
        reading, self._reading = self._reading, None
        assert reading is not None, "something was read"
        self._line.record_reading(reading)
        self._num_chunks += 1
        self._work.note_score(sum(len(placed.piece.token_ids) for placed in reading.pieces))
        residuals = iter(self._residuals)
        events: list[Event] = []
        for (passage, _, piece), count in zip(reading.pieces, self._num_captures, strict=True):
            request = self._requests.get(passage.key.request_id)
            for asked in piece.asked:
                residual = next(residuals)
                # It may have ended meanwhile.
                if request is not None:
                    self._places.add(
                        *(request, passage.version, asked, residual), read_at=self._num_chunks
                    )
            captured = [next(residuals) for _ in range(count)]
            if request is not None and captured:
                events += self._take_captured(request, passage, piece, captured)
        return events

    def _take_captured(
        self,
        request: ScoreRequest,
        passage: Passage,
        piece: ScorePiece,
        captured: Sequence[Captured],
    ) -> list[Event]:
        if not all(each.is_finite for each in captured):
            return [self._fail(request, "numerical", _NOT_FINITE)]
        request.take_captured(passage.version, piece, captured)
        return self._end_if_done(request)

    def _end_if_done(self, request: ScoreRequest) -> list[Event]:
        if not request.is_done:
            return []
        self._forget(request)
        return [request.scored(self._clock())]

    def _measure(self, most_rows: int) -> list[Event]:
        """The places that waited longest, of no more rows than these."""
        places = self._places.pop_together(most_rows)
        asked: list[AskedPlace] = []
        for place in places:
            asked += place.asked(len(asked))
        answers = iter(self._engine.measure(asked))
        events: list[Event] = []
        for place in places:
            found = [next(answers) for _ in place.residuals]
            if place.request.request_id in self._requests:
                events += self._take(place, found)
        return events

    def _end_attribution(self, job: AttributionJob | None) -> list[Event]:
        if job is None:
            return []
        assert job.answer is not None, "it has ended"
        request = self._requests[job.key.request_id]
        return self._go_on(request, is_finite=job.answer.is_finite)

    def _take(self, place: WaitingPlace, found: Sequence[PlaceScore]) -> list[Event]:
        """What each version was found to expect at a place."""
        request = place.request
        if not all(answer.is_finite for answer in found):
            return self._go_on(request, is_finite=False)
        for version, answer in enumerate(found):
            each = zip(answer.logprobs, answer.ranks, strict=True)
            numbers = dict(zip(place.token_ids, each, strict=True))
            for token in place.tokens:
                request.take(version, token, *numbers[token.token_id], answer)
        return self._go_on(request, is_finite=True)

    def _go_on(self, request: ScoreRequest, *, is_finite: bool) -> list[Event]:
        """How a request ended, if something that was found for it ends it."""
        if not is_finite:
            return [self._fail(request, "numerical", _NOT_FINITE)]
        return self._end_if_done(request)

    def _fail(self, request: ScoreRequest, code: str, detail: str) -> Event:
        self._forget(request)
        return Failed(request.request_id, code, detail)

    def _forget(self, request: ScoreRequest) -> None:
        """Gives back everything that the request holds."""
        del self._requests[request.request_id]
        for passage in request.passages:
            self._line.remove(passage)
            self._admission.started(passage.key)
        for job in request.attributions:
            self._attributions.remove(job)
            self._admission.started(job.key)
        self._adapters.let_go_all(request.adapters)
        if not self._line.has_work:
            # Nobody is left who would wait for a slot of the bank.
            self._adapters.begin_round(self)
        self._places.remove(request)
        if not self._requests:
            # Nobody is left who would want what is being read.
            self._reading, self._layers = None, iter(())
