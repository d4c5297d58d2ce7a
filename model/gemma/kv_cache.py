"""Keys and values of the sequences that are being generated, one slot for each.

A layer's cache is indexed by absolute position. A global layer keeps every position of the
context. A local layer keeps a ring: position p stands at p modulo the ring's length, and what it
overwrites has left the window of every later token. With a window of 512 and blocks of 256::

    positions   0..255  256..511  512..767 | 768..1023  1024..1279 ...
    ring block     0        1         2    |     0          1

Nothing depends on what lies beyond a row's own positions, so a slot is never cleared.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.config import GemmaConfig
from model.slot_memory import BLOCK_TOKENS, num_cache_positions


class LayerCache(NamedTuple):
    """Keys (after RoPE) and values of one layer, all slots; the cache axis is a block multiple."""

    keys: Float[Array, "slots kv_heads cache head_dim"]
    values: Float[Array, "slots kv_heads cache head_dim"]

    @property
    def num_positions(self) -> int:
        """Positions that the layer can hold at once."""
        return self.keys.shape[2]


def allocate(
    config: GemmaConfig, num_slots: int, context_tokens: int, dtype: jnp.dtype
) -> list[LayerCache]:
    """A zero cache for ``num_slots`` sequences of up to ``context_tokens``, layer by layer."""
    caches = []
    for layer in range(config.num_layers):
        positions = num_cache_positions(config, layer, context_tokens)
        shape = (num_slots, config.num_key_value_heads, positions, config.head_dim)
        caches.append(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    return caches


def write(
    cache: LayerCache,
    slots: Int[Array, " batch"],
    positions: Int[Array, "batch seq"],
    keys: Float[Array, "batch seq kv_heads head_dim"],
    values: Float[Array, "batch seq kv_heads head_dim"],
) -> LayerCache:
    """The cache with each row's new keys and values at its own slot and positions.

    A single token per row (a decode step) may name the slot that does not exist:
    its write is dropped. That is how a row that only fills up a batch leaves no trace. A chunk
    must name real slots, start at a block boundary and hold consecutive positions.
    """
    offsets = positions % cache.num_positions
    if keys.shape[1] == 1:
        index = (slots, slice(None), offsets[:, 0])
        return LayerCache(
            cache.keys.at[index].set(keys[:, 0], mode="drop"),
            cache.values.at[index].set(values[:, 0], mode="drop"),
        )
    new_keys, new_values = cache
    for row in range(keys.shape[0]):
        start = (slots[row], 0, offsets[row, 0], 0)
        chunk_keys = keys[row].swapaxes(0, 1)[None]  # [1, K, L, H]
        chunk_values = values[row].swapaxes(0, 1)[None]
        new_keys = jax.lax.dynamic_update_slice(new_keys, chunk_keys, start)
        new_values = jax.lax.dynamic_update_slice(new_values, chunk_values, start)
    return LayerCache(new_keys, new_values)


def write_prompt(
    cache: LayerCache,
    slot: Int[Array, ""],
    start: Int[Array, ""],
    length: Int[Array, ""],
    keys: Float[Array, "seq kv_heads head_dim"],
    values: Float[Array, "seq kv_heads head_dim"],
) -> LayerCache:
    """The cache with the first ``length`` keys and values at ``start`` and behind it.

    They lie within one block. What stands around them stays.
    """
    seq, offset = keys.shape[0], start % cache.num_positions
    # Near the end of the cache the shape of all that is given reaches back.
    first = jnp.minimum(offset, cache.num_positions - seq)
    shift = offset - first
    places = jnp.arange(seq, dtype=jnp.int32)
    is_own = ((places >= shift) & (places < shift + length))[None, None, :, None]

    def written(
        array: Float[Array, "slots kv_heads cache head_dim"],
        new: Float[Array, "seq kv_heads head_dim"],
    ) -> Float[Array, "slots kv_heads cache head_dim"]:
        zero = jnp.zeros((), offset.dtype)
        corner = (slot.astype(offset.dtype), zero, first, zero)
        moved = jnp.roll(new, shift, axis=0).swapaxes(0, 1)[None]  # [1, K, L, H]
        before = jax.lax.dynamic_slice(array, corner, moved.shape)
        return jax.lax.dynamic_update_slice(array, jnp.where(is_own, moved, before), corner)

    return LayerCache(written(cache.keys, keys), written(cache.values, values))


def read_block(
    array: Float[Array, "slots kv_heads cache head_dim"],
    slot: Int[Array, ""],
    block: Int[Array, ""],
) -> Float[Array, "kv_heads block head_dim"]:
    """Positions ``256 · block`` to ``256 · block + 255`` of one slot, wherever they stand."""
    _, kv_heads, num_positions, head_dim = array.shape
    offset = (block * BLOCK_TOKENS) % num_positions
    zero = jnp.zeros((), offset.dtype)
    start = (slot.astype(offset.dtype), zero, offset, zero)
    return jax.lax.dynamic_slice(array, start, (1, kv_heads, BLOCK_TOKENS, head_dim))[0]
