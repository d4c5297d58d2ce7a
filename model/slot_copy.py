"""The prompt of one slot in another: prefilled once, held by every output that continues it.

Only whole blocks are copied, and only those that the prompt reached. A ring has fewer blocks than a
long prompt; all of them are copied then, and hold what the later positions see.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.gemma.kv_cache import LayerCache, read_block
from model.slot_memory import BLOCK_TOKENS


def copy_slot(
    caches: list[LayerCache],
    source: Int[Array, ""],
    target: Int[Array, ""],
    num_blocks: Int[Array, ""],
) -> list[LayerCache]:
    """The caches with the first ``num_blocks`` blocks of ``source`` in ``target`` too."""
    return [_copy_in_layer(cache, source, target, num_blocks) for cache in caches]


def _copy_in_layer(
    cache: LayerCache,
    source: Int[Array, ""],
    target: Int[Array, ""],
    num_blocks: Int[Array, ""],
) -> LayerCache:
    def copy_block(block: Int[Array, ""], cache: LayerCache) -> LayerCache:
        return LayerCache(
            _copy_block(cache.keys, source, target, block),
            _copy_block(cache.values, source, target, block),
        )

    # The number of blocks is a loop bound, so one program serves prompts of any length.
    num_held = jnp.minimum(num_blocks, cache.num_positions // BLOCK_TOKENS)
    copied: LayerCache = jax.lax.fori_loop(0, num_held, copy_block, cache)
    return copied


def _copy_block(
    array: Float[Array, "slots kv_heads cache head_dim"],
    source: Int[Array, ""],
    target: Int[Array, ""],
    block: Int[Array, ""],
) -> Float[Array, "slots kv_heads cache head_dim"]:
    start = (target, 0, block * BLOCK_TOKENS, 0)
    return jax.lax.dynamic_update_slice(array, read_block(array, source, block)[None], start)
