"""The product of rows with a weight matrix, as a native custom call of XLA.

One order of summation for each number of the result, whatever the number of rows, their places or
the threads (`source/product.h` tells which); so a row's bits cannot depend on its company.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

TARGET = "gemma_product"

_WEIGHT_DTYPES = (jnp.float32, jnp.bfloat16)


def product(
    x: Float32[Array, "rows in_width"],
    weight: Float[Array, "out_width in_width"],
    num_real: Int32[Array, ""] | None = None,
) -> Float32[Array, "rows out_width"]:
    """``x · weightᵀ``, summed in float32.

    The library must have been loaded (`model.kernels.library`). Gradients are XLA's own products.

    Args:
        x: Any number of rows.
        weight: float32 or bfloat16.
        num_real: Only that many rows are multiplied, and cost time; the rest give zeros. All of
            them if None.

    Raises:
        ValueError: While tracing: shapes do not fit, or another dtype.
    """
    _check(x, weight)
    count = jnp.int32(x.shape[0]) if num_real is None else num_real
    return _product(x, weight, count)


@jax.custom_vjp
def _product(x: Array, weight: Array, num_real: Array) -> Array:
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    if 0 in result.shape:
        return jnp.zeros(result.shape, result.dtype)
    multiplied: Array = jax.ffi.ffi_call(TARGET, result)(x, weight, num_real)
    return multiplied


def _check(x: jax.Array, weight: jax.Array) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x [rows, in] and weight [out, in] were expected, not {x.shape} and {weight.shape}."
        )
    if x.dtype != jnp.float32 or weight.dtype not in _WEIGHT_DTYPES:
        raise ValueError(
            "x must be float32 and weight float32 or bfloat16, "
            f"not {x.dtype.name} and {weight.dtype.name}."
        )


_Operands = tuple[Array, Array, Array]


def _forward(x: Array, weight: Array, num_real: Array) -> tuple[Array, _Operands]:
    return _product(x, weight, num_real), (x, weight, num_real)


def _backward(operands: _Operands, cotangent: Array) -> tuple[Array, Array, np.ndarray]:
    x, weight, num_real = operands
    is_real = jnp.arange(x.shape[0]) < num_real
    real = jnp.where(is_real[:, None], cotangent, 0.0)
    dot = partial(jnp.matmul, preferred_element_type=jnp.float32)
    # A whole number has no gradient; JAX writes that as float0.
    nothing = np.zeros((), jax.dtypes.float0)
    return dot(real, weight), dot(real.T, x).astype(weight.dtype), nothing


_product.defvjp(_forward, _backward)
