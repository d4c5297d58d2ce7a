"""The way back through a product, derivative · weight, as a native custom call of XLA.

As in `model.kernels.product`, a row's bits cannot depend on its company, and rows that are not real
cost nothing (`source/back_product.h` tells the order of summation).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

TARGET = "gemma_back_product"


def back_product(
    derivative: Float32[Array, "rows out_width"],
    weight: Float[Array, "out_width in_width"],
    num_real: Int32[Array, ""],
) -> Float32[Array, "rows in_width"]:
    """``derivative · weight``, summed in float32. The library must have been loaded.

    Args:
        derivative: Any number of rows.
        weight: float32 or bfloat16.
        num_real: Only that many rows are multiplied, and cost time; the rest give zeros.
    """
    result = jax.ShapeDtypeStruct((derivative.shape[0], weight.shape[1]), jnp.float32)
    multiplied: Array = jax.ffi.ffi_call(TARGET, result)(derivative, weight, num_real)
    return multiplied
