"""Shapes of what a bank of adapters holds, in plain Python.

Each projection is a number of heads with the same input: N for the query, K for key and value, and
one for the rest. Keras' LoRA has one B for all heads and PEFT's one A for all heads; with an A and
a B for each head both fit at their own rank.
"""

from typing import NamedTuple

from model.config import GemmaConfig

# Of an adapter in a file, whatever the room for it in a bank.
MAX_RANK = 1024


class PairShape(NamedTuple):
    """A is [heads, rank, in_width], B is [heads, rank, out_per_head]."""

    heads: int
    in_width: int
    out_per_head: int

    def num_numbers(self, rank: int) -> int:
        """Of A and B together."""
        return self.heads * rank * (self.in_width + self.out_per_head)


def pair_shapes(config: GemmaConfig) -> dict[str, PairShape]:
    """Field of `model.gemma.weights.BlockWeights` -> shape, for all that can have an adapter."""
    width, head_dim, feed_forward = config.hidden_dim, config.head_dim, config.feed_forward_dim
    key = PairShape(config.num_key_value_heads, width, head_dim)
    return {
        "query": PairShape(config.num_query_heads, width, head_dim),
        "key": key,
        "value": key,
        "attention_output": PairShape(1, config.num_query_heads * head_dim, width),
        "ffw_gating": PairShape(1, width, feed_forward),
        "ffw_gating_2": PairShape(1, width, feed_forward),
        "ffw_linear": PairShape(1, feed_forward, width),
    }


def bank_bytes(config: GemmaConfig, num_slots: int, max_rank: int, item_bytes: int = 4) -> int:
    """Bytes of a bank with room for ``num_slots`` adapters in every layer.

    They are taken when the first adapter comes; until then they are only reserved.
    """
    of_layer = sum(shape.num_numbers(max_rank) for shape in pair_shapes(config).values())
    return num_slots * config.num_layers * of_layer * item_bytes
