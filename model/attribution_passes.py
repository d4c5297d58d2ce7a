"""Copies of a text through the blocks, the head, and back: what attribution computes.

The copies of a pass lie one behind the other in one row, and each may enter a layer with another
residual stream. Only what entered each block is kept, until the pass is over. Programs
``block_forward[tokens]``, ``block_backward[tokens]`` and ``score_gradient`` are for this; that of
the head is that of scores.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Float64, Int

from model.attribution_questions import PASS_TOKENS, AttributedText, Pass, passes
from model.block_gradient import SequenceRows, block_backward, block_forward
from model.chunk_stream import ChunkStreams
from model.config import GemmaConfig
from model.gemma.block import LayerTraits
from model.gemma.forward import EMBEDDING_LAYER
from model.gemma.weights import GemmaWeights
from model.head_gradient import score_gradient
from model.intervened_copies import IntervenedCopies, touches_between
from model.logits_room import LogitsRoom
from model.prefill import CHUNK_BUCKETS
from model.programs import ProgramSpec
from model.score_head import AskedRows, HeadOutputs
from model.score_slots import HEAD_PAIRS
from model.slots import PromptChunk

Stream = Float32[np.ndarray, "tokens width"]
Streams = Float32[np.ndarray, "rows tokens width"]

# Passes of more tokens keep no products: 512 of them would hold 255 MB with Gemma 3 270M.
_MOST_KEPT_TOKENS = 128
# Which tokens of a pass are none of any copy.
_PADDING = -1


class NotFinite(Exception):
    """The logits behind a place that is asked about hold NaN or infinity."""


class PassResult(NamedTuple):
    """What a pass found for each copy.

    Attributes:
        logprobs: The sum of those that were asked for.
        by_stream: Its derivative by the stream that entered; None if it was not wanted.
    """

    logprobs: Float64[np.ndarray, " rows"]
    by_stream: Streams | None


class _Before(NamedTuple):
    """What entered a block, and what its products made of it, if that was kept."""

    x: jax.Array
    kept: dict[str, jax.Array]


class _Copies(NamedTuple):
    """Where the tokens of the copies of a pass stand, and how their stream is changed."""

    rows: SequenceRows
    num_real: np.int32
    changes: IntervenedCopies


class AttributionPasses:
    """Passes on one engine.

    Args:
        config: Of the model.
        weights: Of the model.
        traits: Of the layers.
        programs: Of the engine, filled by it.
        streams: Of the engine: how the residual stream is changed.
        room: For logits.
        is_native: Products are the native kernel's.
    """

    def __init__(
        self,
        config: GemmaConfig,
        weights: GemmaWeights,
        traits: Sequence[LayerTraits],
        programs: dict[str, Callable[..., Any]],
        streams: ChunkStreams,
        room: LogitsRoom,
        *,
        is_native: bool,
    ) -> None:
        self._config = config
        self._weights = weights
        self._traits = traits
        self._programs = programs
        self._streams = streams
        self._is_native = is_native
        self._room = room
        self._head_rows = room.shape[0]

    def program_specs(self) -> list[ProgramSpec]:
        """What is to be compiled."""
        specs = []
        number: Any = jax.ShapeDtypeStruct((), jnp.int32)
        for size in PASS_TOKENS:
            ids: Any = jax.ShapeDtypeStruct((1, size), jnp.int32)
            x = _floats(1, size, self._config.hidden_dim)
            rows = SequenceRows(ids, ids)
            given = (self._weights.blocks[0], self._traits[0], x, rows, number)
            forward = partial(
                block_forward,
                self._config,
                is_native=self._is_native,
                keeps=size <= _MOST_KEPT_TOKENS,
            )
            backward = partial(block_backward, self._config, is_native=self._is_native)
            specs.append(ProgramSpec(f"block_forward[{size}]", forward, given))
            _, kept = jax.eval_shape(forward, *given)
            backward_given: Any = (*given, kept, x)
            specs.append(ProgramSpec(f"block_backward[{size}]", backward, backward_given, (6,)))
        arguments = (
            self._weights,
            _floats(self._head_rows, self._config.hidden_dim),
            _floats(*self._room.shape),
            jax.ShapeDtypeStruct((self._head_rows,), jnp.int32),
            _floats(self._head_rows),
            number,
        )
        gradient = partial(score_gradient, self._config, is_native=self._is_native)
        return [*specs, ProgramSpec("score_gradient", gradient, arguments, donated=(2,))]

    def warm_up(self) -> None:
        """One pass of each length."""
        for size in PASS_TOKENS:
            text = AttributedText((0,), ((0, 0),))
            x = np.zeros((1, 1, self._config.hidden_dim), np.float32)
            for _ in self.run(text, x, Pass(size, 1), EMBEDDING_LAYER, wants_derivative=True):
                pass

    def stream_at(self, text: AttributedText, layer: int) -> Generator[bool, None, Stream]:
        """The residual stream of a text after a block, or at −1 the embeddings after scaling."""
        embedded = self._embedded(text)
        [size] = passes(text.num_read, 1)
        copies = self._copies(text, size)
        entered = _packed(embedded[None], size)
        x, _ = yield from self._up(entered, copies, 0, layer + 1, wants_derivative=False)
        return np.asarray(x)[0, : text.num_read]

    def run(
        self,
        text: AttributedText,
        streams: Streams,
        size: Pass,
        layer: int,
        *,
        wants_derivative: bool,
    ) -> Generator[bool, None, PassResult]:
        """One pass of copies that leave ``layer`` with ``streams``; yields after each part.

        Raises:
            NotFinite: Nothing can be told.
        """
        copies = self._copies(text, size)
        x, before = yield from self._up(
            *(_packed(streams, size), copies, layer + 1, self._config.num_layers),
            wants_derivative=wants_derivative,
        )
        logprobs, by_x = yield from self._head(
            text, np.asarray(x)[0], size, wants_derivative=wants_derivative
        )
        if by_x is None:
            return PassResult(logprobs, None)
        derivative = yield from self._down(jnp.asarray(by_x[None]), before, copies, layer + 1)
        num_tokens = size.num_rows * text.num_read
        return PassResult(logprobs, np.asarray(derivative)[0, :num_tokens].reshape(streams.shape))

    def _copies(self, text: AttributedText, size: Pass) -> _Copies:
        changes = IntervenedCopies(self._streams, text.touches, text.num_read, size)
        num_real = np.int32(size.num_rows * text.num_read)
        return _Copies(_rows(text.num_read, size), num_real, changes)

    def _embedded(self, text: AttributedText) -> Stream:
        """By the programs of prefill, after interventions."""
        token_ids = text.token_ids[: text.num_read]
        found = []
        for first in range(0, len(token_ids), CHUNK_BUCKETS[-1]):
            chunk = token_ids[first : first + CHUNK_BUCKETS[-1]]
            bucket = next(size for size in CHUNK_BUCKETS if size >= len(chunk))
            ids = np.zeros((1, bucket), np.int32)
            ids[0, : len(chunk)] = chunk
            x = self._programs[f"embed[{bucket}]"](self._weights.embeddings, ids)
            touches = touches_between(text.touches, first, first + len(chunk))
            stream = self._streams.of([PromptChunk(0, chunk, first, touches)])
            found.append(np.asarray(stream.begin(jnp.asarray(ids), x))[0, : len(chunk)])
        return np.concatenate(found)

    def _up(
        self,
        x: jax.Array,
        copies: _Copies,
        first: int,
        end: int,
        *,
        wants_derivative: bool,
    ) -> Generator[bool, None, tuple[jax.Array, list[_Before]]]:
        """The stream after the blocks from ``first`` to before ``end``, and what the way back
        needs.
        """
        program = self._programs[f"block_forward[{x.shape[1]}]"]
        before = []
        for layer in range(first, end):
            weights, traits = self._weights.blocks[layer], self._traits[layer]
            after, kept = program(weights, traits, x, copies.rows, copies.num_real)
            if wants_derivative:
                before.append(_Before(x, kept))
            x = copies.changes.after(after, layer)
            # Whoever pauses here does so by the clock.
            x.block_until_ready()
            yield False
        return x, before

    def _down(
        self, derivative: jax.Array, before: list[_Before], copies: _Copies, first: int
    ) -> Generator[bool, None, jax.Array]:
        """The derivative by what entered block ``first``; lets go of the streams on the way."""
        program = self._programs[f"block_backward[{derivative.shape[1]}]"]
        while before:
            layer, (x, kept) = first + len(before) - 1, before.pop()
            weights, traits = self._weights.blocks[layer], self._traits[layer]
            derivative = copies.changes.derivative_before(derivative, layer)
            derivative = program(weights, traits, x, copies.rows, copies.num_real, kept, derivative)
            derivative.block_until_ready()
            yield False
        return derivative

    def _head(
        self, text: AttributedText, x: Stream, size: Pass, *, wants_derivative: bool
    ) -> Generator[bool, None, tuple[Float64[np.ndarray, " rows"], Stream | None]]:
        """Log-probabilities of each copy, and the derivative of them all, some places at a time."""
        asked = [(row, *each) for row in range(size.num_rows) for each in text.asked]
        logprobs = np.zeros(size.num_rows)
        by_x = np.zeros_like(x) if wants_derivative else None
        num_rows = self._head_rows
        for first in range(0, len(asked), num_rows):
            own = asked[first : first + num_rows]
            places = [row * text.num_read + place for row, place, _ in own]
            token_ids = np.zeros(num_rows, np.int32)
            token_ids[: len(own)] = [token_id for *_, token_id in own]
            at_places = np.zeros((num_rows, x.shape[1]), np.float32)
            at_places[: len(own)] = x[places]
            found: HeadOutputs = self._programs["score"](
                *(self._weights, at_places, _asked_rows(token_ids, len(own)), self._room.take())
            )
            logits = found.logits
            if not np.asarray(found.is_finite)[: len(own)].all():
                raise NotFinite
            np.add.at(logprobs, [row for row, *_ in own], np.asarray(found.logprobs)[: len(own)])
            yield False
            if by_x is not None:
                amounts = (np.arange(num_rows) < len(own)).astype(np.float32)
                by_places, logits = self._programs["score_gradient"](
                    *(self._weights, at_places, logits, token_ids, amounts, np.int32(len(own)))
                )
                np.add.at(by_x, places, np.asarray(by_places)[: len(own)])
                yield False
            self._room.give_back(logits)
        return logprobs, by_x


def _packed(streams: Streams, size: Pass) -> jax.Array:
    """One behind the other, and zeros."""
    x = np.zeros((1, size.num_tokens, streams.shape[2]), np.float32)
    flat = streams.reshape(-1, streams.shape[2])
    x[0, : len(flat)] = flat
    return jnp.asarray(x)


def _rows(num_read: int, size: Pass) -> SequenceRows:
    places = np.arange(size.num_tokens, dtype=np.int32)
    is_real = places < size.num_rows * num_read
    sequences = np.where(is_real, places // num_read, _PADDING).astype(np.int32)
    positions = (places % num_read).astype(np.int32)
    return SequenceRows(jnp.asarray(positions[None]), jnp.asarray(sequences[None]))


def _asked_rows(token_ids: Int[np.ndarray, " places"], count: int) -> AskedRows:
    """One token behind each place, and nothing else."""
    pairs = np.zeros((2, HEAD_PAIRS), np.int32)
    pairs[0, :count] = np.arange(count)
    pairs[1, :count] = token_ids[:count]
    wants_top = np.zeros(len(token_ids), bool)
    compared = np.zeros((2, len(token_ids)), np.int32)
    numbers = (np.int32(count), wants_top, np.int32(count), *pairs, np.int32(0), compared)
    return AskedRows(*numbers)


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
