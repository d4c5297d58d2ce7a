"""What adapters of a bank add to a projection, each token by the slot that it names.

A bank holds for each slot, head and rank a row of A and a row of B (`model.adapter_bank`). A token
that names slot s > 0 gains ``(x · A[s−1, h]ᵀ) · B[s−1, h]`` in every head h; one that names 0 is
the base's and gains nothing, not even a zero. So tokens of several adapters and of the base share a
batch.

Nothing of a neighbour may enter. The native block adds in one order whatever else there is. XLA's
products need the same shapes for the same bits, so there every span of tokens that belong together
goes by itself, in tiles of one shape from its beginning; a batch without an adapter makes no tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Tokens of a prompt that go together with XLA.
_TILE_TOKENS = 8


class TokenSlots(NamedTuple):
    """For the native call: the slot of each token."""

    slots: Int[Array, " tokens"]


class SpanSlots(NamedTuple):
    """For XLA: spans of consecutive tokens, of which the first ``num_spans`` are real.

    ``tile_tokens`` is static.
    """

    slots: Int[Array, " spans"]
    offsets: Int[Array, " spans"]
    lengths: Int[Array, " spans"]
    num_spans: Int[Array, ""]
    tile_tokens: int


AdapterSlots = TokenSlots | SpanSlots


class BankPair(NamedTuple):
    """The matrices of one projection of one layer, for all slots of a bank."""

    a: Float[Array, "slots heads rank in_width"]
    b: Float[Array, "slots heads rank out_per_head"]


class BankTerm(NamedTuple):
    """What the adapters of a bank add to one projection.

    Attributes:
        pair: Of all slots.
        ranks: Of each slot's adapter, 0 where it does not have this projection.
        used: Which token names which slot.
    """

    pair: BankPair
    ranks: Int[Array, " slots"]
    used: AdapterSlots


def row_slots(slots: Int[Array, " rows"], *, is_native: bool) -> AdapterSlots:
    """Of a decode step, whose rows have one token each."""
    if is_native:
        return TokenSlots(slots)
    count = slots.shape[0]
    places = jnp.arange(count, dtype=jnp.int32)
    return SpanSlots(slots, places, jnp.ones_like(places), jnp.int32(count), 1)


def prompt_slots(
    slots: Int[Array, " prompts"],
    offsets: Int[Array, " prompts"],
    lengths: Int[Array, " prompts"],
    num_prompts: Int[Array, ""],
    num_tokens: int,
    *,
    is_native: bool,
) -> AdapterSlots:
    """Of a chunk, in which prompts lie one behind the other; padding names no slot."""
    if not is_native:
        return SpanSlots(slots, offsets, lengths, num_prompts, _TILE_TOKENS)
    places = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    is_own = (places >= offsets[:, None]) & (places < (offsets + lengths)[:, None])
    is_prompt = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None] < num_prompts
    return TokenSlots(jnp.sum(jnp.where(is_own & is_prompt, slots[:, None], 0), axis=0))


def add_adapters(
    y: Float[Array, "tokens out_width"], x: Float[Array, "tokens in_width"], term: BankTerm
) -> Float[Array, "tokens out_width"]:
    """``y``, what the kernel made of ``x``, with what the adapters add; by XLA."""
    assert isinstance(term.used, SpanSlots), "the native block adds by itself"
    return _add_by_spans(y, x, term, term.used)


def _add_by_spans(
    y: Float[Array, "tokens out_width"],
    x: Float[Array, "tokens in_width"],
    term: BankTerm,
    spans: SpanSlots,
) -> Float[Array, "tokens out_width"]:
    (a, b), tile = term.pair, spans.tile_tokens
    pairs = jnp.clip(spans.slots - 1, 0, a.shape[0] - 1)
    is_adapted = (spans.slots > 0) & (term.ranks[pairs] > 0)
    is_real = jnp.arange(spans.slots.shape[0]) < spans.num_spans
    num_spans = jnp.where(jnp.any(is_adapted & is_real), spans.num_spans, 0)
    # Room for a tile that begins at the last token.
    room = tile - 1
    wide_x, wide_y = (jnp.pad(each, ((0, room), (0, 0))) for each in (x, y))

    def add_span(index: Int[Array, ""], y: Array) -> Array:
        offset, length = spans.offsets[index], spans.lengths[index]
        own_a, own_b = a[pairs[index]], b[pairs[index]]

        def add_tile(number: Int[Array, ""], y: Array) -> Array:
            place = offset + number * tile
            before = jax.lax.dynamic_slice_in_dim(y, place, tile)
            of_x = jax.lax.dynamic_slice_in_dim(wide_x, place, tile)
            added = _pair_of_products(of_x, own_a, own_b)
            is_own = jnp.arange(tile, dtype=jnp.int32) < length - number * tile
            after = jnp.where(is_own[:, None], before + added, before)
            return jax.lax.dynamic_update_slice_in_dim(y, after, place, axis=0)

        num_tiles = jnp.where(is_adapted[index], (length + (tile - 1)) // tile, 0)
        tiled: Array = jax.lax.fori_loop(0, num_tiles, add_tile, y)
        return tiled

    added: Array = jax.lax.fori_loop(0, num_spans, add_span, wide_y)
    return added[: y.shape[0]]


def _pair_of_products(
    x: Float[Array, "tile in_width"],
    a: Float[Array, "heads rank in_width"],
    b: Float[Array, "heads rank out_per_head"],
) -> Float[Array, "tile out_width"]:
    heads, rank, in_width = a.shape
    # [heads · rank, tile]
    low = jax.lax.dot_general(a.reshape(heads * rank, in_width), x, (((1,), (1,)), ((), ())))
    low = low.reshape(heads, rank, x.shape[0])
    # Heads first: [heads, tile, out]
    added = jax.lax.dot_general(low, b, (((1,), (1,)), ((0,), (0,))))
    return added.transpose(1, 0, 2).reshape(x.shape[0], -1)
