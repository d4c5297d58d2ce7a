"""Attention over given keys, and over the blocks of a slot's cache.

`attend` takes any mask and one softmax: forward passes without a cache, and training. `attend_slot`
walks the blocks of one slot in ascending order with a running softmax, so that the number of blocks
is a loop bound and not a shape, and a longer neighbour cannot change a bit of the result. Both are
the same function of the same numbers; tests compare them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.gemma import kv_cache, masks
from model.gemma.kv_cache import LayerCache
from model.slot_memory import BLOCK_TOKENS

# What keras-hub puts where a key is hidden before the softmax (spec 1.5).
_MASKED_LOGIT = -1e9
# Below every real logit; finite, so that a block of hidden keys yields zeros and not NaN.
_NO_MAXIMUM = -1e30


def soft_cap(logits: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """``cap · tanh(logits / cap)``, which bounds logits to ±cap; unchanged if ``cap`` is None."""
    return logits if cap is None else jnp.tanh(logits / cap) * cap


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "batch seq keys"],
    *,
    logit_cap: float | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention; query head n reads key/value head n // (N / K).

    Args:
        query: Already scaled by 1 / sqrt(H).
        key: After RoPE.
        value: As projected.
        mask: True where a query may see a key. A query that sees none gets zeros.
        logit_cap: Soft cap on the logits, before the mask.
    """
    batch, seq, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim)
    logits = soft_cap(jnp.einsum("btkgh,bskh->bkgts", grouped, key), logit_cap)
    where = mask[:, None, None]  # [B, 1, 1, L, S]
    masked = jnp.where(where, logits.astype(jnp.float32), _MASKED_LOGIT)
    weights = jnp.where(where, jax.nn.softmax(masked, axis=-1), 0.0).astype(logits.dtype)
    context = jnp.einsum("bkgts,bskh->btkgh", weights, value)
    return context.reshape(batch, seq, heads, head_dim)


def attend_slot(
    query: Float[Array, "seq heads head_dim"],
    cache: LayerCache,
    slot: Int[Array, ""],
    positions: Int[Array, " seq"],
    window_tokens: Int[Array, ""],
    *,
    logit_cap: float | None,
    last_position: Int[Array, ""] | None = None,
) -> Float[Array, "seq heads head_dim"]:
    """Attention of consecutive queries of one sequence over its slot, which already holds them.

    The blocks from the first that the first query sees to the last that the last query sees::

        window 512, queries at 700..703:   block 0   block 1   block 2
                                           189..255  256..511  512..703

    Args:
        query: Already scaled by 1 / sqrt(H).
        cache: Of this layer.
        slot: Row of the cache. One that does not exist reads the last slot: finite nonsense.
        positions: Absolute, ascending by one.
        window_tokens: Width of the sliding window; `masks.UNLIMITED_WINDOW_TOKENS` for none.
        logit_cap: Soft cap on the logits, before the mask.
        last_position: Of the sequence so far, if some queries are padding behind it.

    Source: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867, algorithm 3.
    """
    seq, heads, head_dim = query.shape
    kv_heads = cache.keys.shape[1]
    grouped = query.reshape(seq, kv_heads, heads // kv_heads, head_dim)
    if last_position is None:
        last_position = positions[-1]
    first_block = jnp.maximum(positions[0] - window_tokens + 1, 0) // BLOCK_TOKENS
    end_block = positions[-1] // BLOCK_TOKENS + 1

    def add_block(
        block: Int[Array, ""], carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        maximum, total, context = carry
        keys = kv_cache.read_block(cache.keys, slot, block)
        values = kv_cache.read_block(cache.values, slot, block)
        key_positions = block * BLOCK_TOKENS + jnp.arange(BLOCK_TOKENS, dtype=positions.dtype)
        # What lies beyond the last token is another sequence's. A weight of zero does not hide it
        # if it is NaN.
        is_own = (key_positions <= last_position)[None, :, None]
        values = jnp.where(is_own, values, jnp.zeros((), values.dtype))
        where = masks.visible(positions, key_positions, window_tokens)[None, None]
        logits = soft_cap(jnp.einsum("tkgh,ksh->kgts", grouped, keys), logit_cap)
        logits = jnp.where(where, logits.astype(jnp.float32), _NO_MAXIMUM)
        new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=-1))  # [K, G, L]
        shrink = jnp.exp(maximum - new_maximum)
        weights = jnp.where(where, jnp.exp(logits - new_maximum[..., None]), 0.0)
        added = jnp.einsum("kgts,ksh->kgth", weights.astype(values.dtype), values)
        return (
            new_maximum,
            total * shrink + jnp.sum(weights, axis=-1),
            context * shrink[..., None] + added.astype(jnp.float32),
        )

    shape = (kv_heads, heads // kv_heads, seq)
    start = (
        jnp.full(shape, _NO_MAXIMUM, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    _, total, context = jax.lax.fori_loop(first_block, end_block, add_block, start)
    normalized = (context / total[..., None]).astype(query.dtype)  # [K, G, L, H]
    return normalized.transpose(2, 0, 1, 3).reshape(seq, heads, head_dim)
