"""A block of one slot, all layers: out of the caches, and back into any slot.

In a ring the block stands where its positions do, so blocks that go back in ascending order leave a
ring as a prompt of that length does.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.gemma.kv_cache import LayerCache, read_block
from model.slot_memory import BLOCK_TOKENS

KeptBlock = list[tuple[Float[Array, "kv_heads block head_dim"], ...]]


def take_block(
    caches: list[LayerCache], slot: Int[Array, ""], block: Int[Array, ""]
) -> tuple[KeptBlock, Bool[Array, ""]]:
    """Keys and values of one block, layer by layer, and whether all of them are finite."""
    taken = [tuple(read_block(array, slot, block) for array in cache) for cache in caches]
    finite = [jnp.all(jnp.isfinite(array)) for pair in taken for array in pair]
    return taken, jnp.all(jnp.stack(finite))


def put_block(
    caches: list[LayerCache], slot: Int[Array, ""], block: Int[Array, ""], kept: KeptBlock
) -> list[LayerCache]:
    """The caches with a block in its place in ``slot``."""
    new_caches = []
    for cache, arrays in zip(caches, kept, strict=True):
        start = (slot, 0, (block * BLOCK_TOKENS) % cache.num_positions, 0)
        new_caches.append(
            LayerCache._make(
                jax.lax.dynamic_update_slice(whole, array[None], start)
                for whole, array in zip(cache, arrays, strict=True)
            )
        )
    return new_caches
