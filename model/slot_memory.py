"""How many positions a layer of the KV cache holds, and what memory a slot takes, in plain Python.

`model.gemma.kv_cache` allocates by it; those who only plan load no JAX for it.
"""

from model.config import GemmaConfig

# Attention walks the keys in blocks of this many, and prefill chunks start at multiples of it.
# Changing it changes the last bits of every answer.
BLOCK_TOKENS = 256


def kv_cache_bytes(config: GemmaConfig, context_tokens: int, item_bytes: int = 4) -> int:
    """Bytes of the keys and values of one sequence, all layers.

    Args:
        config: The architecture.
        context_tokens: Tokens that the slot can hold.
        item_bytes: Of one number; the cache is float32 today.
    """
    positions = sum(
        num_cache_positions(config, layer, context_tokens) for layer in range(config.num_layers)
    )
    return 2 * positions * config.num_key_value_heads * config.head_dim * item_bytes


def block_bytes(config: GemmaConfig, item_bytes: int = 4) -> int:
    """Bytes of the keys and values of one block, all layers."""
    numbers = BLOCK_TOKENS * config.num_key_value_heads * config.head_dim
    return 2 * config.num_layers * numbers * item_bytes


def num_cache_positions(config: GemmaConfig, layer: int, context_tokens: int) -> int:
    """S of one layer: the context, or for a local layer its window and one chunk, in blocks."""
    needed = context_tokens
    if config.is_local(layer):
        assert config.sliding_window_tokens is not None, "a local layer has a window"
        needed = min(needed, config.sliding_window_tokens + BLOCK_TOKENS)
    return -(-needed // BLOCK_TOKENS) * BLOCK_TOKENS
