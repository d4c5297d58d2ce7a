"""Tokens over slots in one native call a block: decode steps and chunks of prompts alike.

What `block` says in JAX, `model/kernels/source/block_phases.h` does there with the same operations
in the same order, but for how sums are ordered. It needs no padding: the bits of a token depend
neither on how many there are nor on their places.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.config import GemmaConfig
from model.gemma.kv_cache import LayerCache
from model.gemma.low_rank import BankTerm, TokenSlots
from model.gemma.projection import AdapterTerm
from model.gemma.weights import BlockWeights
from model.kernels.block import native_block


class SlotTokens(NamedTuple):
    """A layer's cache and which slot each token reads and writes.

    Tokens of one prompt stand one behind the other; a prompt sees what those before it wrote into
    its slot. Only the first ``num_real`` are computed. One whose slot does not exist fills up.
    """

    cache: LayerCache
    slots: Int[Array, " tokens"]
    num_real: Int[Array, ""]


def advance_tokens(
    config: GemmaConfig,
    weights: BlockWeights,
    frequencies: Float[Array, " half_head_dim"],
    window_tokens: Int[Array, ""],
    x: Float[Array, "batch seq width"],
    positions: Int[Array, "batch seq"],
    tokens: SlotTokens,
    adapters: Mapping[str, AdapterTerm | BankTerm],
) -> tuple[Float[Array, "batch seq width"], LayerCache]:
    """The residual stream after a block, and the layer's cache with the tokens in it."""
    after, keys, values = native_block(
        x.reshape(-1, x.shape[-1]),
        tokens.num_real,
        tokens.slots,
        positions.reshape(-1),
        window_tokens,
        frequencies,
        *tokens.cache,
        weights,
        _bank_arguments(adapters),
        epsilon=config.norm_epsilon,
        query_scale=config.query_scale,
        logit_cap=config.attention_soft_cap,
    )
    return after.reshape(x.shape), LayerCache(keys, values)


# Projections in the order in which the call takes their pairs.
_TARGETS = (
    *("query", "key", "value", "attention_output"),
    *("ffw_gating", "ffw_gating_2", "ffw_linear"),
)


def _bank_arguments(adapters: Mapping[str, AdapterTerm | BankTerm]) -> list[Array]:
    """The slot of each token, and A, B and ranks of each projection; nothing without a bank."""
    if not adapters:
        return []
    terms = []
    for target in _TARGETS:
        term = adapters[target]
        assert isinstance(term, BankTerm), "the native kernel takes a bank"
        terms.append(term)
    used = terms[0].used
    assert isinstance(used, TokenSlots), "of each token"
    return [used.slots, *(array for term in terms for array in (*term.pair, term.ranks))]


def slots_of_prompts(
    slots: Int[Array, " prompts"],
    offsets: Int[Array, " prompts"],
    lengths: Int[Array, " prompts"],
    num_prompts: Int[Array, ""],
    seq: int,
) -> tuple[Int[Array, " {seq}"], Int[Array, ""]]:
    """The slot of each token of prompts that lie one behind the other; how many are real."""
    is_prompt = jnp.arange(len(offsets)) < num_prompts
    ends = jnp.where(is_prompt, offsets + lengths, 0)
    num_real = jnp.max(ends).astype(jnp.int32)
    prompts = jnp.searchsorted(jnp.where(is_prompt, offsets, seq), jnp.arange(seq), side="right")
    return slots[prompts - 1], num_real
