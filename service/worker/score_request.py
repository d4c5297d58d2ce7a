"""One request of scores on its way: what it asked, and what was found so far."""

import itertools
import struct
from collections.abc import Iterator, Sequence

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
    TargetDivergence,
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
from service.worker.score_line import Asked, Marked, Passage, ScorePiece, TargetToken
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
        self.adapters = command.versions
        self.num_top = command.num_top
        self.wants_logits = command.tells_logits
        self.started_at: float | None = None
        pieces = [each for given in inputs for each in given.passages]
        versions = command.versions
        self.num_versions = len(versions)
        # A text under one version and then under the next, so that its places need not wait long.
        self.passages = [
            Passage(
                RowKey(command.request_id, number * len(versions) + version),
                *(each, command.tenant, command.priority),
                adapter=adapter,
                version=version,
                adapters=versions,
            )
            for number, each in enumerate(pieces)
            for version, adapter in enumerate(versions)
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
        self._found: dict[tuple[int, TargetToken], TokenScore] = {}
        # Of the one target, if they are wanted.
        self._logits: dict[tuple[int, int], bytes] = {}
        # Of each version but the first, where it expects a token.
        self._divergences: dict[tuple[int, TargetToken], float] = {}
        num_tokens = sum(len(t.token_ids) for given in inputs for t in given.targets)
        self._num_missing = num_tokens * len(versions)
        # Not read under all versions yet.
        self._num_unread = num_tokens
        self._interventions = [intervention_of(each) for each in command.interventions]
        self._captures = command.captures
        # Version, input, target, number of the capture, layer -> the numbers of its positions, in
        # order.
        self._captured: dict[tuple[int, int, int, int, int], list[bytes]] = {}
        self._num_missing_captures = len(versions) * sum(
            len(each.positions) * len(command.captures[each.number].layers)
            for given in inputs
            for each in given.captures
        )

    @property
    def is_done(self) -> bool:
        """Whether everything that it asked is known."""
        num_missing = self._num_missing + self._num_missing_captures
        return num_missing == 0 and all(each.answer for each in self.attributions)

    @property
    def is_read(self) -> bool:
        """Whether the head alone is missing."""
        return self._num_unread == 0

    def note_read(self, asked: Asked) -> None:
        """A place was read under every version."""
        self._num_unread -= len(asked.tokens)

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

    def take_captured(self, version: int, piece: ScorePiece, found: Sequence[Captured]) -> None:
        """What was captured of a piece; those of one text come in its order."""
        for (marked, layer), each in zip(self._captured_parts(piece), found, strict=True):
            for target in marked.targets:
                numbers = self._captured.setdefault((version, *target, marked.number, layer), [])
                numbers.append(each.numbers)
                self._num_missing_captures -= len(marked.places)

    def take(
        self, version: int, asked: TargetToken, logprob: float, rank: int, place: PlaceScore
    ) -> None:
        """What a version was found to expect of one token, and at its place."""
        assert (version, asked) not in self._found, "found twice"
        target = self._inputs[asked.input_index].targets[asked.target_index]
        told = self._tells_tokens
        self._found[version, asked] = TokenScore(
            token=self._token(asked.token_id, logprob, is_told=told),
            position=target.positions[asked.token_index],
            rank=rank,
            top=tuple(self._token(id_, each, is_told=told) for id_, each in place.top),
        )
        if self.wants_logits:
            self._logits[version, asked.token_index] = place.logits
        if place.divergence is not None:
            self._divergences[version, asked] = place.divergence
        self._num_missing -= 1

    def scored(self, now: float) -> Scored:
        """The event that ends it."""
        started_at = now if self.started_at is None else self.started_at
        inputs, *compared = map(self._scored_by, range(self.num_versions))
        timings = Timings(
            queue_seconds=started_at - self._admitted_at,
            first_token_seconds=None,
            total_seconds=now - self._admitted_at,
        )
        divergences = tuple(self._compared(version) for version in range(1, self.num_versions))
        return Scored(
            *(self.request_id, inputs, timings, tuple(compared)),
            tuple(itertools.chain.from_iterable(divergences)),
        )

    def _scored_by(self, version: int) -> tuple[InputScore, ...]:
        """Every input."""
        logits = [self._logits[key] for key in sorted(self._logits) if key[0] == version]
        return tuple(
            InputScore(
                given.num_prompt_tokens,
                tuple(
                    self._target(version, index, number, target)
                    for number, target in enumerate(given.targets)
                ),
                b"".join(logits),
                tuple(
                    stream
                    for each in given.captures
                    for stream in self._streams(version, index, each)
                ),
                self._attribution(self.attributions[index]) if self.attributions else None,
            )
            for index, given in enumerate(self._inputs)
        )

    def _compared(self, version: int) -> Iterator[TargetDivergence]:
        """A version with the first one, target by target."""
        for index, given in enumerate(self._inputs):
            for number, target in enumerate(given.targets):
                tokens = _tokens_of(index, number, target)
                found = tuple(self._divergences[version, each] for each in tokens)
                yield TargetDivergence(index, number, version, found)

    def _streams(self, version: int, index: int, planned: PlannedCapture) -> list[CapturedStream]:
        capture = self._captures[planned.number]
        return [
            CapturedStream(
                planned.target_index,
                layer,
                planned.positions,
                capture.is_half,
                b"".join(
                    self._captured.get(
                        (version, index, planned.target_index, planned.number, layer), ()
                    )
                ),
            )
            for layer in capture.layers
        ]

    def _target(self, version: int, index: int, number: int, target: PlannedTarget) -> TargetScore:
        tokens = tuple(self._found[version, each] for each in _tokens_of(index, number, target))
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


def _tokens_of(index: int, number: int, target: PlannedTarget) -> list[TargetToken]:
    return [
        TargetToken(index, number, place, token_id)
        for place, token_id in enumerate(target.token_ids)
    ]
