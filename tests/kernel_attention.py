"""Attention apart from all else that a native block does.

Tokens are unit vectors, so a column of a matrix is what each of them has for its query, key or
value; the rotation turns by nothing, and the feed-forward part adds nothing::

    x = 2^k · e_r     norm: 2^k · e_r     query: column r of W     y = x + context
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from model.kernels.block import native_block


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
    """What each row's token gathers from its slot; its own key and value stand there already."""
    rows, heads, head_dim = query.shape
    num_places = keys.shape[2]
    numbers = heads * head_dim
    # A root that is a power of two, so that nothing is rounded.
    root = 1
    while root * root < numbers + rows:
        root *= 2
    width = root * root
    x = jnp.zeros((rows, width)).at[jnp.arange(rows), numbers + jnp.arange(rows)].set(root)

    def columns(of_rows: Array) -> Array:
        """A matrix that gives each row its own numbers."""
        flat = of_rows.reshape(rows, -1).T / root
        return jnp.zeros((flat.shape[0], width)).at[:, numbers : numbers + rows].set(flat)

    def own(array: Array) -> Array:
        return array.at[slots, :, positions % num_places].get(mode="fill", fill_value=0.0)

    none = jnp.zeros(width)
    nothing = jnp.zeros((1, width))
    output = jnp.zeros((width, numbers)).at[:numbers].set(jnp.eye(numbers))
    norm, no_norm = none, None
    matrices = (columns(query), columns(own(keys)), columns(own(values)))
    y, _, _ = native_block(
        x,
        jnp.int32(rows),
        slots,
        positions,
        window_tokens,
        jnp.zeros(head_dim // 2),
        keys,
        values,
        (
            *(norm, *matrices, no_norm, no_norm, output, no_norm),
            *(norm, nothing, nothing, nothing.T, no_norm),
        ),
        epsilon=0.0,
        query_scale=1.0,
        logit_cap=logit_cap,
    )
    return y[:, :numbers].reshape(query.shape)


compiled_attention = jax.jit(decode_attention, static_argnames="logit_cap")
