"""One request of scores on its way: what it asked, and what was found so far."""

import struct
from collections.abc import Sequence

from model.attribution_questions import AttributionQuestion
from model.intervention_slots import Capture, Captured, Touch
from model.score_slots import PlaceScore
from model.slots import TextCodec
from service.protocol.messages import (
    CapturedStream,
    InputAttribution,
    InputScore,
    Score,
    Scored,
    TargetScore,
    Timings,
    TokenAttribution,
    TokenLogprob,
    TokenScore,
)
from service.worker.actions import RowKey
from service.worker.attribution_jobs import AttributionJob
from service.worker.interventions import intervention_of
from service.worker.score_inputs import PlannedCapture, PlannedInput, PlannedTarget
from service.worker.score_line import Marked, Passage, ScorePiece, TargetToken
from service.worker.translate import token_logprob


class ScoreRequest:
    """A request that will end in one terminal event.

    Args:
        command: What was asked.
        inputs: Its inputs, planned.
        questions: Of attribution, one for each input, or none.
        codec: Of the engine.
        admitted_at: Monotonic seconds.
    """

    def __init__(
        self,
        command: Score,
        inputs: Sequence[PlannedInput],
        questions: Sequence[AttributionQuestion],
        codec: TextCodec,
        admitted_at: float,
    ) -> None:
        self.request_id = command.request_id
        self.deadline = command.deadline
        self.adapter = command.adapter
        self.num_top = command.num_top
        self.wants_logits = command.tells_logits
        self.started_at: float | None = None
        pieces = [each for given in inputs for each in given.passages]
        self.passages = [
            Passage(
                *(RowKey(command.request_id, number), each, command.tenant, command.priority),
                adapter=command.adapter,
            )
            for number, each in enumerate(pieces)
        ]
        self.attributions = [
            AttributionJob(
                RowKey(command.request_id, number), each, command.tenant, command.priority
            )
            for number, each in enumerate(questions, start=len(self.passages))
        ]
        self._inputs = inputs
        self._codec = codec
        self._admitted_at = admitted_at
        self._tells_tokens = command.tells_tokens
        self._found: dict[TargetToken, TokenScore] = {}
        # Of the one target, if they are wanted.
        self._logits: dict[int, bytes] = {}
        self._num_missing = sum(len(t.token_ids) for given in inputs for t in given.targets)
        self._interventions = [intervention_of(each) for each in command.interventions]
        self._captures = command.captures
        # Input, target, number of the capture, layer -> the numbers of its positions, in order.
        self._captured: dict[tuple[int, int, int, int], list[bytes]] = {}
        self._num_missing_captures = sum(
            len(each.positions) * len(command.captures[each.number].layers)
            for given in inputs
            for each in given.captures
        )

    @property
    def is_done(self) -> bool:
        """Whether everything that it asked is known."""
        num_missing = self._num_missing + self._num_missing_captures
        return num_missing == 0 and all(each.answer for each in self.attributions)

    def touches(self, piece: ScorePiece) -> tuple[Touch, ...]:
        """Interventions in one of its pieces."""
        return tuple(Touch(self._interventions[m.number], m.places) for m in piece.touched)

    def captures(self, piece: ScorePiece) -> tuple[Capture, ...]:
        """What is captured of one of its pieces."""
        return tuple(
            Capture(layer, marked.places, self._captures[marked.number].is_half)
            for marked, layer in self._captured_parts(piece)
        )

    def _captured_parts(self, piece: ScorePiece) -> list[tuple[Marked, int]]:
        return [(m, layer) for m in piece.captured for layer in self._captures[m.number].layers]

    def take_captured(self, piece: ScorePiece, found: Sequence[Captured]) -> None:
        """What was captured of a piece; those of one text come in its order."""
        for (marked, layer), each in zip(self._captured_parts(piece), found, strict=True):
            for target in marked.targets:
                numbers = self._captured.setdefault((*target, marked.number, layer), [])
                numbers.append(each.numbers)
                self._num_missing_captures -= len(marked.places)

    def take(self, asked: TargetToken, logprob: float, rank: int, place: PlaceScore) -> None:
        """What was found for one token, and at its place."""
        assert asked not in self._found, "found twice"
        target = self._inputs[asked.input_index].targets[asked.target_index]
        told = self._tells_tokens
        self._found[asked] = TokenScore(
            token=self._token(asked.token_id, logprob, is_told=told),
            position=target.positions[asked.token_index],
            rank=rank,
            top=tuple(self._token(id_, each, is_told=told) for id_, each in place.top),
        )
        if self.wants_logits:
            self._logits[asked.token_index] = place.logits
        self._num_missing -= 1

    def scored(self, now: float) -> Scored:
        """The event that ends it."""
        started_at = now if self.started_at is None else self.started_at
        inputs = tuple(
            InputScore(
                given.num_prompt_tokens,
                tuple(
                    self._target(index, number, target)
                    for number, target in enumerate(given.targets)
                ),
                b"".join(self._logits[place] for place in sorted(self._logits)),
                tuple(stream for each in given.captures for stream in self._streams(index, each)),
                self._attribution(self.attributions[index]) if self.attributions else None,
            )
            for index, given in enumerate(self._inputs)
        )
        timings = Timings(
            queue_seconds=started_at - self._admitted_at,
            first_token_seconds=None,
            total_seconds=now - self._admitted_at,
        )
        return Scored(self.request_id, inputs, timings)

    def _streams(self, index: int, planned: PlannedCapture) -> list[CapturedStream]:
        capture = self._captures[planned.number]
        return [
            CapturedStream(
                planned.target_index,
                layer,
                planned.positions,
                capture.is_half,
                b"".join(
                    self._captured.get((index, planned.target_index, planned.number, layer), ())
                ),
            )
            for layer in capture.layers
        ]

    def _target(self, index: int, number: int, target: PlannedTarget) -> TargetScore:
        tokens = tuple(
            self._found[TargetToken(index, number, place, token_id)]
            for place, token_id in enumerate(target.token_ids)
        )
        return TargetScore(
            logprob=sum(each.token.logprob for each in tokens),
            is_greedy=all(each.rank == 0 for each in tokens),
            num_tokens=len(tokens),
            num_bytes=target.num_bytes,
            tokens=tokens if self._tells_tokens else (),
        )

    def _attribution(self, job: AttributionJob) -> InputAttribution:
        question, answer = job.question, job.answer
        assert answer is not None, "it is done"
        count, error = question.num_told, answer.completeness_error
        if question.reduction == "none":
            return InputAttribution(count, (), answer.numbers, error)
        scores = struct.unpack(f"<{count}f", answer.numbers)
        token_ids = question.texts[0].token_ids[:count]
        tokens = tuple(
            TokenAttribution(token_id, self._codec.piece(token_id), score)
            for token_id, score in zip(token_ids, scores, strict=True)
        )
        return InputAttribution(count, tokens, b"", error)

    def _token(self, token_id: int, logprob: float, *, is_told: bool) -> TokenLogprob:
        if not is_told:
            return TokenLogprob(token_id, "", (), logprob)
        return token_logprob(token_id, logprob, self._codec)
