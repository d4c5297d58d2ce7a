"""The residual stream of a chunk between two blocks: what is changed there, and what is taken.

Chunks of which nobody wants anything pass at the cost of one look. For the others there is one
program, ``intervene``, of the longest chunk: the host fills up shorter ones, so that it serves all.
At layer −1 it starts from the embeddings themselves, as the stream that goes on is scaled already.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from model.config import GemmaConfig
from model.gemma.forward import scale_embeddings
from model.gemma.weights import GemmaWeights
from model.intervention_slots import EMBEDDING_LAYER, Capture, Captured, Touch
from model.interventions import (
    TokenInterventions,
    intervene,
    no_interventions,
    token_interventions,
)
from model.programs import ProgramSpec
from model.slot_memory import BLOCK_TOKENS
from model.slots import PromptChunk


class ChangedStream(NamedTuple):
    """The stream of a chunk, and scaled: what goes on from layer −1."""

    x: Float[Array, "1 seq width"]
    scaled: Float[Array, "1 seq width"]


def change_chunk(
    embeddings: Float[Array, "vocab width"],
    token_ids: Int[Array, "1 seq"],
    x: Float[Array, "1 seq width"],
    changes: TokenInterventions,
    looks_up: Bool[Array, ""],
) -> ChangedStream:
    """The stream of a chunk after interventions.

    Args:
        embeddings: Of the model.
        token_ids: Of the chunk.
        x: Its stream, which counts for nothing if the chunk ``looks_up`` its embeddings.
        changes: Of its tokens.
        looks_up: The stream is that of layer −1, and begins here.
    """
    x = jax.lax.cond(looks_up, lambda: embeddings[token_ids], lambda: x)
    x = jax.lax.optimization_barrier(intervene(x[0], changes)[None])
    return ChangedStream(x, scale_embeddings(x))


class ChunkStreams:
    """What happens to the streams of one engine's chunks.

    Args:
        config: Of the model.
        weights: Of the model.
        programs: Of the engine, filled by it.
    """

    def __init__(
        self, config: GemmaConfig, weights: GemmaWeights, programs: dict[str, Callable[..., Any]]
    ) -> None:
        self._width = config.hidden_dim
        self._weights = weights
        self._programs = programs

    def program_specs(self) -> list[ProgramSpec]:
        """What is to be compiled."""
        x = jax.ShapeDtypeStruct((1, BLOCK_TOKENS, self._width), jnp.float32)
        token_ids = jax.ShapeDtypeStruct((1, BLOCK_TOKENS), jnp.int32)
        changes = no_interventions(BLOCK_TOKENS, self._width)
        looks_up = jax.ShapeDtypeStruct((), jnp.bool_)
        arguments = (self._weights.embeddings, token_ids, x, changes, looks_up)
        return [ProgramSpec("intervene", change_chunk, arguments)]

    def of(
        self, chunks: Sequence[PromptChunk], captures: Sequence[Sequence[Capture]] = ()
    ) -> "ChunkStream":
        """That of chunks that lie one behind the other, with what is captured of each."""
        return ChunkStream(self, chunks, captures)

    def warm_up(self) -> None:
        """Runs the program once."""
        self.change(np.zeros((1, 1), np.int32), None, no_interventions(BLOCK_TOKENS, self._width))

    def changes(self, touches: Sequence[Sequence[Touch]], layer: int) -> list[TokenInterventions]:
        """What is to be done at one layer, call by call."""
        return token_interventions(touches, layer, BLOCK_TOKENS, self._width)

    def change(
        self,
        token_ids: np.ndarray | jax.Array,
        x: np.ndarray | None,
        changes: TokenInterventions,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Both of a `ChangedStream`, of as many tokens as there are; None begins at layer −1."""
        num_tokens = token_ids.shape[1]
        padded_ids = np.zeros((1, BLOCK_TOKENS), np.int32)
        padded_ids[:, :num_tokens] = token_ids
        padded = np.zeros((1, BLOCK_TOKENS, self._width), np.float32)
        if x is not None:
            padded[:, :num_tokens] = x
        changed: ChangedStream = self._programs["intervene"](
            self._weights.embeddings, padded_ids, padded, changes, np.bool_(x is None)
        )
        return np.asarray(changed.x)[:, :num_tokens], np.asarray(changed.scaled)[:, :num_tokens]


class ChunkStream:
    """The stream of chunks that are read together, on its way through the layers.

    Args:
        streams: Of the engine.
        chunks: One behind the other.
        captures: Of each of them, or of none.
    """

    def __init__(
        self,
        streams: ChunkStreams,
        chunks: Sequence[PromptChunk],
        captures: Sequence[Sequence[Capture]],
    ) -> None:
        self._streams = streams
        self._captures = captures
        self._captured: dict[tuple[int, int], Captured] = {}
        self._touches: list[list[Touch]] = []
        self._offsets: list[int] = []
        offset = 0
        for chunk in chunks:
            self._offsets.append(offset)
            self._touches.append(
                [
                    Touch(each.intervention, tuple(offset + place for place in each.places))
                    for each in chunk.touches
                ]
            )
            offset += len(chunk.token_ids)
        touched = {
            layer
            for touches in self._touches
            for touch in touches
            if touch.places
            for layer in touch.intervention.layers
        }
        self._captured_layers = {each.layer for of_chunk in captures for each in of_chunk}
        self._layers = frozenset(touched | self._captured_layers)

    def begin(self, token_ids: jax.Array, x: jax.Array) -> jax.Array:
        """The stream before the first block, ``x`` being that of a chunk that nobody looks into."""
        if EMBEDDING_LAYER not in self._layers:
            return x
        all_changes = self._streams.changes(self._touches, EMBEDDING_LAYER)
        nothing = no_interventions(BLOCK_TOKENS, x.shape[2])
        stream, scaled = self._streams.change(token_ids, None, (all_changes or [nothing])[0])
        for changes in all_changes[1:]:
            stream, scaled = self._streams.change(token_ids, stream, changes)
        self._take(EMBEDDING_LAYER, stream)
        return jax.device_put(scaled) if all_changes else x

    def go_on(self, token_ids: jax.Array, x: jax.Array, layer: int) -> jax.Array:
        """The stream after a block."""
        if layer not in self._layers:
            return x
        # A copy: the device takes over the memory of what it is given next.
        stream = np.array(x)
        all_changes = self._streams.changes(self._touches, layer)
        for changes in all_changes:
            stream, _ = self._streams.change(token_ids, stream, changes)
        self._take(layer, stream)
        return jax.device_put(stream) if all_changes else x

    def captured(self, chunk: int) -> list[Captured]:
        """What was captured of one of the chunks, in order, once the last block is behind it."""
        return [self._captured[chunk, place] for place in range(len(self._captures[chunk]))]

    def _take(self, layer: int, stream: np.ndarray) -> None:
        if layer not in self._captured_layers:
            return
        for chunk, of_chunk in enumerate(self._captures):
            for number, each in enumerate(of_chunk):
                if each.layer == layer:
                    places = [self._offsets[chunk] + place for place in each.places]
                    self._captured[chunk, number] = _numbers(stream[0, places], each)


def _numbers(found: np.ndarray, capture: Capture) -> Captured:
    # What float16 cannot hold is infinite there; that is told to whoever asks for it.
    with np.errstate(over="ignore"):
        numbers = found.astype("<f2" if capture.is_half else "<f4").tobytes()
    return Captured(numbers, bool(np.isfinite(found).all()))
