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
from model.gemma import kv_cache, masks
from model.gemma.attention import attend, attend_slot
from model.gemma.kv_cache import LayerCache
from model.gemma.norms import rms_norm
from model.gemma.padded_rows import StepRows, padded_again, real_rows
from model.gemma.projection import AdapterTerm, PromptTokens, projection
from model.gemma.rope import apply_rope, inverse_frequencies
from model.gemma.weights import BlockWeights
from model.kernels.attention import decode_attention

Residual = Float[Array, "batch seq width"]
Intervention = Callable[[Residual], Residual]

# Queries of one prompt that attend together where several prompts share a chunk. With more of them
# a short prompt costs more than it needs; with 8, one of 64 tokens costs what it does in one go.
_TILE_TOKENS = 8


class LayerTraits(NamedTuple):
    """What differs between layers besides their weights."""

    rope_frequencies: Float[Array, " half_head_dim"]
    window_tokens: Int[Array, ""]


class SlotRows(NamedTuple):
    """A layer's cache and which slot each row of the batch reads and writes.

    In a decode step only some of the rows are real (`model.gemma.padded_rows`).
    """

    cache: LayerCache
    slots: Int[Array, " batch"]
    step: StepRows | None = None


class PackedPrompts(NamedTuple):
    """A layer's cache and the prompts that lie one behind the other in the one row of a batch.

    Prompt i has ``lengths[i]`` tokens from ``offsets[i]`` on, which are those of slot ``slots[i]``
    from position ``starts[i]`` on, all within one block. Only the first ``num_prompts`` are real.
    Several may stand in one slot, one after another: each sees what the ones before it wrote.
    ``is_native`` is static: the native kernels compute.
    """

    cache: LayerCache
    slots: Int[Array, " prompts"]
    offsets: Int[Array, " prompts"]
    lengths: Int[Array, " prompts"]
    starts: Int[Array, " prompts"]
    num_prompts: Int[Array, ""]
    is_native: bool = False

    @property
    def tokens(self) -> PromptTokens | None:
        """Which tokens are real, if native kernels are to know."""
        is_prompt = jnp.arange(self.lengths.shape[0]) < self.num_prompts
        ends = jnp.where(is_prompt, self.offsets + self.lengths, 0)
        return PromptTokens(jnp.max(ends).astype(jnp.int32)) if self.is_native else None


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
    rows: SlotRows | PackedPrompts | None = None,
    adapters: Mapping[str, AdapterTerm] | None = None,
    intervene: Intervention | None = None,
) -> tuple[Float[Array, "batch seq width"], LayerCache | None]:
    """The residual stream after this block, and the layer's cache if there is one.

    Args:
        config: Architecture (static).
        weights: Of this block.
        traits: Of this layer.
        x: Residual stream before the block.
        positions: Absolute position of each token in its own sequence.
        padding_mask: Without a cache: False marks tokens that no other token may see.
        rows: With a cache: where each row's keys and values stand. Attention then covers all that
            the slot holds up to the query, and ``padding_mask`` must be None.
        adapters: Field of `BlockWeights` -> low-rank term of that projection.
        intervene: Applied to the residual stream after the block.
    """
    assert (padding_mask is None) != (rows is None), "a block needs a padding mask or slots"
    adapters = adapters or {}
    step = None
    if rows is not None:
        step = rows.step if isinstance(rows, SlotRows) else rows.tokens
    normalized = rms_norm(x, weights.pre_attention_norm, epsilon=config.norm_epsilon)
    project = partial(_project, weights, adapters, step)
    query, key, value = _query_key_value(config, weights, traits, normalized, positions, project)
    cache = None
    if rows is None:
        assert padding_mask is not None
        mask = masks.visible_unpadded(positions, padding_mask, traits.window_tokens)
        context = attend(query, key, value, mask, logit_cap=config.attention_soft_cap)
    elif isinstance(rows, PackedPrompts):
        context, cache = _attend_prompts(config, traits, query, key, value, rows)
    else:
        cache = kv_cache.write(rows.cache, rows.slots, positions, key, value)
        context = _attend_rows(config, traits, query, rows._replace(cache=cache), positions)
    flat = context.reshape(*x.shape[:2], config.num_query_heads * config.head_dim)
    attended = project("attention_output", flat)
    if weights.post_attention_norm is not None:
        attended = rms_norm(attended, weights.post_attention_norm, epsilon=config.norm_epsilon)
    x = x + attended
    x = x + _feed_forward(config, weights, x, project)
    return (x if intervene is None else intervene(x)), cache


Project = Callable[[str, Array], Array]


def _project(
    weights: BlockWeights,
    adapters: Mapping[str, AdapterTerm],
    step: StepRows | PromptTokens | None,
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


def _attend_rows(
    config: GemmaConfig,
    traits: LayerTraits,
    query: Float[Array, "batch seq heads head_dim"],
    rows: SlotRows,
    positions: Int[Array, "batch seq"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Attention row by row, so that a row's bits and cost do not depend on its company."""

    def attend_row(row: tuple[Array, Array, Array]) -> Array:
        row_query, slot, row_positions = row
        return attend_slot(
            row_query,
            rows.cache,
            slot,
            row_positions,
            traits.window_tokens,
            logit_cap=config.attention_soft_cap,
        )

    num_real = None if rows.step is None else rows.step.num_real
    real = (real_rows(query, rows.step), rows.slots[:num_real], positions[:num_real])
    if rows.step is not None and rows.step.is_native:
        attended = decode_attention(
            real[0][:, 0],
            *rows.cache,
            real[1],
            real[2][:, 0],
            traits.window_tokens,
            logit_cap=config.attention_soft_cap,
        )[:, None]
    else:
        attended = jax.lax.map(attend_row, real)
    return padded_again(attended, rows.step)


def _attend_prompts(
    config: GemmaConfig,
    traits: LayerTraits,
    query: Float[Array, "1 seq heads head_dim"],
    key: Float[Array, "1 seq kv_heads head_dim"],
    value: Float[Array, "1 seq kv_heads head_dim"],
    prompts: PackedPrompts,
) -> tuple[Float[Array, "1 seq heads head_dim"], LayerCache]:
    """Attention prompt by prompt, each from its beginning in tiles of a fixed shape.

    So a prompt meets the same instructions, and gets the same bits, alone and behind others, and
    costs what its own tokens cost. Only these are written: a neighbour that is not finite must not
    get into its slot. What a tile leaves behind a prompt is overwritten by the next one.
    """
    seq = query.shape[1]
    tile = min(seq, _TILE_TOKENS) if prompts.slots.shape[0] > 1 else seq
    # Room for a prompt that begins at the last token.
    query, key, value = (
        jnp.concatenate([x, jnp.zeros_like(x)], axis=1) for x in (query, key, value)
    )

    def add_prompt(
        index: Int[Array, ""], carry: tuple[Array, LayerCache]
    ) -> tuple[Array, LayerCache]:
        context, cache = carry
        offset, slot = prompts.offsets[index], prompts.slots[index]
        start, length = prompts.starts[index], prompts.lengths[index]

        def own(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, offset, seq, axis=1)[0]

        cache = kv_cache.write_prompt(cache, slot, start, length, own(key), own(value))

        def add_tile(number: Int[Array, ""], context: Array) -> Array:
            place = number * tile
            attended = attend_slot(
                jax.lax.dynamic_slice_in_dim(query, offset + place, tile, axis=1)[0],
                cache,
                slot,
                start + place + jnp.arange(tile, dtype=jnp.int32),
                traits.window_tokens,
                logit_cap=config.attention_soft_cap,
                last_position=start + length - 1,
            )
            return jax.lax.dynamic_update_slice_in_dim(
                context, attended[None], offset + place, axis=1
            )

        num_tiles = (length + (tile - 1)) // tile
        return jax.lax.fori_loop(0, num_tiles, add_tile, context), cache

    start = (jnp.zeros_like(query), prompts.cache)
    context, cache = jax.lax.fori_loop(0, prompts.num_prompts, add_prompt, start)
    return context[:, :seq], cache


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
