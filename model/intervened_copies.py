"""Interventions in the copies of a pass, and what they do to a derivative on its way back.

Every intervention is linear in the stream, but for what it adds. So the derivative goes back
through the same program: what was scaled is scaled, what was projected out is projected out, what
was set or zeroed depends on nothing, what was added to is left alone; the last change comes first.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from model.attribution_questions import Pass
from model.chunk_stream import ChunkStreams
from model.intervention_slots import Touch
from model.interventions import TokenInterventions, code_of
from model.slot_memory import BLOCK_TOKENS


class IntervenedCopies:
    """The changes of one pass.

    Args:
        streams: Of the engine.
        touches: Interventions in the text, in order.
        num_read: Tokens of the text.
        size: How many copies of it lie behind each other.
    """

    def __init__(
        self, streams: ChunkStreams, touches: Sequence[Touch], num_read: int, size: Pass
    ) -> None:
        self._streams = streams
        copied = [
            Touch(
                each.intervention,
                tuple(
                    row * num_read + place for row in range(size.num_rows) for place in each.places
                ),
            )
            for each in touches
        ]
        starts = range(0, size.num_tokens, BLOCK_TOKENS)
        self._touches = [touches_between(copied, start, start + BLOCK_TOKENS) for start in starts]
        self._layers = {layer for each in touches for layer in each.intervention.layers}

    def after(self, x: jax.Array, layer: int) -> jax.Array:
        """The stream after a block, changed."""
        return self._changed(x, layer, is_derivative=False)

    def derivative_before(self, derivative: jax.Array, layer: int) -> jax.Array:
        """By the stream after a block before it is changed, from that by the changed one."""
        return self._changed(derivative, layer, is_derivative=True)

    def _changed(self, x: jax.Array, layer: int, *, is_derivative: bool) -> jax.Array:
        if layer not in self._layers:
            return x
        on_host = np.array(x)
        for number, touches in enumerate(self._touches):
            own = slice(number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS)
            part = on_host[:, own]
            token_ids = np.zeros(part.shape[:2], np.int32)
            calls = self._streams.changes([touches], layer)
            for changes in map(_backward, reversed(calls)) if is_derivative else calls:
                part, _ = self._streams.change(token_ids, part, changes)
            on_host[:, own] = part
        return jnp.asarray(on_host)


def touches_between(touches: Sequence[Touch], start: int, end: int) -> tuple[Touch, ...]:
    """In the tokens from ``start`` to ``end``; places count from there."""
    return tuple(
        Touch(
            each.intervention,
            tuple(place - start for place in each.places if start <= place < end),
        )
        for each in touches
    )


def _backward(changes: TokenInterventions) -> TokenInterventions:
    operations, scales, vector_ids, vectors = map(np.asarray, changes)
    back = operations.copy()
    back[operations == code_of("add")] = 0
    back[operations == code_of("set")] = code_of("zero")
    last_first = (back[::-1], scales[::-1], vector_ids[::-1], vectors)
    return TokenInterventions(*map(jnp.asarray, last_first))
