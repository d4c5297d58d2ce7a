"""Attention with a cache: a token of each row over its own slot, or the prompts of a chunk.

Both write keys and values first, and then go row by row or prompt by prompt, so that nothing of a
neighbour enters. XLA's products need the same shapes for the same bits, which is why a prompt
attends in tiles of one shape. The native kernel does without (`model.gemma.slot_tokens`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.gemma import kv_cache
from model.gemma.attention import attend_slot
from model.gemma.kv_cache import LayerCache
from model.gemma.padded_rows import StepRows, padded_again, real_rows

# Queries of one prompt that attend together where several prompts share a chunk. With more of them
# a short prompt costs more than it needs; with 8, one of 64 tokens costs what it does in one go.
_TILE_TOKENS = 8


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
    """

    cache: LayerCache
    slots: Int[Array, " prompts"]
    offsets: Int[Array, " prompts"]
    lengths: Int[Array, " prompts"]
    starts: Int[Array, " prompts"]
    num_prompts: Int[Array, ""]


def attend_rows(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    rows: SlotRows,
    positions: Int[Array, "batch seq"],
    window_tokens: Int[Array, ""],
    *,
    logit_cap: float | None,
) -> tuple[Float[Array, "batch seq heads head_dim"], LayerCache]:
    """What the tokens of each row gather from its slot, and the cache with them in it.

    Rows of a decode step have one token each.
    """
    cache = kv_cache.write(rows.cache, rows.slots, positions, key, value)
    num_real = None if rows.step is None else rows.step.num_real
    real_query = real_rows(query, rows.step)
    slots, places = rows.slots[:num_real], positions[:num_real]

    def attend_row(row: tuple[Array, Array, Array]) -> Array:
        row_query, slot, row_positions = row
        return attend_slot(
            row_query, cache, slot, row_positions, window_tokens, logit_cap=logit_cap
        )

    return padded_again(jax.lax.map(attend_row, (real_query, slots, places)), rows.step), cache


def attend_prompts(
    query: Float[Array, "1 seq heads head_dim"],
    key: Float[Array, "1 seq kv_heads head_dim"],
    value: Float[Array, "1 seq kv_heads head_dim"],
    prompts: PackedPrompts,
    window_tokens: Int[Array, ""],
    *,
    logit_cap: float | None,
) -> tuple[Float[Array, "1 seq heads head_dim"], LayerCache]:
    """What the tokens of each prompt gather from its slot, and the cache with all of them in it.

    Prompt by prompt, so that one may stand where another stood. Only a prompt's own keys and values
    are written: a neighbour that is not finite must not get into its slot.
    """
    seq = query.shape[1]
    # Room for a prompt that begins at the last token.
    wide_query, wide_key, wide_value = (
        jnp.concatenate([x, jnp.zeros_like(x)], axis=1) for x in (query, key, value)
    )

    def add_prompt(
        index: Int[Array, ""], carry: tuple[Array, LayerCache]
    ) -> tuple[Array, LayerCache]:
        context, cache = carry
        offset, length = prompts.offsets[index], prompts.lengths[index]
        slot, start = prompts.slots[index], prompts.starts[index]

        def own(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, offset, seq, axis=1)[0]

        cache = kv_cache.write_prompt(cache, slot, start, length, own(wide_key), own(wide_value))
        prompt = _Prompt(cache, slot, offset, length, start)
        tile = min(seq, _TILE_TOKENS) if prompts.slots.shape[0] > 1 else seq
        return _add_prompt(context, wide_query, prompt, window_tokens, tile, logit_cap), cache

    start = (jnp.zeros_like(wide_query), prompts.cache)
    context, cache = jax.lax.fori_loop(0, prompts.num_prompts, add_prompt, start)
    return context[:, :seq], cache


class _Prompt(NamedTuple):
    """One of the `PackedPrompts`, whose keys and values are in the cache."""

    cache: LayerCache
    slot: Int[Array, ""]
    offset: Int[Array, ""]
    length: Int[Array, ""]
    start: Int[Array, ""]


def _add_prompt(
    context: Float[Array, "1 wide heads head_dim"],
    query: Float[Array, "1 wide heads head_dim"],
    prompt: _Prompt,
    window_tokens: Int[Array, ""],
    tile: int,
    logit_cap: float | None,
) -> Float[Array, "1 wide heads head_dim"]:
    """From the prompt's beginning, ``tile`` tokens at a time.

    So a prompt meets the same instructions, and gets the same bits, alone and behind others, and
    costs what its own tokens cost. What a tile leaves behind a prompt is overwritten by the next.
    """

    def add_tile(number: Int[Array, ""], context: Array) -> Array:
        place = number * tile
        attended = attend_slot(
            jax.lax.dynamic_slice_in_dim(query, prompt.offset + place, tile, axis=1)[0],
            prompt.cache,
            prompt.slot,
            prompt.start + place + jnp.arange(tile, dtype=jnp.int32),
            window_tokens,
            logit_cap=logit_cap,
            last_position=prompt.start + prompt.length - 1,
        )
        return jax.lax.dynamic_update_slice_in_dim(
            context, attended[None], prompt.offset + place, axis=1
        )

    num_tiles = (prompt.length + (tile - 1)) // tile
    added: Array = jax.lax.fori_loop(0, num_tiles, add_tile, context)
    return added
