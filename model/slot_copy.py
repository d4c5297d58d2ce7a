"""The prompt of one slot in another: prefilled once, held by every output that continues it.

Only whole blocks are copied, and only those that the prompt reached. A ring has fewer blocks than
a long prompt; all of them are copied then, and hold what the later positions see. A beam that goes
on in another slot leaves out the first blocks, which that slot holds alike.
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
    first_block: Int[Array, ""],
    end_block: Int[Array, ""],
) -> list[LayerCache]:
    """The caches with blocks ``first_block`` to ``end_block − 1`` of ``source`` in ``target`` too.

    The blocks before must be there already.
    """
    return [_copy_in_layer(cache, source, target, first_block, end_block) for cache in caches]


def _copy_in_layer(
    cache: LayerCache,
    source: Int[Array, ""],
    target: Int[Array, ""],
    first_block: Int[Array, ""],
    end_block: Int[Array, ""],
) -> LayerCache:
    def copy_block(block: Int[Array, ""], cache: LayerCache) -> LayerCache:
        return LayerCache(
            _copy_block(cache.keys, source, target, block),
            _copy_block(cache.values, source, target, block),
        )

    # The blocks are loop bounds, so one program serves prompts of any length. In a ring that has
    # gone round a block is no longer where its number says.
    num_held = cache.num_positions // BLOCK_TOKENS
    first = jnp.where(end_block > num_held, 0, first_block)
    end = jnp.minimum(end_block, num_held)
    copied: LayerCache = jax.lax.fori_loop(first, end, copy_block, cache)
    return copied


def _copy_block(
    array: Float[Array, "slots kv_heads cache head_dim"],
    source: Int[Array, ""],
    target: Int[Array, ""],
    block: Int[Array, ""],
) -> Float[Array, "slots kv_heads cache head_dim"]:
    start = (target, 0, block * BLOCK_TOKENS, 0)
    return jax.lax.dynamic_update_slice(array, read_block(array, source, block)[None], start)
