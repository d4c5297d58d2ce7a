"""The product of a few rows with a weight matrix, as a native custom call of XLA.

One order of summation for each number of the result, whatever the number of rows, their places and
the number of threads (`source/product.h` tells which); so a row's bits cannot depend on its company.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

TARGET = "gemma_product"
MAX_ROWS = 32

_WEIGHT_DTYPES = (jnp.float32, jnp.bfloat16)


@jax.custom_vjp
def product(
    x: Float32[Array, "rows in_width"], weight: Float[Array, "out_width in_width"]
) -> Float32[Array, "rows out_width"]:
    """``x · weightᵀ``, summed in float32.

    The library must have been loaded (`model.kernels.library`). Gradients are XLA's own products.

    Args:
        x: At most `MAX_ROWS` rows; none give an empty result.
        weight: float32 or bfloat16.

    Raises:
        ValueError: While tracing: shapes do not fit, too many rows, or another dtype.
    """
    _check(x, weight)
    rows, out_width = x.shape[0], weight.shape[0]
    result = jax.ShapeDtypeStruct((rows, out_width), jnp.float32)
    if rows == 0 or out_width == 0:
        return jnp.zeros(result.shape, result.dtype)
    call = jax.ffi.ffi_call(TARGET, result)
    return call(x, weight)  # type: ignore[no-any-return]


def _check(x: jax.Array, weight: jax.Array) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x [rows, in] and weight [out, in] were expected, not {x.shape} and {weight.shape}."
        )
    if x.shape[0] > MAX_ROWS:
        raise ValueError(f"{x.shape[0]} rows; the kernel takes at most {MAX_ROWS}.")
    if x.dtype != jnp.float32 or weight.dtype not in _WEIGHT_DTYPES:
        raise ValueError(
            "x must be float32 and weight float32 or bfloat16, "
            f"not {x.dtype.name} and {weight.dtype.name}."
        )


_Operands = tuple[Array, Array]


def _forward(x: Array, weight: Array) -> tuple[Array, _Operands]:
    return product(x, weight), (x, weight)


def _backward(operands: _Operands, cotangent: Array) -> tuple[Array, Array]:
    x, weight = operands
    dot = partial(jnp.matmul, preferred_element_type=jnp.float32)
    return dot(cotangent, weight), dot(cotangent.T, x).astype(weight.dtype)


product.defvjp(_forward, _backward)
