"""A block without a cache, and its derivative by what enters it.

Of a forward pass the residual stream in front of each block is kept. With it goes what the products
with weights made, where there is room for that; where not, the derivative of a block makes them
again, so memory grows with tokens and layers and not with what a block holds::

    x[0] -> block 0 -> x[1] -> block 1 -> x[2] -> head
     |                  |                          |
     v                  v                          v
    d[0] <- block 0 <- d[1] <- block 1 <- d[2] <- its derivative

Weights and traits are arguments, so all layers share one program each way, and whoever runs them
can pause between two layers. Several sequences may lie in one row, one behind the other.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from model.config import GemmaConfig
from model.gemma.block import LayerTraits, Project, block
from model.gemma.projection import projection
from model.gemma.weights import BlockWeights
from model.kernels.back_product import back_product
from model.kernels.product import product


class SequenceRows(NamedTuple):
    """Where each token stands.

    Attributes:
        positions: In its own sequence.
        sequences: Which of its row it belongs to; padding belongs to one of its own.
    """

    positions: Int[Array, "batch seq"]
    sequences: Int[Array, "batch seq"]


def after_block(
    config: GemmaConfig,
    weights: BlockWeights,
    traits: LayerTraits,
    x: Float[Array, "1 tokens width"],
    rows: SequenceRows,
    project: Project,
) -> Float[Array, "1 tokens width"]:
    """The residual stream after a block of which ``project`` makes the products."""
    after, _ = block(
        config, weights, traits, x, rows.positions, sequences=rows.sequences, project=project
    )
    return after


def block_forward(
    config: GemmaConfig,
    weights: BlockWeights,
    traits: LayerTraits,
    x: Float[Array, "1 tokens width"],
    rows: SequenceRows,
    num_real: Int[Array, ""],
    *,
    is_native: bool,
    keeps: bool,
) -> tuple[Float[Array, "1 tokens width"], dict[str, Array]]:
    """The residual stream after a block, and what its products made, or nothing.

    Args:
        config: Architecture (static).
        weights: Of the block.
        traits: Of the layer.
        x: What enters the block.
        rows: Where its tokens stand.
        num_real: Tokens in front of the padding; native products compute no more.
        is_native: Products are made by the native kernel, not by XLA.
        keeps: The products are told.
    """
    kept: dict[str, Array] = {}

    def project(field: str, inner: Array) -> Array:
        made = _projected(inner, getattr(weights, field), num_real, is_native=is_native)
        if keeps:
            kept[field] = made
        return made

    return after_block(config, weights, traits, x, rows, project), kept


def block_backward(
    config: GemmaConfig,
    weights: BlockWeights,
    traits: LayerTraits,
    x: Float[Array, "1 tokens width"],
    rows: SequenceRows,
    num_real: Int[Array, ""],
    kept: dict[str, Array],
    derivative: Float[Array, "1 tokens width"],
    *,
    is_native: bool,
) -> Float[Array, "1 tokens width"]:
    """The derivative of a number by what enters a block.

    ``derivative`` is the number's by what leaves the block; the rest as in `block_forward`.
    """

    def project(field: str, inner: Array) -> Array:
        weight = getattr(weights, field)
        if kept:
            return _kept_product(is_native, inner, weight, kept[field], num_real)
        return _projected(inner, weight, num_real, is_native=is_native)

    _, pull_back = jax.vjp(
        lambda before: after_block(config, weights, traits, before, rows, project), x
    )
    [by_x] = pull_back(derivative)
    found: Array = by_x
    return found


def _projected(x: Array, weight: Array, num_real: Array, *, is_native: bool) -> Array:
    if is_native:
        return _real_product(x, weight, num_real)
    return projection(x, weight)


# Nothing is differentiated by a weight, or by what was kept.


@jax.custom_vjp
def _real_product(x: Array, weight: Array, num_real: Array) -> Array:
    """By the kernels in both directions."""
    return product(x[0], weight, num_real)[None]


def _keep_weight(x: Array, weight: Array, num_real: Array) -> tuple[Array, tuple[Array, Array]]:
    return _real_product(x, weight, num_real), (weight, num_real)


def _pull_back_real(given: tuple[Array, Array], derivative: Array) -> tuple[Array, None, None]:
    weight, num_real = given
    return back_product(derivative[0], weight, num_real)[None], None, None


_real_product.defvjp(_keep_weight, _pull_back_real)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kept_product(is_native: bool, x: Array, weight: Array, kept: Array, num_real: Array) -> Array:
    """What was kept, as if it had been made of ``x`` just now."""
    return kept


def _keep_given(is_native: bool, x: Array, *given: Any) -> tuple[Array, tuple[Any, ...]]:
    return given[1], given


def _pull_back_kept(
    is_native: bool, given: tuple[Any, ...], derivative: Array
) -> tuple[Array, None, None, None]:
    weight, _, num_real = given
    if is_native:
        return back_product(derivative[0], weight, num_real)[None], None, None, None
    return derivative @ weight, None, None, None


_kept_product.defvjp(_keep_given, _pull_back_kept)
