"""The part of `model.self_test` that is about scores. Two claims:

* a continuation that begins inside a block leaves the same residuals alone, behind another text,
  whose own are changed, and behind another continuation of its context;
* a place is measured to the same bits alone and in a full batch, at another place.
"""

from collections.abc import Generator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from model.errors import SelfTestFailed
from model.intervention_slots import Intervention, Touch
from model.score_slots import HEAD_ROWS, AskedPlace, PlaceScore, Residual, ScoreChunk
from model.slots import MAX_LOGPROBS, EngineInfo

# A prime: its multiples spread over a vocabulary of any size.
_ID_STRIDE = 104_729
_CONTEXT_TOKENS = 21
# More than a tile of queries, and no multiple of one.
_CONTINUATION_TOKENS = 11

_REPORT = "No setting avoids it; please report this line with the model and the processor."


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
                    f"{len(company)} than alone on {_machine(info)}. {_REPORT}"
                )
    return 3 * length + _compare_head(subject, alone)


def _compare_head(subject: ScoreSubject, residuals: Sequence[Residual]) -> int:
    vocab = subject.info.vocabulary_size
    places = [
        AskedPlace(residuals[i % len(residuals)], (_ID_STRIDE * i % vocab,), MAX_LOGPROBS * (i % 2))
        for i in range(HEAD_ROWS)
    ]
    together = subject.measure(places[::-1])[::-1]
    for place, found in zip(places, together, strict=True):
        [alone] = subject.measure([place])
        if _bits(alone) != _bits(found):
            raise SelfTestFailed(
                f"A token that is scored gets other bits among {len(places)} than alone on "
                f"{_machine(subject.info)}. {_REPORT}"
            )
    return len(places)


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
    logprobs = [*score.logprobs, *(logprob for _, logprob in score.top)]
    return (
        np.array([score.is_finite, *ids], np.int64).tobytes()
        + np.array(logprobs, np.float32).tobytes()
    )


def _machine(info: EngineInfo) -> str:
    return f"this machine ({info.backend}, {info.device})"
