"""The three functions that are the model, and their composition.

`embed`, `block` (of `model.gemma.block`) and `head` are all the mathematics there is. Prefill,
decode, score and training call these three and nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.config import GemmaConfig
from model.gemma.attention import soft_cap
from model.gemma.block import Intervention, Residual, block, layer_traits
from model.gemma.norms import rms_norm
from model.gemma.padded_rows import StepRows, real_rows
from model.gemma.projection import AdapterTerm, real_projection
from model.gemma.weights import GemmaWeights

EMBEDDING_LAYER = -1

# Sees the residual stream at one layer and returns what takes its place.
Intercept = Callable[[Residual, int], Residual]


class ForwardPass(NamedTuple):
    """What a whole forward pass yields."""

    logits: Float[Array, "batch seq vocab"]
    hidden: Float[Array, "batch seq width"]


def look_up(
    weights: GemmaWeights, token_ids: Int[Array, "batch seq"]
) -> Float[Array, "batch seq width"]:
    """Rows of the embedding table, before scaling: what layer −1 means in `score`.

    Ids must lie in [0, V); JAX clamps others silently, so they are checked long before.
    """
    return weights.embeddings[token_ids]


def scale_embeddings(x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
    """``x · sqrt(D)``, the root taken in float32 and rounded to the dtype of ``x`` (spec 1.2)."""
    return x * jnp.sqrt(jnp.float32(x.shape[-1])).astype(x.dtype)


def embed(
    weights: GemmaWeights, token_ids: Int[Array, "batch seq"]
) -> Float[Array, "batch seq width"]:
    """The residual stream before the first block."""
    return scale_embeddings(look_up(weights, token_ids))


def final_hidden(
    config: GemmaConfig, weights: GemmaWeights, x: Float[Array, "batch seq width"]
) -> Float[Array, "batch seq width"]:
    """The residual stream after the final norm."""
    return rms_norm(x, weights.final_norm, epsilon=config.final_norm_epsilon)


def head(
    config: GemmaConfig,
    weights: GemmaWeights,
    x: Float[Array, "batch seq width"],
    *,
    rows: StepRows | None = None,
) -> Float[Array, "real seq vocab"]:
    """Logits from the residual stream after the last block: final norm, tied table, soft cap.

    With ``rows``, those of a decode step, only some are real; see `model.gemma.padded_rows`.
    """
    return unembed(config, weights, final_hidden(config, weights, x), rows)


def unembed(
    config: GemmaConfig,
    weights: GemmaWeights,
    hidden: Float[Array, "batch seq width"],
    rows: StepRows | None = None,
) -> Float[Array, "real seq vocab"]:
    """Logits from the hidden states after the final norm.

    With ``rows`` only those of the real rows: logits are too large to be padded with more.
    """
    logits = real_projection(real_rows(hidden, rows), weights.embeddings, rows=rows)
    if rows is None or config.final_soft_cap is None:
        return soft_cap(logits, config.final_soft_cap)
    apart = jax.lax.optimization_barrier(logits)
    return jax.lax.map(lambda row: soft_cap(row, config.final_soft_cap), apart)


def forward(
    config: GemmaConfig,
    weights: GemmaWeights,
    token_ids: Int[Array, "batch seq"],
    padding_mask: Bool[Array, "batch seq"],
    *,
    adapters: Sequence[Mapping[str, AdapterTerm]] | None = None,
    intercept: Intercept | None = None,
) -> ForwardPass:
    """Logits and final hidden states of whole sequences, without a cache.

    Positions count from the left, padding included, as in keras-hub.

    Args:
        config: Architecture (static).
        weights: Of the model.
        token_ids: In [0, V).
        padding_mask: False marks padding, anywhere in a row.
        adapters: For each layer, the low-rank terms of its projections.
        intercept: Called with the residual stream and its layer, −1 (before scaling) to the last,
            in order; what it returns is used.
    """
    batch, seq = token_ids.shape
    positions = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32), (batch, seq))
    x = look_up(weights, token_ids)
    if intercept is not None:
        x = intercept(x, EMBEDDING_LAYER)
    x = scale_embeddings(x)
    for layer, traits in enumerate(layer_traits(config)):
        x, _ = block(
            config,
            weights.blocks[layer],
            traits,
            x,
            positions,
            padding_mask=padding_mask,
            adapters=None if adapters is None else adapters[layer],
            intervene=None if intercept is None else _at_layer(intercept, layer),
        )
    hidden = final_hidden(config, weights, x)
    return ForwardPass(unembed(config, weights, hidden), hidden)


def _at_layer(intercept: Intercept, layer: int) -> Intervention:
    return lambda x: intercept(x, layer)
