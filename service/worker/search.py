"""A search on its way: one prompt, several slots, and outputs that are known only at its end.

It has a row of its own in the scheduler, which gives it all its slots at once. A step of it is a
dispatch of its own. A beam whose text has ended is done: it keeps its place by its log-probability,
and the search ends when all beams are done, as all are at ``max_tokens``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from model.search_slots import Beam, BeamStep, CandidateStep, SearchEngine, SearchRules
from model.slots import SampledToken
from service.protocol.messages import FinishReason, OutputEnd, Piece
from service.worker.actions import Row
from service.worker.completion import Completion
from service.worker.interventions import PromptInterventions


class SearchRun(Protocol):
    """What the loop knows of one."""

    row: Row
    prompt: tuple[int, ...]
    # One for each output, likeliest first; None until the search has ended.
    ends: tuple[OutputEnd, ...] | None

    prefix_keys: tuple[bytes, ...]
    interventions: PromptInterventions

    @property
    def has_tokens(self) -> bool:
        """Whether a step found something, so that a cut leaves it."""

    def begin(self, engine: SearchEngine) -> None:
        """The row has its slots, and its prompt comes next."""

    def step(self, engine: SearchEngine) -> list[Piece] | None:
        """One step: everything that is to be sent if the search has ended, else nothing.

        None if the model produced a value that is not a number.
        """

    def cut(self, reason: FinishReason) -> list[Piece]:
        """Ends the search from outside, with what it has."""

    def close(self, engine: SearchEngine) -> None:
        """Frees what the engine keeps for it. May be called twice."""


@dataclass(frozen=True, slots=True)
class _Hypothesis:
    """One continuation, with the pieces that it would have sent."""

    completion: Completion
    pieces: tuple[Piece, ...]

    def outcome(self, output: int) -> tuple[Piece, OutputEnd]:
        """All pieces as one, of the given output, and how it ended."""
        assert self.completion.end is not None, "a search with an output that goes on"
        piece = Piece(
            request_id=self.completion.row.key.request_id,
            output=output,
            token_ids=tuple(id_ for piece in self.pieces for id_ in piece.token_ids),
            text="".join(piece.text for piece in self.pieces),
            logprobs=tuple(entry for piece in self.pieces for entry in piece.logprobs),
        )
        return piece, self.completion.end

    def fork(self) -> "_Hypothesis":
        return _Hypothesis(self.completion.fork(), self.pieces)

    def take(self, token: SampledToken) -> "_Hypothesis":
        return _Hypothesis(self.completion, (*self.pieces, self.completion.take([token]).piece))

    def cut(self, reason: FinishReason) -> "_Hypothesis":
        """Ended, if it was not."""
        if self.completion.end is not None:
            return self
        piece = self.completion.cut(reason)
        return _Hypothesis(self.completion, (*self.pieces, piece))


class BeamRun:
    """The likeliest continuations of one prompt, followed side by side.

    Args:
        completion: Of the prompt, with no token yet; its row has a slot for each beam.
        num_choices: Outputs: the best of the beams.
        rules: But for what is banned.
    """

    def __init__(self, completion: Completion, num_choices: int, rules: SearchRules) -> None:
        self.row = completion.row
        self.prefix_keys = completion.prefix_keys
        self.interventions = completion.interventions
        self.ends: tuple[OutputEnd, ...] | None = None
        self._num_outputs = num_choices
        self.prompt = completion.prompt
        self._rules = rules
        self._num_steps = 0
        self._hypotheses = [_Hypothesis(completion, ())]
        self._beams: list[Beam] = []

    @property
    def has_tokens(self) -> bool:
        return self._num_steps > 0

    def begin(self, engine: SearchEngine) -> None:
        slots = self.row.slots
        self._beams = [Beam(slots[0], self.prompt[-1], 0.0)]

    def step(self, engine: SearchEngine) -> list[Piece] | None:
        live = next(each.completion for each in self._hypotheses if each.completion.end is None)
        assert self._beams, "a step before its slots"
        position = len(self.prompt) - 1 + self._num_steps
        extensions = engine.step_beams(
            BeamStep(
                slots=self.row.slots,
                beams=tuple(self._beams),
                position=position,
                num_shared_tokens=len(self.prompt) - 1,
                rules=replace(
                    self._rules,
                    banned_ids=live.banned_ids(self._num_steps),
                    interventions=self.interventions.due(position, len(self.prompt)),
                ),
                adapter=self.row.adapter_slot,
            )
        )
        if not extensions:
            return None
        self._num_steps += 1
        hypotheses, self._beams = [], []
        for extension in extensions:
            hypothesis = self._hypotheses[extension.source]
            if extension.token is not None:
                hypothesis = hypothesis.fork().take(extension.token)
            hypotheses.append(hypothesis)
            is_done = hypothesis.completion.end is not None
            self._beams.append(replace(extension.beam, is_done=is_done))
        self._hypotheses = hypotheses
        return self._end() if all(beam.is_done for beam in self._beams) else []

    def cut(self, reason: FinishReason) -> list[Piece]:
        best = self._hypotheses[: self._num_outputs]
        # Before the first step there is one, and it is empty.
        best += [best[0].fork() for _ in range(self._num_outputs - len(best))]
        self._hypotheses = [each.cut(reason) for each in best]
        return self._end()

    def _end(self) -> list[Piece]:
        pieces, self.ends = _outcomes(self._hypotheses[: self._num_outputs], self.row)
        return pieces

    def close(self, engine: SearchEngine) -> None:
        pass


class ContrastiveRun:
    """The continuation of one prompt that repeats itself least.

    Args:
        completion: Of the prompt, with no token yet; its row has a slot for each candidate.
        alpha: Weight of what is new.
        rules: But for what is banned.
    """

    def __init__(self, completion: Completion, alpha: float, rules: SearchRules) -> None:
        self.row = completion.row
        self.prefix_keys = completion.prefix_keys
        self.interventions = completion.interventions
        self.ends: tuple[OutputEnd, ...] | None = None
        self.prompt = completion.prompt
        self._hypothesis = _Hypothesis(completion, ())
        self._alpha = alpha
        self._rules = rules
        # The last prompt token, in every slot, finds the first candidates.
        self._token_ids = (completion.prompt[-1],) * self.row.num_slots
        self._probabilities = (1.0,) * self.row.num_slots
        self._candidates: Sequence[SampledToken] = ()
        self._num_steps = 0
        self._kept_slot: int | None = None

    @property
    def has_tokens(self) -> bool:
        return self._hypothesis.completion.num_tokens > 0

    def begin(self, engine: SearchEngine) -> None:
        self._kept_slot = self.row.slots[0]
        engine.keep_hidden(self._kept_slot)

    def step(self, engine: SearchEngine) -> list[Piece] | None:
        completion = self._hypothesis.completion
        position = len(self.prompt) - 1 + self._num_steps
        choice = engine.step_candidates(
            CandidateStep(
                slots=self.row.slots,
                token_ids=self._token_ids,
                probabilities=self._probabilities,
                position=position,
                alpha=self._alpha,
                rules=replace(
                    self._rules,
                    # Of the candidates that come of this step, one place behind those it tries.
                    banned_ids=completion.banned_ids(self._num_steps),
                    interventions=self.interventions.due(position, len(self.prompt)),
                ),
                adapter=self.row.adapter_slot,
            )
        )
        if choice is None:
            return None
        if self._candidates:
            self._hypothesis = self._hypothesis.take(self._candidates[choice.place])
        self._num_steps += 1
        self._candidates = choice.candidates
        self._token_ids = tuple(token.token_id for token in choice.candidates)
        self._probabilities = choice.probabilities
        return [] if completion.end is None else self._end()

    def cut(self, reason: FinishReason) -> list[Piece]:
        self._hypothesis = self._hypothesis.cut(reason)
        return self._end()

    def _end(self) -> list[Piece]:
        pieces, self.ends = _outcomes([self._hypothesis], self.row)
        return pieces

    def close(self, engine: SearchEngine) -> None:
        if self._kept_slot is not None:
            engine.drop_hidden(self._kept_slot)
            self._kept_slot = None


def _outcomes(
    hypotheses: Sequence[_Hypothesis], row: Row
) -> tuple[list[Piece], tuple[OutputEnd, ...]]:
    first = row.key.output
    outcomes = [each.outcome(first + place) for place, each in enumerate(hypotheses)]
    return [piece for piece, _ in outcomes], tuple(end for _, end in outcomes)
