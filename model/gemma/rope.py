"""Rotary position embedding, in the half-split layout of the released Gemma weights."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def inverse_frequencies(
    head_dim: int, *, theta: float, scale: float = 1.0
) -> Float[Array, " half_head_dim"]:
    """``theta ** (-2i / head_dim) / scale``, radians per position, for each pair i.

    An array and not a constant of the program, so that one compiled block serves local layers
    (theta 10,000) and global ones (theta 1,000,000 in Gemma 3).

    Args:
        head_dim: H, even.
        theta: Base of the wavelengths.
        scale: Positions are stretched by it: 8 in the global layers of the larger Gemma 3.
    """
    exponents = -jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return jnp.power(jnp.float32(theta), exponents) / jnp.float32(scale)


def apply_rope(
    x: Float[Array, "batch seq heads head_dim"],
    positions: Int[Array, "batch seq"],
    frequencies: Float[Array, " half_head_dim"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates each pair ``(x[i], x[i + H / 2])`` by ``position · frequencies[i]`` radians.

    Angles, sines and cosines are float32 whatever ``x`` is: at position 8191 a bfloat16 angle is
    wrong by whole radians. The products are in the dtype of ``x``, as in the reference.

    keras-hub interleaves the two halves again for Gemma 1 and 2. Queries and keys are permuted
    alike there, so no logit depends on it; this model leaves it out (spec 1.5).

    Args:
        x: Queries or keys, before the KV cache.
        positions: Absolute position of each token in its own sequence. Padding may hold any value.
        frequencies: Of `inverse_frequencies`.

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies  # [B, L, 1, H/2]
    sin, cos = jnp.sin(angles).astype(x.dtype), jnp.cos(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
