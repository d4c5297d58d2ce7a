"""A decoder block as a native custom call of XLA: from one residual stream to the next.

Norms, products, rotations, the cache, attention and the gate, for tokens that have a slot and a
position each: those of a decode step, one a slot, or of prompts that are prefilled. One order of
summation for each number (`source/block.h`), so the bits of a token depend on nothing but its own
sequence: not on the number of tokens, nor on the threads.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

TARGET = "gemma_block"
# Query heads that share a key head.
MAX_SHARING_HEADS = 32

_KEYS_ARGUMENT = 6
_MATRICES = (1, 2, 3, 6, 9, 10, 11)


def native_block(
    x: Float32[Array, "tokens width"],
    num_real: Int32[Array, ""],
    slots: Int32[Array, " tokens"],
    positions: Int32[Array, " tokens"],
    window_tokens: Int32[Array, ""],
    frequencies: Float32[Array, " half_head_dim"],
    keys: Float32[Array, "slots kv_heads cache head_dim"],
    values: Float32[Array, "slots kv_heads cache head_dim"],
    weights: Sequence[Array | None],
    adapters: Sequence[Array] = (),
    *,
    epsilon: float,
    query_scale: float,
    logit_cap: float | None,
) -> tuple[
    Float32[Array, "tokens width"],
    Float32[Array, "slots kv_heads cache head_dim"],
    Float32[Array, "slots kv_heads cache head_dim"],
]:
    """The residual stream after the block, and the cache with the tokens in it.

    The library must have been loaded (`model.kernels.library`). It has no gradient.

    Args:
        x: Residual stream before the block.
        num_real: Only that many tokens are computed, and cost time; the rest give zeros.
        slots: Of each token. One that does not exist writes nothing and attends to nothing.
        positions: Of each token, absolute. Tokens of one prompt are ascending; a prompt sees what
            prompts before it in the same slot wrote.
        window_tokens: How far back a token sees, itself included.
        frequencies: Of the rotation, radians a position.
        keys: Position p of a sequence stands at p modulo the length of the cache.
        values: Likewise.
        weights: Fields of `model.gemma.weights.BlockWeights`, in their order; None for a norm that
            the architecture lacks. Matrices are float32 or bfloat16, norms float32.
        adapters: None, or the slot of each token in a bank of low-rank pairs, 0 for the base, and
            then for each matrix in its order A [slots, heads, rank, in], B [slots, heads, rank,
            out] and the rank of each slot, which holds entry slot − 1.
        epsilon: Of the norms.
        query_scale: Of the queries, behind their rotation.
        logit_cap: Soft cap on the logits of attention.

    Raises:
        ValueError: While tracing: shapes do not fit, too many heads share one, or another dtype.
    """
    _check(x, keys, weights)
    if x.shape[0] == 0:
        return x, keys, values
    absent = jnp.zeros(0, jnp.float32)
    results = tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (x, keys, values))
    call = jax.ffi.ffi_call(
        TARGET, results, input_output_aliases={_KEYS_ARGUMENT: 1, _KEYS_ARGUMENT + 1: 2}
    )
    after, new_keys, new_values = call(
        x,
        num_real,
        slots,
        positions,
        window_tokens,
        frequencies,
        keys,
        values,
        *(absent if weight is None else weight for weight in weights),
        *adapters,
        epsilon=np.float32(epsilon),
        query_scale=np.float32(query_scale),
        logit_cap=np.float32(0.0 if logit_cap is None else logit_cap),
    )
    return after, new_keys, new_values


def _check(x: jax.Array, keys: jax.Array, weights: Sequence[Array | None]) -> None:
    """What XLA would say later and less clearly."""
    matrices = [weights[index] for index in _MATRICES]
    _, kv_heads, _, head_dim = keys.shape
    query = matrices[0]
    assert query is not None, "every block has a query"
    heads = query.shape[0] // head_dim
    if heads % kv_heads or heads // kv_heads > MAX_SHARING_HEADS:
        raise ValueError(
            f"{heads} query heads cannot share {kv_heads} key heads; "
            f"the kernel takes at most {MAX_SHARING_HEADS} to each."
        )
    if query.shape[1] != x.shape[1]:
        raise ValueError(f"A block for {query.shape[1]} numbers got a stream of {x.shape[1]}.")
    dtypes = {"float32", "bfloat16"}
    if any(matrix is None or matrix.dtype.name not in dtypes for matrix in matrices):
        raise ValueError("The matrices of a block must be float32 or bfloat16.")
