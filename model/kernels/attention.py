"""Decode attention as a native custom call of XLA: one token of each row over its own slot."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

TARGET = "gemma_attention"


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
        window_tokens: How far back a token sees, itself included.
        logit_cap: Soft cap on the logits.

    Raises:
        ValueError: While tracing: the heads cannot be shared out.
    """
    heads, kv_heads = query.shape[1], keys.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads.")
    if query.shape[0] == 0:
        return jnp.zeros_like(query)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(query.shape, query.dtype))
    cap = np.float32(0.0 if logit_cap is None else logit_cap)
    attended: Array = call(query, keys, values, slots, positions, window_tokens, logit_cap=cap)
    return attended
