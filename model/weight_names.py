"""Which arrays a Gemma has, what they are called and how they are shaped.

Names are the Keras variable paths. Shapes are those used at run time: every linear kernel is
``[out, in]``, with heads folded into the rows, so that one product, W · xᵀ, serves all of them.
Keras' and other people's shapes exist only in the readers and writers of preset files.

Plain Python: a process that only converts files needs no JAX.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from model.config import GemmaConfig

EMBEDDINGS = "token_embedding/embeddings"
FINAL_NORM = "final_normalization/scale"

# Field of `model.gemma.weights.BlockWeights` -> its path below ``decoder_block_<i>/``.
_BLOCK_PATHS = {
    "pre_attention_norm": "pre_attention_norm/scale",
    "query": "attention/query/kernel",
    "key": "attention/key/kernel",
    "value": "attention/value/kernel",
    "query_norm": "attention/query_norm/scale",
    "key_norm": "attention/key_norm/scale",
    "attention_output": "attention/attention_output/kernel",
    "post_attention_norm": "post_attention_norm/scale",
    "pre_ffw_norm": "pre_ffw_norm/scale",
    "ffw_gating": "ffw_gating/kernel",
    "ffw_gating_2": "ffw_gating_2/kernel",
    "ffw_linear": "ffw_linear/kernel",
    "post_ffw_norm": "post_ffw_norm/scale",
}


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One array: its name and its shape at run time."""

    name: str
    shape: tuple[int, ...]


def block_weight_shapes(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Field of `BlockWeights` -> shape, for the fields that this architecture has."""
    width, head_dim, feed_forward = config.hidden_dim, config.head_dim, config.feed_forward_dim
    query_width = config.num_query_heads * head_dim
    key_width = config.num_key_value_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "pre_attention_norm": (width,),
        "query": (query_width, width),
        "key": (key_width, width),
        "value": (key_width, width),
    }
    if config.use_query_key_norm:
        shapes |= {"query_norm": (head_dim,), "key_norm": (head_dim,)}
    shapes["attention_output"] = (width, query_width)
    if config.use_post_attention_norm:
        shapes["post_attention_norm"] = (width,)
    shapes |= {
        "pre_ffw_norm": (width,),
        "ffw_gating": (feed_forward, width),
        "ffw_gating_2": (feed_forward, width),
        "ffw_linear": (width, feed_forward),
    }
    if config.use_post_ffw_norm:
        shapes["post_ffw_norm"] = (width,)
    return shapes


def block_weight_name(layer: int, field: str) -> str:
    """Name of the array in field ``field`` of block ``layer``."""
    return f"decoder_block_{layer}/{_BLOCK_PATHS[field]}"


def weight_specs(config: GemmaConfig) -> Iterator[WeightSpec]:
    """Every array of the model, embeddings first. Readers, writers and checks all use this list."""
    yield WeightSpec(EMBEDDINGS, (config.vocabulary_size, config.hidden_dim))
    block_shapes = block_weight_shapes(config)
    for layer in range(config.num_layers):
        for field, shape in block_shapes.items():
            yield WeightSpec(block_weight_name(layer, field), shape)
    yield WeightSpec(FINAL_NORM, (config.hidden_dim,))


def num_parameters(config: GemmaConfig) -> int:
    """Number of parameters, from shapes alone."""
    total = 0
    for spec in weight_specs(config):
        size = 1
        for extent in spec.shape:
            size *= extent
        total += size
    return total
