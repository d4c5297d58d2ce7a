"""A block without a cache, and its derivative by what enters it.

Of a forward pass only the residual stream in front of each block is kept. The derivative of a block
computes its inside again, so memory grows with tokens and layers and not with what a block holds::

    x[0] -> block 0 -> x[1] -> block 1 -> x[2] -> head
     |                  |                          |
     v                  v                          v
    d[0] <- block 0 <- d[1] <- block 1 <- d[2] <- its derivative

Weights and traits are arguments, so all layers share one program each way, and whoever runs them
can pause between two layers. Several sequences may lie in one row, one behind the other.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from model.config import GemmaConfig
from model.gemma.block import LayerTraits, block
from model.gemma.projection import AdapterTerm
from model.gemma.weights import BlockWeights


class SequenceRows(NamedTuple):
    """Where each token stands.

    Attributes:
        positions: In its own sequence.
        sequences: Which of its row it belongs to; padding belongs to one of its own.
    """

    positions: Int[Array, "batch seq"]
    sequences: Int[Array, "batch seq"]


def block_forward(
    config: GemmaConfig,
    weights: BlockWeights,
    traits: LayerTraits,
    x: Float[Array, "batch seq width"],
    rows: SequenceRows,
    adapters: Mapping[str, AdapterTerm] | None = None,
) -> Float[Array, "batch seq width"]:
    """The residual stream after a block."""
    after, _ = block(
        config, weights, traits, x, rows.positions, sequences=rows.sequences, adapters=adapters
    )
    return after


def block_backward(
    config: GemmaConfig,
    weights: BlockWeights,
    traits: LayerTraits,
    x: Float[Array, "batch seq width"],
    rows: SequenceRows,
    derivative: Float[Array, "batch seq width"],
    adapters: Mapping[str, AdapterTerm] | None = None,
) -> Float[Array, "batch seq width"]:
    """The derivative of a number by what enters a block, from that by what leaves it.

    Args:
        config: Architecture (static).
        weights: Of the block.
        traits: Of the layer.
        x: What entered the block.
        rows: Where its tokens stand.
        derivative: Of the number, by the residual stream after the block.
        adapters: As in `block_forward`.
    """
    _, pull_back = jax.vjp(
        lambda before: block_forward(config, weights, traits, before, rows, adapters), x
    )
    [by_x] = pull_back(derivative)
    found: Array = by_x
    return found
