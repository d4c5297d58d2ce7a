"""Keeps the number of rows out of the bits of a decode step.

XLA compiles an elementwise chain or a norm differently for 2, 4 or 8 rows, and rounds differently
then. Products with a weight matrix do not: from 2 to 8 rows they give a row the same bits on this
backend. So in a decode step everything but the products and the attention runs at one row count,
whatever the number of real rows, and barriers keep XLA from fusing across the border::

    norm, RoPE, gates, sums    8 rows    | real | real | real | zero | zero | ...
    product, attention         3 rows    | real | real | real |
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

PADDED_ROWS = 8


def pad_rows(
    x: Shaped[Array, "rows *rest"], filler: int | float = 0
) -> Shaped[Array, "padded *rest"]:
    """``x`` with rows of ``filler`` behind it, `PADDED_ROWS` in all."""
    missing = PADDED_ROWS - x.shape[0]
    assert missing >= 0, f"{x.shape[0]} rows in one dispatch"
    if missing == 0:
        return x
    return jnp.concatenate([x, jnp.full((missing, *x.shape[1:]), filler, x.dtype)])


def real_rows(x: Float[Array, "padded *rest"], num_rows: int | None) -> Float[Array, "rows *rest"]:
    """The first ``num_rows`` rows, apart from what made them; all of them, as they are, if None."""
    if num_rows is None:
        return x
    return jax.lax.optimization_barrier(x)[:num_rows]


def padded_again(
    x: Float[Array, "rows *rest"], num_rows: int | None
) -> Float[Array, "padded *rest"]:
    """The reverse of `real_rows`, apart from what uses it."""
    if num_rows is None:
        return x
    return jax.lax.optimization_barrier(pad_rows(x))
