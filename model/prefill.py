"""One chunk of a prompt, block by block.

Everything with more than one query per row runs as a sequence of small programs: one that embeds
the chunk, then one per layer. Layers whose cache has the same number of positions share a program,
as their weights and traits are arguments; and between two layers the engine could pause.
"""

from jaxtyping import Array, Float, Int

from model.config import GemmaConfig
from model.gemma.block import LayerTraits, SlotRows, block
from model.gemma.forward import scale_embeddings
from model.gemma.kv_cache import LayerCache
from model.gemma.weights import BlockWeights
from model.slot_memory import BLOCK_TOKENS

# Lengths to which a chunk is padded. Products of 32 rows and more give a row the same bits on this
# backend, whatever the number of rows.
CHUNK_BUCKETS = (32, 64, 128, BLOCK_TOKENS)


def embed_chunk(
    embeddings: Float[Array, "vocab width"], token_ids: Int[Array, "batch seq"]
) -> Float[Array, "batch seq width"]:
    """The residual stream of a chunk before the first block."""
    return scale_embeddings(embeddings[token_ids])


def prefill_block(
    config: GemmaConfig,
    weights: BlockWeights,
    traits: LayerTraits,
    cache: LayerCache,
    x: Float[Array, "batch seq width"],
    positions: Int[Array, "batch seq"],
    slots: Int[Array, " batch"],
) -> tuple[Float[Array, "batch seq width"], LayerCache]:
    """The residual stream after one block, and the layer's cache with the chunk in it."""
    x, new_cache = block(config, weights, traits, x, positions, rows=SlotRows(cache, slots))
    assert new_cache is not None
    return x, new_cache
