"""The part of `model.self_test` that is about searches. Two claims:

* a step of a search finds for a row what a decode step finds, to the last bit, and leaves the same
  keys and values;
* it gives a row the same bits alone and in any number of rows, at any place.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from model.errors import SelfTestFailed
from model.search_slots import Beam, BeamStep, CandidateStep, Choice, Extension, SearchRules
from model.self_test_report import REPORT, machine_of
from model.slots import MAX_LOGPROBS, EngineInfo, SampledToken

_RULES = SearchRules(num_logprobs=MAX_LOGPROBS)


@runtime_checkable
class SearchSubject(Protocol):
    """An engine that searches, and a look into its slots."""

    @property
    def info(self) -> EngineInfo: ...

    def keep_hidden(self, slot: int) -> None: ...

    def drop_hidden(self, slot: int) -> None: ...

    def step_beams(self, step: BeamStep) -> list[Extension]: ...

    def step_candidates(self, step: CandidateStep) -> Choice | None: ...

    def keys_and_values(
        self, slot: int, position: int
    ) -> Float32[np.ndarray, "arrays kv_heads head_dim"]: ...

    def search_rows(
        self, slots: Sequence[int], token_ids: Sequence[int], positions: Sequence[int]
    ) -> Float32[np.ndarray, "rows numbers"]:
        """Hidden state and logits of each row of a step of a search."""


def compare_searches(
    subject: SearchSubject,
    tokens: Sequence[tuple[int, int]],
    found: Sequence[SampledToken],
) -> int:
    """Tries both claims; returns how many rows were compared.

    Args:
        subject: Its slot i holds a prompt that ends at position p with token t, where ``tokens[i]``
            are p and t.
        tokens: One for each slot that is tried.
        found: What a decode step found there, with `MAX_LOGPROBS` alternatives.

    Raises:
        SelfTestFailed: Bits differ.
    """
    programs = subject.info.buckets["search_rows"]
    decoded = [
        _top_bits([token]) + _held_bits(subject, slot, position)
        for slot, (token, (position, _)) in enumerate(zip(found, tokens, strict=True))
    ]
    searched = [_beam_bits(subject, slot, *each) for slot, each in enumerate(tokens)]
    if searched != decoded or _candidate_bits(subject, 0, *tokens[0]) != decoded[0]:
        raise _failure(subject.info, "than a decode step gives it", programs[0])
    alone = [_row_bits(subject, [slot], tokens)[0] for slot in range(len(tokens))]
    counts = {min(count, len(tokens)) for rows in programs for count in (rows - 1, rows)}
    for count in sorted(counts):
        # Another first row each time, so that rows stand at several places.
        slots = [(count + place) % len(tokens) for place in range(count)]
        for place, bits in enumerate(_row_bits(subject, slots, tokens)):
            if bits != alone[slots[place]]:
                raise _failure(subject.info, f"among {count} (at place {place}) than alone", count)
    return len(tokens) + 1 + sum(counts)


def _beam_bits(subject: SearchSubject, slot: int, position: int, token_id: int) -> bytes:
    step = BeamStep((slot,), (Beam(slot, token_id, 0.0),), position, position, _RULES)
    tokens = [each.token for each in subject.step_beams(step)]
    held = _held_bits(subject, slot, position)
    return _top_bits([token for token in tokens if token is not None]) + held


def _candidate_bits(subject: SearchSubject, slot: int, position: int, token_id: int) -> bytes:
    subject.keep_hidden(slot)
    choice = subject.step_candidates(
        CandidateStep((slot,), (token_id,), (1.0,), position, 0.5, _RULES)
    )
    subject.drop_hidden(slot)
    held = _held_bits(subject, slot, position)
    return _top_bits(() if choice is None else choice.candidates) + held


def _row_bits(
    subject: SearchSubject, slots: Sequence[int], tokens: Sequence[tuple[int, int]]
) -> list[bytes]:
    positions, token_ids = zip(*(tokens[slot] for slot in slots), strict=True)
    rows = subject.search_rows(slots, token_ids, positions)
    return [
        numbers.tobytes() + _held_bits(subject, slot, position)
        for slot, position, numbers in zip(slots, positions, rows, strict=True)
    ]


def _held_bits(subject: SearchSubject, slot: int, position: int) -> bytes:
    return subject.keys_and_values(slot, position).tobytes()


def _top_bits(tokens: Sequence[SampledToken]) -> bytes:
    pairs = [pair for token in tokens for pair in token.top]
    ids, logprobs = [id_ for id_, _ in pairs], [logprob for _, logprob in pairs]
    return np.array(ids, np.int64).tobytes() + np.array(logprobs, np.float32).tobytes()


def _failure(info: EngineInfo, what: str, count: int) -> SelfTestFailed:
    # The program of eight rows is only there for more than four slots, that of four for two.
    num_slots = 4 if count > 4 else 1
    return SelfTestFailed(
        f"A row of a search gets other bits {what} on {machine_of(info)}, so answers would depend "
        f"on what else runs. Serve with --slots {num_slots}, which does without, and {REPORT}"
    )
