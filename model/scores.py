"""The host's side of scores: residuals out of a chunk, and arguments and results of the head.

One program, ``score``, made and tried with those of the engine. Residuals wait on the host, so that
places of several chunks can go through the head together.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.chunk_stream import ChunkStream
from model.config import GemmaConfig
from model.gemma.weights import GemmaWeights
from model.logits_room import LogitsRoom
from model.programs import ProgramSpec
from model.score_head import AskedRows, HeadOutputs, score_rows
from model.score_slots import HEAD_PAIRS, AskedPlace, PlaceScore, Residual, ScoreChunk
from model.slots import MAX_LOGPROBS


class Scores:
    """The scores of one engine.

    Args:
        config: Of the model.
        weights: Of the model.
        programs: Of the engine, filled by it.
        room: For logits.
        is_native: Logits are the native kernel's.
    """

    def __init__(
        self,
        config: GemmaConfig,
        weights: GemmaWeights,
        programs: dict[str, Callable[..., Any]],
        room: LogitsRoom,
        *,
        is_native: bool,
    ) -> None:
        self._config = config
        self._weights = weights
        self._programs = programs
        self._is_native = is_native
        self._room = room
        self._num_rows = room.shape[0]

    def program_specs(self) -> list[ProgramSpec]:
        """What is to be compiled."""
        x = jax.ShapeDtypeStruct((self._num_rows, self._config.hidden_dim), jnp.float32)
        asked = _asked_rows((), self._num_rows)
        score = partial(score_rows, self._config, is_native=self._is_native)
        room = jax.ShapeDtypeStruct(self._room.shape, jnp.float32)
        return [ProgramSpec("score", score, (self._weights, x, asked, room), donated=(3,))]

    def measure(self, places: Sequence[AskedPlace]) -> list[PlaceScore]:
        """See `model.score_slots.ScoreEngine.measure`."""
        num_pairs = sum(len(place.token_ids) for place in places)
        if len(places) > self._num_rows or num_pairs > HEAD_PAIRS:
            raise ValueError(
                f"{len(places)} places and {num_pairs} tokens were given; at most "
                f"{self._num_rows} and {HEAD_PAIRS} are measured together."
            )
        x = np.zeros((self._num_rows, self._config.hidden_dim), np.float32)
        for row, place in enumerate(places):
            x[row] = place.residual
        outputs: HeadOutputs = self._programs["score"](
            *(self._weights, x, _asked_rows(places, self._num_rows), self._room.take())
        )
        # All but the logits, which stay where they are.
        is_finite, logprobs, ranks, top_ids, top_logprobs, found = jax.device_get(
            tuple(outputs)[1:]
        )
        compared = [row for row, place in enumerate(places) if place.compared_with is not None]
        divergences = dict(zip(compared, found.tolist(), strict=False))
        scores = []
        pair = 0
        for row, place in enumerate(places):
            end = pair + len(place.token_ids)
            scores.append(
                PlaceScore(
                    logprobs=tuple(logprobs[pair:end].tolist()),
                    ranks=tuple(ranks[pair:end].tolist()),
                    top=tuple(
                        zip(
                            top_ids[row, : place.num_top].tolist(),
                            top_logprobs[row, : place.num_top].tolist(),
                            strict=True,
                        )
                    ),
                    is_finite=bool(is_finite[row]) and math.isfinite(divergences.get(row, 0.0)),
                    logits=_bytes(outputs.logits, row) if place.wants_logits else b"",
                    divergence=divergences.get(row),
                )
            )
            pair = end
        self._room.give_back(outputs.logits)
        return scores


def wanted_residuals(
    chunks: Sequence[ScoreChunk], x: jax.Array, stream: ChunkStream
) -> list[Residual]:
    """Those of chunks that were read together, and what was captured of them in ``stream``.

    ``x`` has the residuals one behind the other.
    """
    on_host = np.asarray(x)[0]
    residuals: list[Residual] = []
    offset = 0
    for number, chunk in enumerate(chunks):
        # Copies: a view would keep the whole chunk.
        residuals += [on_host[offset + place].copy() for place in chunk.wanted]
        residuals += stream.captured(number)
        offset += len(chunk.token_ids)
    return residuals


def _bytes(logits: jax.Array, row: int) -> bytes:
    # Of an array of its own: the other would keep what NumPy sees, and could not be taken over.
    of_row: bytes = np.asarray(logits.addressable_data(0))[row].astype("<f4").tobytes()
    return of_row


def _asked_rows(places: Sequence[AskedPlace], num_rows: int) -> AskedRows:
    wants_top = np.zeros(num_rows, bool)
    pairs = np.zeros((2, HEAD_PAIRS), np.int32)
    compared = np.zeros((2, num_rows), np.int32)
    num_pairs, num_compared = 0, 0
    for row, place in enumerate(places):
        assert 0 <= place.num_top <= MAX_LOGPROBS, "admission bounds the alternatives"
        wants_top[row] = place.num_top > 0
        for token_id in place.token_ids:
            pairs[:, num_pairs] = row, token_id
            num_pairs += 1
        if place.compared_with is not None:
            assert place.compared_with < row, "it stands behind what it is compared with"
            compared[:, num_compared] = place.compared_with, row
            num_compared += 1
    numbers = (np.int32(len(places)), wants_top, np.int32(num_pairs), *pairs)
    return AskedRows(*map(jnp.asarray, (*numbers, np.int32(num_compared), compared)))
