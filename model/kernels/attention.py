"""Decode attention as a native custom call of XLA: one token of each row over its own slot."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

TARGET = "gemma_attention"
# Query heads that share a key head.
MAX_SHARING_HEADS = 32


def decode_attention(
    query: Float32[Array, "rows heads head_dim"],
    keys: Float32[Array, "slots kv_heads cache head_dim"],
    values: Float32[Array, "slots kv_heads cache head_dim"],
    slots: Int32[Array, " rows"],
    positions: Int32[Array, " rows"],
    window_tokens: Int32[Array, ""],
    *,
    logit_cap: float | None,
) -> Float32[Array, "rows heads head_dim"]:
    """Softmax attention of each row's token over what its slot holds up to it.

    The library must have been loaded (`model.kernels.library`). Key by key in ascending order, so
    nothing of another row enters, nor what stands beyond the token.

    Args:
        query: Already scaled by 1 / sqrt(H); head n reads key/value head n // (N / K).
        keys: Position p of a sequence stands at p modulo the length of the cache.
        values: Likewise.
        slots: Of each row. One that does not exist gives zeros.
        positions: Of each token, absolute.
        window_tokens: How far back a token sees, itself included; one that sees nothing gets zeros.
        logit_cap: Soft cap on the logits.

    Raises:
        ValueError: While tracing: shapes do not fit, too many heads share one, or another dtype.
    """
    _check(query, keys, values, slots, positions, window_tokens)
    if query.size == 0:
        return jnp.zeros_like(query)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(query.shape, query.dtype))
    cap = np.float32(0.0 if logit_cap is None else logit_cap)
    attended: Array = call(query, keys, values, slots, positions, window_tokens, logit_cap=cap)
    return attended


def _check(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    window_tokens: jax.Array,
) -> None:
    rows = query.shape[:1]
    fits = (
        query.ndim == 3
        and keys.ndim == 4
        and keys.shape == values.shape
        and keys.shape[1] > 0
        and keys.shape[2] > 0
        and keys.shape[3] == query.shape[2]
        and (slots.shape, positions.shape, window_tokens.shape) == (rows, rows, ())
    )
    if not fits:
        raise ValueError(
            "query [rows, heads, head_dim], keys and values [slots, kv_heads, cache, head_dim], "
            "slots and positions [rows] and a window [] were expected, "
            f"not {query.shape}, {keys.shape}, {values.shape}, {slots.shape}, {positions.shape} "
            f"and {window_tokens.shape}."
        )
    heads, kv_heads = query.shape[1], keys.shape[1]
    if heads % kv_heads or heads // kv_heads > MAX_SHARING_HEADS:
        raise ValueError(
            f"{heads} query heads cannot share {kv_heads} key heads; "
            f"the kernel takes at most {MAX_SHARING_HEADS} to each."
        )
    floats = [x.dtype.name for x in (query, keys, values)]
    integers = [x.dtype.name for x in (slots, positions, window_tokens)]
    if {*floats} != {"float32"} or {*integers} != {"int32"}:
        raise ValueError(
            f"query, keys and values must be float32, slots, positions and window int32, "
            f"not {', '.join(floats)} and {', '.join(integers)}."
        )
