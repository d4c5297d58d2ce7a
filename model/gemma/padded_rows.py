"""Keeps the number of rows out of the bits of a decode step.

XLA compiles an elementwise chain or a norm differently for 2, 4 or 8 rows, and rounds differently
then. Products with a weight matrix do not: the native kernel gives a row the same bits among 1 to
32 rows, XLA on a CPU from 2 to 8. So in a decode step everything but the products and the attention
runs at one row count, whatever the number of real rows, and barriers keep XLA from fusing across
the border::

    norm, RoPE, gates, sums    8 rows    | real | real | real | zero | zero | ...
    product, attention         3 rows    | real | real | real |

With the native kernel all of a block is apart from XLA; only the norm before the head is padded
then, to 32 rows, as that many may be real.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

_PADDED_ROWS = 8
_NATIVE_PADDED_ROWS = 32


class StepRows(NamedTuple):
    """The rows of a decode step; every field is static.

    Attributes:
        num_real: Rows that hold a sequence; the rest fill up.
        num_padded: All rows.
        is_native: Products are made by the native kernel, not by XLA.
    """

    num_real: int
    num_padded: int
    is_native: bool


def step_rows(num_real: int, *, is_native: bool) -> StepRows:
    """The rows of a step of ``num_real`` rows."""
    return StepRows(num_real, _NATIVE_PADDED_ROWS if is_native else _PADDED_ROWS, is_native)


def pad_rows(
    x: Shaped[Array, "rows *rest"], num_padded: int, filler: int | float = 0
) -> Shaped[Array, "padded *rest"]:
    """``x`` with rows of ``filler`` behind it, ``num_padded`` in all."""
    missing = num_padded - x.shape[0]
    assert missing >= 0, f"{x.shape[0]} rows in a step of {num_padded}"
    if missing == 0:
        return x
    return jnp.concatenate([x, jnp.full((missing, *x.shape[1:]), filler, x.dtype)])


def real_rows(x: Float[Array, "padded *rest"], rows: StepRows | None) -> Float[Array, "rows *rest"]:
    """The real rows, apart from what made them; all of them, as they are, if None."""
    if rows is None:
        return x
    return jax.lax.optimization_barrier(x)[: rows.num_real]


def padded_again(
    x: Float[Array, "rows *rest"], rows: StepRows | None
) -> Float[Array, "padded *rest"]:
    """The reverse of `real_rows`, apart from what uses it."""
    if rows is None:
        return x
    return jax.lax.optimization_barrier(pad_rows(x, rows.num_padded))
