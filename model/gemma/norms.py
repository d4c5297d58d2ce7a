"""RMS normalisation."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*leading width"], scale: Float[Array, " width"], *, epsilon: float
) -> Float[Array, "*leading width"]:
    """``x / sqrt(mean(x²) + epsilon) · (1 + scale)`` over the last axis, in the dtype of ``x``.

    Everything up to the last cast is float32: a bfloat16 sum of 640 squares loses the mean.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, eq. 4; the 1 + scale and
    the order of operations are Gemma's (spec 1.4).
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normalized = wide * (1.0 / jnp.sqrt(mean_square + epsilon))
    return (normalized * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
