"""The one seam through which every product with a weight matrix goes.

Kernels are ``[out, in]`` and the product is written W · xᵀ. On a CPU that is what makes a few rows
fast: XLA reads the matrix once, row by row, instead of packing it for a product with a handful of
columns. The barrier keeps XLA's simplifier from turning the product back into x · Wᵀ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.gemma.low_rank import BankTerm, add_adapters
from model.gemma.padded_rows import StepRows, padded_again, real_rows
from model.kernels.product import product


class AdapterTerm(NamedTuple):
    """A low-rank addition to one projection, one for each row of the batch.

    The output of head h gains ``(x · a[h]) · b[h]``; any scale (alpha / rank) is already in ``b``.
    Keras' LoRA repeats one ``b`` for all heads, PEFT's one ``a``; a projection without heads has
    one.
    """

    a: Float[Array, "batch heads in_width rank"]
    b: Float[Array, "batch heads rank out_per_head"]


def projection(
    x: Float[Array, "batch seq in_width"],
    kernel: Float[Array, "out_width in_width"],
    adapter: AdapterTerm | BankTerm | None = None,
    *,
    rows: StepRows | None = None,
) -> Float[Array, "batch seq out_width"]:
    """``x · kernelᵀ``, plus the adapter term of each row if there is one.

    With ``rows``, those of a decode step, only some are real (`model.gemma.padded_rows`).
    """
    return padded_again(real_projection(real_rows(x, rows), kernel, adapter, rows=rows), rows)


def real_projection(
    x: Float[Array, "batch seq in_width"],
    kernel: Float[Array, "out_width in_width"],
    adapter: AdapterTerm | BankTerm | None = None,
    *,
    rows: StepRows | None = None,
) -> Float[Array, "batch seq out_width"]:
    """`projection` where every row is real and stays alone."""
    batch, seq, in_width = x.shape
    columns = x.reshape(batch * seq, in_width)
    if rows is not None and rows.is_native:
        flat = product(columns, kernel)
    else:
        transposed = jax.lax.dot_general(kernel, columns, (((1,), (1,)), ((), ())))  # [out, B·L]
        flat = jax.lax.optimization_barrier(transposed).T
    if isinstance(adapter, BankTerm):
        flat = add_adapters(flat, columns, adapter)
        adapter = None
    y = flat.reshape(batch, seq, kernel.shape[0])
    if adapter is None:
        return y
    low = jnp.einsum("bli,bnir->blnr", x, adapter.a)
    added = jnp.einsum("blnr,bnro->blno", low, adapter.b)
    return y + added.reshape(y.shape)
