"""Scores of the arithmetic engine: after tokens whose sum goes to s, token s + k has rank k and the
log-probability −1 − k, as the alternatives that come with a drawn token say. Two places
differ by what is between their sums.

A residual is the list of all tokens up to its place, and what their sum lacks there.
"""

import struct
import time
from collections.abc import Generator, Sequence

from model.intervention_slots import Captured
from model.score_slots import HEAD_PAIRS, SCORE_SLOTS, AskedPlace, PlaceScore, ScoreChunk
from tests.fakes.arithmetic_stream import captured, embedded, numbers, stream, touching

# That the head of scores takes together, and between two steps.
HEAD_PLACES = 16
HEAD_PLACES_OF_STEP = 8

VOCABULARY_SIZE = 1000


def _logits(first: int) -> bytes:
    ranks = ((token_id - first) % VOCABULARY_SIZE for token_id in range(VOCABULARY_SIZE))
    return struct.pack(f"<{VOCABULARY_SIZE}f", *(-1.0 - rank for rank in ranks))


def _first(place: AskedPlace) -> int:
    """The likeliest token behind it."""
    return int(sum(numbers(place.residual))) % VOCABULARY_SIZE


class ArithmeticScores:
    """What the engine has for them, beside its slots."""

    _step_seconds: float
    _adapters: list[int]

    def __init__(self) -> None:
        self._texts: list[list[int]] = [[] for _ in range(SCORE_SLOTS)]

    def _check_chunks(self, chunks: Sequence[ScoreChunk]) -> None:
        raise NotImplementedError

    def _is_finite(self, tokens: list[int]) -> bool:
        raise NotImplementedError

    def _misbehave(self, tokens: Sequence[int]) -> None:
        raise NotImplementedError

    def read(
        self, chunks: Sequence[ScoreChunk]
    ) -> Generator[None, None, list[list[int] | Captured]]:
        self._check_chunks(chunks)
        # As two layers that are both needed.
        for _ in range(2):
            time.sleep(self._step_seconds / 2)
            yield
        residuals: list[list[int] | Captured] = []
        for chunk in chunks:
            text = self._texts[chunk.slot]
            assert len(text) >= chunk.start, "what stands before was never read"
            due = [touching(chunk.touches, place) for place in range(len(chunk.token_ids))]
            text[chunk.start :] = map(embedded, chunk.token_ids, due)
            self._misbehave(text)
            assert list(chunk.wanted) == sorted(set(chunk.wanted))
            added = self._adapters[chunk.adapter]
            upto = [text[: chunk.start + place + 1] for place in range(len(chunk.token_ids))]
            streams = [stream(*each) for each in zip(upto, due, strict=True)]
            residuals += [
                [*upto[place], streams[place] - sum(numbers(upto[place])) + added]
                for place in chunk.wanted
            ]
            for each in chunk.captures:
                found = streams if each.layer == 0 else numbers(text[chunk.start :])
                residuals.append(captured(each, [found[place] for place in each.places]))
        return residuals

    def measure(self, places: Sequence[AskedPlace]) -> list[PlaceScore]:
        assert 0 < len(places) <= HEAD_PLACES
        assert sum(len(place.token_ids) for place in places) <= HEAD_PAIRS
        time.sleep(self._step_seconds)
        return [self._measure(place, places) for place in places]

    def _measure(self, place: AskedPlace, places: Sequence[AskedPlace]) -> PlaceScore:
        first = _first(place)
        ranks = tuple((token_id - first) % VOCABULARY_SIZE for token_id in place.token_ids)
        return PlaceScore(
            logprobs=tuple(-1.0 - rank for rank in ranks),
            ranks=ranks,
            top=tuple(((first + k) % VOCABULARY_SIZE, -1.0 - k) for k in range(place.num_top)),
            is_finite=self._is_finite(place.residual),
            logits=_logits(first) if place.wants_logits else b"",
            divergence=(
                None
                if place.compared_with is None
                else float((first - _first(places[place.compared_with])) % VOCABULARY_SIZE)
            ),
        )
