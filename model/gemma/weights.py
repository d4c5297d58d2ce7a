"""The arrays of a Gemma, as the structure that the forward pass takes."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Array, Float

from model.config import GemmaConfig
from model.weight_names import EMBEDDINGS, FINAL_NORM, block_weight_name, block_weight_shapes


class BlockWeights(NamedTuple):
    """The arrays of one decoder block, in the order in which the block uses them.

    Norm scales are the ``s`` of ``x · (1 + s)``. A norm that the architecture lacks is None.
    """

    pre_attention_norm: Float[Array, " width"]
    query: Float[Array, "query_width width"]
    key: Float[Array, "key_width width"]
    value: Float[Array, "key_width width"]
    query_norm: Float[Array, " head_dim"] | None
    key_norm: Float[Array, " head_dim"] | None
    attention_output: Float[Array, "width query_width"]
    post_attention_norm: Float[Array, " width"] | None
    pre_ffw_norm: Float[Array, " width"]
    ffw_gating: Float[Array, "feed_forward width"]
    ffw_gating_2: Float[Array, "feed_forward width"]
    ffw_linear: Float[Array, "width feed_forward"]
    post_ffw_norm: Float[Array, " width"] | None


class GemmaWeights(NamedTuple):
    """All arrays of a model. ``blocks`` is a list of per-layer arrays, never a stacked one."""

    embeddings: Float[Array, "vocab width"]
    blocks: tuple[BlockWeights, ...]
    final_norm: Float[Array, " width"]


def assemble(config: GemmaConfig, arrays: Mapping[str, Array]) -> GemmaWeights:
    """Named arrays as the structure that the forward pass takes."""
    block_fields = block_weight_shapes(config)
    blocks = tuple(
        BlockWeights._make(
            arrays[block_weight_name(layer, field)] if field in block_fields else None
            for field in BlockWeights._fields
        )
        for layer in range(config.num_layers)
    )
    return GemmaWeights(arrays[EMBEDDINGS], blocks, arrays[FINAL_NORM])
