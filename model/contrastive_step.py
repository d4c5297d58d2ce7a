"""One step of contrastive search: which candidate is the next token, and who may follow it.

The candidates have gone through the model, each in its slot. The winner's keys and values go into
the slots of the others, one position in each layer, so that all hold the same tokens again. Of
every token before, only the direction of its hidden state is kept: a cosine is then a product.

Source: Su et al. 2022, https://arxiv.org/abs/2202.06417, eq. 5.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.config import GemmaConfig
from model.gemma.forward import final_hidden
from model.gemma.kv_cache import LayerCache
from model.gemma.weights import GemmaWeights
from model.samplers.contrastive import direction
from model.search_rows import SearchRuleArrays, adjusted, measure
from model.search_slots import MAX_WIDTH
from model.slot_memory import BLOCK_TOKENS

# Of the hidden state of every position of a sequence, after the final norm; whole blocks.
Directions = Float[Array, "positions width"]


class CandidateRows(NamedTuple):
    """The candidates of one search, and where and how they are compared.

    ``slots`` hold ``num_slots`` in rows that only fill the batch.
    """

    slots: Int[Array, " candidates"]
    probabilities: Float[Array, " candidates"]
    position: Int[Array, ""]
    alpha: Float[Array, ""]


class CandidateOutputs(NamedTuple):
    """The winner, and the likeliest tokens after it.

    Attributes:
        place: Of the winner.
        token_ids: The next candidates, likeliest first,
        probabilities: theirs after biases and bans, and
        own_logprobs: their log-probabilities under the model's own distribution.
        top_ids: The likeliest tokens under that, and
        top_logprobs: their log-probabilities.
        is_finite: False if a candidate had NaN or infinity among its logits.
    """

    place: Int[Array, ""]
    token_ids: Int[Array, " width"]
    probabilities: Float[Array, " width"]
    own_logprobs: Float[Array, " width"]
    top_ids: Int[Array, " top"]
    top_logprobs: Float[Array, " top"]
    is_finite: Bool[Array, ""]


def keep_chunk(
    config: GemmaConfig,
    weights: GemmaWeights,
    directions: Directions,
    x: Float[Array, "1 seq width"],
    start: Int[Array, ""],
) -> Directions:
    """The directions with those of one chunk of a prompt.

    Args:
        config: Architecture (static).
        weights: Of the model.
        directions: Of the sequence.
        x: Residual stream of the chunk after the last block. What follows the chunk is padding,
            and is overwritten before it is looked at.
        start: Position of its first token.
    """
    own = direction(final_hidden(config, weights, x)[0])
    # Padding may reach beyond the context.
    places = start + jnp.arange(own.shape[0], dtype=start.dtype)
    return directions.at[places].set(own, mode="drop")


def choose_candidate(
    caches: list[LayerCache],
    directions: Directions,
    hidden: Float[Array, "candidates width"],
    logits: Float[Array, "candidates vocab"],
    rows: CandidateRows,
    rules: SearchRuleArrays,
) -> tuple[list[LayerCache], Directions, CandidateOutputs]:
    """The candidate with the best ``(1 − alpha) · probability − alpha · similarity``.

    The similarity is the largest cosine of its hidden state with those before it; −1 if there is
    none. Ties: the likelier candidate.
    """
    is_candidate = rows.slots < caches[0].keys.shape[0]
    own = direction(hidden)
    repetition = _largest_cosines(own, directions, rows.position)
    scores = (1 - rows.alpha) * rows.probabilities - rows.alpha * repetition
    place = jnp.argmax(jnp.where(is_candidate, scores, -jnp.inf)).astype(jnp.int32)
    zero = jnp.zeros((), rows.position.dtype)
    directions = jax.lax.dynamic_update_slice(directions, own[place][None], (rows.position, zero))
    caches = [_spread(cache, rows.slots, place, rows.position) for cache in caches]
    chosen = logits[place]
    adjusted_logits = adjusted(chosen, rules)
    best, ids = jax.lax.top_k(adjusted_logits, min(MAX_WIDTH, chosen.shape[0]))
    measured = measure(chosen, rules)
    outputs = CandidateOutputs(
        place,
        ids.astype(jnp.int32),
        jnp.exp(best - jax.nn.logsumexp(adjusted_logits)),
        chosen[ids] - measured.total,
        measured.top_ids,
        measured.top_logprobs,
        # One bad logit is enough: NaN reaches the maximum, and so does +inf.
        jnp.all(jnp.isfinite(jnp.max(logits, axis=1)) | ~is_candidate),
    )
    return caches, directions, outputs


def _largest_cosines(
    candidates: Float[Array, "candidates width"],
    directions: Directions,
    position: Int[Array, ""],
) -> Float[Array, " candidates"]:
    """Of each candidate with the positions before ``position``, in blocks as attention has them."""
    width = directions.shape[1]

    def add_block(block: Int[Array, ""], largest: Array) -> Array:
        start = block * BLOCK_TOKENS
        zero = jnp.zeros((), start.dtype)
        rows = jax.lax.dynamic_slice(directions, (start, zero), (BLOCK_TOKENS, width))
        is_before = start + jnp.arange(BLOCK_TOKENS, dtype=start.dtype) < position
        cosines = jnp.einsum("kd,td->kt", candidates, rows)
        return jnp.maximum(largest, jnp.max(jnp.where(is_before[None], cosines, -1.0), axis=1))

    num_blocks = (position + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    start = jnp.full(len(candidates), -1.0, jnp.float32)
    largest: Array = jax.lax.fori_loop(0, num_blocks, add_block, start)
    return largest


def _spread(
    cache: LayerCache,
    slots: Int[Array, " candidates"],
    place: Int[Array, ""],
    position: Int[Array, ""],
) -> LayerCache:
    """One position of the winner's slot in the slots of all."""
    offset = position % cache.num_positions

    def spread(array: Float[Array, "slots kv_heads cache head_dim"]) -> Array:
        winner = array[slots[place], :, offset]
        everywhere = jnp.broadcast_to(winner, (len(slots), *winner.shape))
        return array.at[slots, :, offset].set(everywhere, mode="drop")

    return LayerCache(spread(cache.keys), spread(cache.values))
