"""Random first values, as a fresh keras-hub model has them, drawn in pieces.

A draw needs several times the memory of what it draws, so a large table is filled piece by piece:
a model of 5 GB is made in little more than 5 GB.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from model.weight_names import EMBEDDINGS, WeightSpec

_PIECE_ELEMENTS = 1 << 22


def random_initializer(spec: WeightSpec, seed: int, index: int) -> Any:
    """A Keras initializer for one weight (spec 1.1), with a draw of its own.

    Keras-hub gives the four projections of a block one seed, so its keys equal its values. Not so
    here.

    Args:
        spec: Norms are zeros, the table is normal, kernels are Glorot uniform.
        seed: Of the model.
        index: Of the weight in it.
    """

    def initialize(shape: tuple[int, ...], dtype: Any = None) -> Array:
        assert tuple(shape) == spec.shape, f"{shape} is not {spec.shape}"
        if len(spec.shape) == 1:
            return jnp.zeros(spec.shape, dtype)
        key = jax.random.fold_in(jax.random.key(seed), index)
        return _draw(key, spec.shape, jnp.dtype(dtype).name, is_normal=spec.name == EMBEDDINGS)

    return initialize


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "is_normal"))
def _draw(
    key: PRNGKeyArray, shape: tuple[int, int], dtype: str, *, is_normal: bool
) -> Float[Array, "rows columns"]:
    rows, columns = shape
    piece_rows = max(1, min(rows, _PIECE_ELEMENTS // columns))
    num_pieces = -(-rows // piece_rows)

    def fill(piece: Int[Array, ""], drawn: Array) -> Array:
        piece_key = jax.random.fold_in(key, piece)
        values = _piece(piece_key, (piece_rows, columns), shape, is_normal=is_normal)
        # The last piece begins early enough to fit; what it overwrites was random, too.
        start = jnp.minimum(piece * piece_rows, rows - piece_rows)
        return jax.lax.dynamic_update_slice(drawn, values.astype(drawn.dtype), (start, 0))

    return jax.lax.fori_loop(0, num_pieces, fill, jnp.zeros(shape, dtype))


def _piece(
    key: PRNGKeyArray, piece: tuple[int, int], shape: tuple[int, int], *, is_normal: bool
) -> Float[Array, "rows columns"]:
    fan_out, fan_in = shape
    if is_normal:
        return jax.random.normal(key, piece, jnp.float32) * fan_out**-0.5
    limit = (6.0 / (fan_in + fan_out)) ** 0.5
    return jax.random.uniform(key, piece, jnp.float32, -limit, limit)
