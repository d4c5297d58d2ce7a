"""A block of a micro-batch: forward, keeping its products, and backward from them.

Rows of several jobs lie one behind the other, each from a multiple of its own power of two on, so
that attention sums a row alike wherever it stands. Backward computes norms, gates and attention
again but no product with a weight: what these made was kept. The derivative by an adapter's pairs
is formed row by row, tile by tile in the order of its tokens, so that no row meets another.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.block_gradient import SequenceRows, after_block
from model.config import GemmaConfig
from model.gemma.block import LayerTraits
from model.gemma.weights import BlockWeights
from model.kernels.back_product import back_product
from model.kernels.product import product

# Rows begin at multiples of it.
TILE_TOKENS = 16


class RowPairs(NamedTuple):
    """The pairs of one projection, one of each adapter of a micro-batch."""

    a: Float[Array, "adapters heads rank in_width"]
    b: Float[Array, "adapters heads rank out_per_head"]
    is_used: Bool[Array, " adapters"]


class TileRows(NamedTuple):
    """Which row and which adapter each tile of tokens belongs to; padding to row ``rows``.

    Native products compute the first ``num_real`` tokens only: behind them is nothing but padding.
    """

    rows: Int[Array, " tiles"]
    adapters: Int[Array, " tiles"]
    num_real: Int[Array, ""]


Pairs = Mapping[str, RowPairs]
Kept = dict[str, Array]


def forward_keeping(
    config: GemmaConfig,
    weights: BlockWeights,
    traits: LayerTraits,
    x: Float[Array, "1 tokens width"],
    rows: SequenceRows,
    tiles: TileRows,
    pairs: dict[str, RowPairs],
    *,
    is_native: bool,
) -> tuple[Float[Array, "1 tokens width"], dict[str, Array]]:
    """The residual stream after a block, and what its products made."""
    kept: Kept = {}

    def project(field: str, before: Array) -> Array:
        flat, weight = before[0], getattr(weights, field)
        made = product(flat, weight, tiles.num_real) if is_native else _plain_product(flat, weight)
        kept[field] = _with_pairs(made, flat, pairs[field], tiles)
        return kept[field][None]

    return after_block(config, weights, traits, x, rows, project), kept


def backward_from_kept(
    config: GemmaConfig,
    weights: BlockWeights,
    traits: LayerTraits,
    x: Float[Array, "1 tokens width"],
    rows: SequenceRows,
    tiles: TileRows,
    pairs: dict[str, RowPairs],
    kept: dict[str, Array],
    derivative: Float[Array, "1 tokens width"],
    *,
    num_rows: int,
    is_native: bool,
) -> tuple[Float[Array, "1 tokens width"], dict[str, tuple[Array, Array]]]:
    """The derivative by what entered the block, and by the pairs of each row."""

    # What is differentiated by stands for the pairs of each row; only its shape is used.
    row_pairs = {
        field: (
            jnp.zeros((num_rows, *pair.a.shape[1:]), jnp.float32),
            jnp.zeros((num_rows, *pair.b.shape[1:]), jnp.float32),
        )
        for field, pair in pairs.items()
    }

    def run(before: Array, row_pairs: dict[str, tuple[Array, Array]]) -> Array:
        def project(field: str, inner: Array) -> Array:
            given = (getattr(weights, field), kept[field], pairs[field], tiles)
            return _kept_product(is_native, inner[0], row_pairs[field], *given)[None]

        return after_block(config, weights, traits, before, rows, project)

    _, pull_back = jax.vjp(run, x, row_pairs)
    by_x, by_pairs = pull_back(derivative)
    return by_x, by_pairs


def _plain_product(x: Array, weight: Array) -> Array:
    """x · Wᵀ; written so, a CPU gives a row the same bits among 64 to 512."""
    made: Array = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))
    apart: Array = jax.lax.optimization_barrier(made)
    return apart


def _in_tiles(x: Array) -> Array:
    return x.reshape(-1, TILE_TOKENS, x.shape[-1])


def _low(x: Array, pair: RowPairs, tiles: TileRows) -> Array:
    return jnp.einsum("tli,thri->tlhr", _in_tiles(x), pair.a[tiles.adapters])


def _is_own(pair: RowPairs, tiles: TileRows) -> Array:
    """Of each token: whether its adapter has this projection."""
    return jnp.repeat(pair.is_used[tiles.adapters], TILE_TOKENS)[:, None]


def _with_pairs(made: Array, x: Array, pair: RowPairs, tiles: TileRows) -> Array:
    def added() -> Array:
        more = jnp.einsum("tlhr,thro->tlho", _low(x, pair, tiles), pair.b[tiles.adapters])
        return jnp.where(_is_own(pair, tiles), made + more.reshape(made.shape), made)

    changed: Array = jax.lax.cond(jnp.any(pair.is_used), added, lambda: made)
    apart: Array = jax.lax.optimization_barrier(changed)
    return apart


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kept_product(
    is_native: bool,
    x: Array,
    row_pairs: tuple[Array, Array],
    weight: Array,
    kept: Array,
    pair: RowPairs,
    tiles: TileRows,
) -> Array:
    return kept


def _keep(is_native: bool, *given: Any) -> tuple[Array, Any]:
    return given[3], given


def _pull_back(is_native: bool, given: Any, derivative: Array) -> tuple[Any, ...]:
    x, (zero_a, zero_b), weight, _, pair, tiles = given
    made = back_product(derivative, weight, tiles.num_real) if is_native else derivative @ weight
    by_x = jax.lax.optimization_barrier(made)
    heads = pair.a.shape[1]

    def through_pairs() -> tuple[Array, Array, Array]:
        by_head = _in_tiles(derivative).reshape(-1, TILE_TOKENS, heads, zero_b.shape[-1])
        by_low = jnp.einsum("tlho,thro->tlhr", by_head, pair.b[tiles.adapters])
        more = jnp.einsum("tlhr,thri->tli", by_low, pair.a[tiles.adapters])
        tile_a = jnp.einsum("tlhr,tli->thri", by_low, _in_tiles(x))
        tile_b = jnp.einsum("tlhr,tlho->thro", _low(x, pair, tiles), by_head)

        def add_tile(tile: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            row = tiles.rows[tile]
            return (
                sums[0].at[row].add(tile_a[tile], mode="drop"),
                sums[1].at[row].add(tile_b[tile], mode="drop"),
            )

        by_a, by_b = jax.lax.fori_loop(0, tile_a.shape[0], add_tile, (zero_a, zero_b))
        changed = jnp.where(_is_own(pair, tiles), by_x + more.reshape(by_x.shape), by_x)
        return changed, by_a, by_b

    def past_them() -> tuple[Array, Array, Array]:
        return by_x, zero_a, zero_b

    by_x, by_a, by_b = jax.lax.cond(jnp.any(pair.is_used), through_pairs, past_them)
    # Nothing else is differentiated by.
    return by_x, (by_a, by_b), None, None, None, None


_kept_product.defvjp(_keep, _pull_back)
