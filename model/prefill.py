"""One chunk of a prompt, or several short ones, block by block.

Everything with more than one query per row runs as a sequence of small programs: one that embeds
the chunk, then one per layer. Layers whose cache has the same number of positions share a program,
as their weights and traits are arguments; and between two layers the engine can pause.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.adapter_bank import bank_terms
from model.config import GemmaConfig
from model.gemma.block import LayerTraits, block
from model.gemma.cached_attention import PackedPrompts
from model.gemma.forward import scale_embeddings
from model.gemma.kv_cache import LayerCache
from model.gemma.low_rank import BankPair, prompt_slots
from model.gemma.slot_tokens import SlotTokens, slots_of_prompts
from model.gemma.weights import BlockWeights
from model.slot_memory import BLOCK_TOKENS
from model.slots import PromptChunk

# Lengths to which a chunk is padded. With any of them a product gives a row the same bits on this
# backend; with 32 rows it gives others, so a prompt alone could not share a chunk with others.
CHUNK_BUCKETS = (64, 128, BLOCK_TOKENS)
# Short prompts share a chunk of up to this many tokens: for a few of them a product costs little
# more than for one, as it must read the matrix anyway.
PACKED_TOKENS = 64
MAX_PACKED_PROMPTS = 32
# What a chunk of each length has room for; a turn that joins steps to prompts (`model.joined_turn`)
# takes the second.
_NUM_PROMPTS = {64: MAX_PACKED_PROMPTS, 128: 64, BLOCK_TOKENS: 1}


class ChunkRows(NamedTuple):
    """Where the tokens of a chunk belong: `model.gemma.cached_attention.PackedPrompts`.

    ``positions`` are those of every token, ``adapters`` the slots of each prompt's adapter.
    """

    positions: Int[Array, "1 seq"]
    slots: Int[Array, " prompts"]
    offsets: Int[Array, " prompts"]
    lengths: Int[Array, " prompts"]
    starts: Int[Array, " prompts"]
    num_prompts: Int[Array, ""]
    adapters: Int[Array, " prompts"]


def chunk_of(
    prompts: Sequence[PromptChunk], at_least: int = 1
) -> tuple[Int[Array, "1 seq"], ChunkRows]:
    """Token ids and places of prompts that are prefilled together, padded to a bucket."""
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    bucket = next(size for size in CHUNK_BUCKETS if size >= max(num_tokens, at_least))
    token_ids = np.zeros((1, bucket), np.int32)
    positions = np.zeros((1, bucket), np.int32)
    places = np.zeros((5, num_packed(bucket)), np.int32)
    offset = 0
    for index, prompt in enumerate(prompts):
        end = offset + len(prompt.token_ids)
        token_ids[0, offset:end] = prompt.token_ids
        # Those of the padding go on: it is written behind the last prompt.
        positions[0, offset:] = np.arange(prompt.start, prompt.start + bucket - offset)
        places[:, index] = prompt.slot, offset, end - offset, prompt.start, prompt.adapter
        offset = end
    slots, offsets, lengths, starts, adapters = map(jnp.asarray, places)
    num_prompts = jnp.asarray(len(prompts), jnp.int32)
    prompts_of = (slots, offsets, lengths, starts, num_prompts, adapters)
    rows = ChunkRows(jnp.asarray(positions), *prompts_of)
    return jnp.asarray(token_ids), rows


def num_packed(bucket: int) -> int:
    """Prompts that a chunk of this length can hold."""
    return _NUM_PROMPTS[bucket]


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
    x: Float[Array, "1 seq width"],
    rows: ChunkRows,
    bank: Mapping[str, BankPair] | None,
    ranks: Mapping[str, Int[Array, " slots"]] | None,
    *,
    is_native: bool,
) -> tuple[Float[Array, "1 seq width"], LayerCache]:
    """The residual stream after one block, and the layer's cache with the chunk in it.

    ``bank`` and ``ranks`` are this layer's part of a `model.adapter_bank`, if there is one.
    """
    lengths = (rows.offsets, rows.lengths, rows.num_prompts)
    placed: PackedPrompts | SlotTokens
    if is_native:
        placed = SlotTokens(cache, *slots_of_prompts(rows.slots, *lengths, x.shape[1]))
    else:
        placed = PackedPrompts(
            cache, rows.slots, rows.offsets, rows.lengths, rows.starts, rows.num_prompts
        )
    used = prompt_slots(rows.adapters, *lengths, x.shape[1], is_native=is_native)
    terms = bank_terms(bank, ranks, used)
    x, new_cache = block(config, weights, traits, x, rows.positions, rows=placed, adapters=terms)
    assert new_cache is not None
    return x, new_cache
