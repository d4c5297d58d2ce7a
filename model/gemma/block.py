"""One decoder block: attention and feed-forward, each normalised before and added to the residual.

The block is a pure function of its weights and of the few numbers that tell one layer from another
(`LayerTraits`), all of them arguments. So one compiled program serves every layer whose cache has
the same shape, and prefill, decode, score and training are the same mathematics.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.config import LOCAL_ROPE_THETA, GemmaConfig
from model.gemma import masks
from model.gemma.attention import attend
from model.gemma.cached_attention import PackedPrompts, SlotRows, attend_prompts, attend_rows
from model.gemma.kv_cache import LayerCache
from model.gemma.low_rank import BankTerm
from model.gemma.norms import rms_norm
from model.gemma.padded_rows import StepRows
from model.gemma.projection import AdapterTerm, projection
from model.gemma.rope import apply_rope, inverse_frequencies
from model.gemma.slot_tokens import SlotTokens, advance_tokens
from model.gemma.weights import BlockWeights

Residual = Float[Array, "batch seq width"]
Intervention = Callable[[Residual], Residual]
# What a field of the weights makes of an input.
Project = Callable[[str, Array], Array]


class LayerTraits(NamedTuple):
    """What differs between layers besides their weights."""

    rope_frequencies: Float[Array, " half_head_dim"]
    window_tokens: Int[Array, ""]


def layer_traits(config: GemmaConfig) -> list[LayerTraits]:
    """The traits of every layer, in order."""
    return [traits_of_layer(config, layer) for layer in range(config.num_layers)]


def traits_of_layer(config: GemmaConfig, layer: int) -> LayerTraits:
    """The traits of one layer."""
    if config.is_local(layer):
        return LayerTraits(
            inverse_frequencies(config.head_dim, theta=LOCAL_ROPE_THETA),
            jnp.int32(config.sliding_window_tokens or masks.UNLIMITED_WINDOW_TOKENS),
        )
    return LayerTraits(
        inverse_frequencies(
            config.head_dim, theta=config.global_rope_theta, scale=config.global_rope_scale
        ),
        jnp.int32(masks.UNLIMITED_WINDOW_TOKENS),
    )


def block(
    config: GemmaConfig,
    weights: BlockWeights,
    traits: LayerTraits,
    x: Float[Array, "batch seq width"],
    positions: Int[Array, "batch seq"],
    *,
    padding_mask: Bool[Array, "batch seq"] | None = None,
    sequences: Int[Array, "batch seq"] | None = None,
    rows: SlotRows | PackedPrompts | SlotTokens | None = None,
    adapters: Mapping[str, AdapterTerm | BankTerm] | None = None,
    intervene: Intervention | None = None,
    project: Project | None = None,
) -> tuple[Float[Array, "batch seq width"], LayerCache | None]:
    """The residual stream after this block, and the layer's cache if there is one.

    Args:
        config: Architecture (static).
        weights: Of this block.
        traits: Of this layer.
        x: Residual stream before the block.
        positions: Absolute position of each token in its own sequence.
        padding_mask: Without a cache: False marks tokens that no other token may see.
        sequences: Without a cache, in its place: several sequences lie in a row, and each token
            sees its own (`masks.visible_apart`).
        rows: With a cache: where each row's keys and values stand. Attention then covers all that
            the slot holds up to the query, and the two above must be None. `SlotTokens` are
            computed by the native kernel.
        adapters: Field of `BlockWeights` -> low-rank term of that projection.
        intervene: Applied to the residual stream after the block.
        project: Takes the place of `projection` and ``adapters`` where products are kept or found
            again (`model.finetune.kept_products`).
    """
    given = (padding_mask, sequences, rows)
    assert sum(each is not None for each in given) == 1, "a block needs one of them"
    adapters = adapters or {}
    if isinstance(rows, SlotTokens):
        x, cache = advance_tokens(config, weights, *traits, x, positions, rows, adapters)
        return (x if intervene is None else intervene(x)), cache
    step = rows.step if isinstance(rows, SlotRows) else None
    normalized = rms_norm(x, weights.pre_attention_norm, epsilon=config.norm_epsilon)
    project = project or partial(_project, weights, adapters, step)
    query, key, value = _query_key_value(config, weights, traits, normalized, positions, project)
    new_cache = None
    if rows is None:
        if sequences is not None:
            mask = masks.visible_apart(positions, sequences, traits.window_tokens)
        else:
            assert padding_mask is not None
            mask = masks.visible_unpadded(positions, padding_mask, traits.window_tokens)
        context = attend(query, key, value, mask, logit_cap=config.attention_soft_cap)
    elif isinstance(rows, PackedPrompts):
        context, new_cache = attend_prompts(
            query, key, value, rows, traits.window_tokens, logit_cap=config.attention_soft_cap
        )
    else:
        context, new_cache = attend_rows(
            query,
            key,
            value,
            rows,
            positions,
            traits.window_tokens,
            logit_cap=config.attention_soft_cap,
        )
    flat = context.reshape(*x.shape[:2], config.num_query_heads * config.head_dim)
    attended = project("attention_output", flat)
    if weights.post_attention_norm is not None:
        attended = rms_norm(attended, weights.post_attention_norm, epsilon=config.norm_epsilon)
    x = x + attended
    x = x + _feed_forward(config, weights, x, project)
    return (x if intervene is None else intervene(x)), new_cache


def _project(
    weights: BlockWeights,
    adapters: Mapping[str, AdapterTerm | BankTerm],
    step: StepRows | None,
    field: str,
    x: Float[Array, "batch seq in_width"],
) -> Float[Array, "batch seq out_width"]:
    """The product with the kernel in one field of the weights, and its adapter term."""
    return projection(x, getattr(weights, field), adapters.get(field), rows=step)


def _query_key_value(
    config: GemmaConfig,
    weights: BlockWeights,
    traits: LayerTraits,
    normalized: Float[Array, "batch seq width"],
    positions: Int[Array, "batch seq"],
    project: Project,
) -> tuple[
    Float[Array, "batch seq heads head_dim"],
    Float[Array, "batch seq kv_heads head_dim"],
    Float[Array, "batch seq kv_heads head_dim"],
]:
    """Queries (rotated and scaled), keys (rotated) and values."""
    batch, seq, _ = normalized.shape

    def heads(field: str) -> Array:
        return project(field, normalized).reshape(batch, seq, -1, config.head_dim)

    query, key = heads("query"), heads("key")
    if weights.query_norm is not None and weights.key_norm is not None:
        query = rms_norm(query, weights.query_norm, epsilon=config.norm_epsilon)
        key = rms_norm(key, weights.key_norm, epsilon=config.norm_epsilon)
    query = apply_rope(query, positions, traits.rope_frequencies)
    query = query * jnp.asarray(config.query_scale, query.dtype)
    key = apply_rope(key, positions, traits.rope_frequencies)
    return query, key, heads("value")


def _feed_forward(
    config: GemmaConfig,
    weights: BlockWeights,
    x: Float[Array, "batch seq width"],
    project: Project,
) -> Float[Array, "batch seq width"]:
    normalized = rms_norm(x, weights.pre_ffw_norm, epsilon=config.norm_epsilon)
    gate, up = project("ffw_gating", normalized), project("ffw_gating_2", normalized)
    # The tanh approximation, on the gate alone (spec 1.6).
    output = project("ffw_linear", jax.nn.gelu(gate, approximate=True) * up)
    if weights.post_ffw_norm is not None:
        output = rms_norm(output, weights.post_ffw_norm, epsilon=config.norm_epsilon)
    return output
