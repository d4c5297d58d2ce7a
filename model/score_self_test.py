"""The part of `model.self_test` that is about scores. Two claims:

* a continuation that begins inside a block leaves the same residuals alone, behind another text,
  whose own are changed, and behind another continuation of its context;
* a place is measured to the same bits alone and in a full batch, at another place, and so is what
  it differs by from another one.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np

from model.errors import SelfTestFailed
from model.intervention_slots import Intervention, Touch
from model.score_slots import AskedPlace, PlaceScore, Residual, ScoreChunk
from model.self_test_report import REPORT, machine_of
from model.slots import MAX_LOGPROBS, EngineInfo

# A prime: its multiples spread over a vocabulary of any size.
_ID_STRIDE = 104_729
_CONTEXT_TOKENS = 21
# More than a tile of queries, and no multiple of one.
_CONTINUATION_TOKENS = 11

_NO_SETTING = f"No setting avoids it; {REPORT}"


@runtime_checkable
class ScoreSubject(Protocol):
    """An engine that scores."""

    @property
    def info(self) -> EngineInfo: ...

    def read(self, chunks: Sequence[ScoreChunk]) -> Generator[None, None, list[Residual]]: ...

    def measure(self, places: Sequence[AskedPlace]) -> list[PlaceScore]: ...


def compare_scores(subject: ScoreSubject) -> int:
    """Tries both claims; returns how many places were compared.

    Raises:
        SelfTestFailed: Bits differ.
    """
    info = subject.info
    start = min(_CONTEXT_TOKENS, info.context_tokens // 2)
    length = min(_CONTINUATION_TOKENS, info.context_tokens - start)
    ids = [_ID_STRIDE * (i + 1) % info.vocabulary_size for i in range(2 * start + 2 * length)]
    wanted = tuple(range(length))
    context = ScoreChunk(0, ids[:start], 0)
    one = ScoreChunk(0, ids[start:][:length], start, wanted)
    other = ScoreChunk(0, ids[start + length :][:length], start)
    doubled = Touch(Intervention("scale", tuple(range(-1, info.num_layers)), 2.0), (0,))
    stranger = ScoreChunk(1, ids[::-1][:start], 0, touches=(doubled,))
    _read(subject, [context])
    alone = _read(subject, [one])
    for company in ([stranger, one], [other, one], [context, other, one, stranger]):
        for place, found in enumerate(_read(subject, company)):
            if found.tobytes() != alone[place].tobytes():
                raise SelfTestFailed(
                    f"Token {start + place} of a text that is scored gets other bits among "
                    f"{len(company)} than alone on {machine_of(info)}. {_NO_SETTING}"
                )
    return 3 * length + _compare_head(subject, alone)


def _compare_head(subject: ScoreSubject, residuals: Sequence[Residual]) -> int:
    vocab = subject.info.vocabulary_size
    count, num_places = len(residuals), subject.info.head_places
    # Two that are compared, again and again.
    pairs = [
        [
            AskedPlace(residuals[i % count], (_ID_STRIDE * i % vocab,)),
            AskedPlace(residuals[(i + 1) % count], (_ID_STRIDE * (i + 1) % vocab,), MAX_LOGPROBS),
        ]
        for i in range(0, num_places, 2)
    ]
    together = subject.measure(_compared(pairs[::-1]))
    for number, pair in enumerate(pairs[::-1]):
        found = together[2 * number :][:2]
        alone = subject.measure(_compared([pair]))
        if [*map(_bits, alone)] != [*map(_bits, found)]:
            raise SelfTestFailed(
                f"A token that is scored gets other bits among {num_places} than alone on "
                f"{machine_of(subject.info)}. {_NO_SETTING}"
            )
    return num_places


def _compared(pairs: Sequence[Sequence[AskedPlace]]) -> list[AskedPlace]:
    """The second of each pair with its first."""
    places: list[AskedPlace] = []
    for first, second in pairs:
        places += [first, replace(second, compared_with=len(places))]
    return places


def _read(subject: ScoreSubject, chunks: Sequence[ScoreChunk]) -> list[Residual]:
    reading = subject.read(chunks)
    while True:
        try:
            next(reading)
        except StopIteration as done:
            found: list[Residual] = done.value
            return found


def _bits(score: PlaceScore) -> bytes:
    ids = [*score.ranks, *(token_id for token_id, _ in score.top)]
    logprobs = [*score.logprobs, *(logprob for _, logprob in score.top), score.divergence or 0.0]
    return (
        np.array([score.is_finite, *ids], np.int64).tobytes()
        + np.array(logprobs, np.float32).tobytes()
    )
