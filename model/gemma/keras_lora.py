"""LoRA as Keras has it: which projections can have it, how A and B are shaped, what they add.

Keras adds A · B to the kernel of an `EinsumDense`, in the kernel's own shape. For a projection with
heads that means one A per head and one B for all of them::

    query   kernel (N, D, H)   A (N, D, R)   B (R, H)
    output  kernel (N, H, D)   A (N, H, R)   B (R, D)
    dense   kernel (D, F)      A (D, R)      B (R, F)

Kernels here are [out, in] (see `model.gemma.weights`), so the sum is turned before it is added.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from model.config import GemmaConfig

DEFAULT_TARGETS = ("query", "value")
TARGETS = (
    *("query", "key", "value", "attention_output"),
    *("ffw_gating", "ffw_gating_2", "ffw_linear"),
)


class LoraShapes(NamedTuple):
    """Shapes of A and B of one projection, in Keras' layout."""

    a: tuple[int, ...]
    b: tuple[int, int]


def lora_shapes(config: GemmaConfig, target: str, rank: int) -> LoraShapes:
    """Shapes for a field of `BlockWeights` that is in `TARGETS`."""
    width, head_dim, feed_forward = config.hidden_dim, config.head_dim, config.feed_forward_dim
    match target:
        case "query":
            return LoraShapes((config.num_query_heads, width, rank), (rank, head_dim))
        case "key" | "value":
            return LoraShapes((config.num_key_value_heads, width, rank), (rank, head_dim))
        case "attention_output":
            return LoraShapes((config.num_query_heads, head_dim, rank), (rank, width))
        case "ffw_gating" | "ffw_gating_2":
            return LoraShapes((width, rank), (rank, feed_forward))
        case "ffw_linear":
            return LoraShapes((feed_forward, rank), (rank, width))
    raise ValueError(f"LoRA targets are {', '.join(TARGETS)}; got {target!r:.80}.")


def merged_kernel(
    target: str,
    kernel: Float[Array, "out_width in_width"],
    a: Float[Array, "*lead rank"],
    b: Float[Array, "rank last"],
) -> Float[Array, "out_width in_width"]:
    """The kernel that acts, in the dtype of ``kernel``; alpha equals the rank, as in Keras."""
    change = jnp.einsum("...r,rl->...l", a, b)
    match target:
        case "query" | "key" | "value":  # [N, D, H]
            turned = change.transpose(0, 2, 1).reshape(kernel.shape)
        case "attention_output":  # [N, H, D]
            turned = change.transpose(2, 0, 1).reshape(kernel.shape)
        case _:
            turned = change.T
    return (kernel.astype(a.dtype) + turned).astype(kernel.dtype)
