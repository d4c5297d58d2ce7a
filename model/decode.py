"""One decode step: one token for each row of a batch, in one compiled program per row count.

Everything that a request can vary is an array, and everything that a row does beyond the products
with the weights is done row by row, so neither a value nor a neighbour changes the program or the
bits. What no row asks for is skipped under a condition.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.config import GemmaConfig
from model.gemma.block import LayerTraits, SlotRows, block
from model.gemma.forward import embed, final_hidden, unembed
from model.gemma.kv_cache import LayerCache
from model.gemma.padded_rows import pad_rows
from model.gemma.weights import GemmaWeights
from model.samplers.draw import MIN_TEMPERATURE, SamplingRows, draw
from model.samplers.penalties import PenaltyRows, adjust
from model.slots import MAX_LOGPROBS


class DecodeInputs(NamedTuple):
    """The rows of one step.

    Attributes:
        token_ids: The newest token of each row.
        positions: Of that token.
        slots: Whose cache each row continues; ``num_slots`` marks a row that only fills the batch.
        sampling: How each row draws.
        penalties: What changes its logits before.
        banned_ids: Ids that must not be drawn; V where there is none.
        wants_logprobs: Rows that report log-probabilities.
    """

    token_ids: Int[Array, " batch"]
    positions: Int[Array, " batch"]
    slots: Int[Array, " batch"]
    sampling: SamplingRows
    penalties: PenaltyRows
    banned_ids: Int[Array, "batch banned"]
    wants_logprobs: Bool[Array, " batch"]


class DecodeOutputs(NamedTuple):
    """What each row drew; log-probabilities are zeros in rows that want none."""

    token_ids: Int[Array, " batch"]
    is_finite: Bool[Array, " batch"]
    logprobs: Float[Array, " batch"]
    top_ids: Int[Array, "batch top"]
    top_logprobs: Float[Array, "batch top"]


class ModelRows(NamedTuple):
    """What the model makes of the newest token of each row, before anything is drawn."""

    caches: list[LayerCache]
    hidden: Float[Array, "batch width"]
    logits: Float[Array, "batch vocab"]


def advance_rows(
    config: GemmaConfig,
    weights: GemmaWeights,
    traits: list[LayerTraits],
    caches: list[LayerCache],
    token_ids: Int[Array, " batch"],
    positions: Int[Array, " batch"],
    slots: Int[Array, " batch"],
) -> ModelRows:
    """Writes each row's token into its slot; hidden states and logits after it.

    The bits of a row depend neither on the number of rows nor on its place among them. A row with
    the slot ``num_slots`` only fills the batch.
    """
    num_rows, num_slots = len(token_ids), caches[0].keys.shape[0]
    padded_slots = pad_rows(slots, num_slots)
    padded_positions = pad_rows(positions)[:, None]
    x = jax.lax.optimization_barrier(embed(weights, pad_rows(token_ids)[:, None]))
    new_caches = []
    for layer, cache in enumerate(caches):
        x, new_cache = block(
            config,
            weights.blocks[layer],
            traits[layer],
            x,
            padded_positions,
            rows=SlotRows(cache, padded_slots, num_rows),
        )
        assert new_cache is not None
        new_caches.append(new_cache)
    hidden = final_hidden(config, weights, x)
    logits = unembed(config, weights, hidden, num_rows)[:num_rows, 0].astype(jnp.float32)
    return ModelRows(new_caches, hidden[:num_rows, 0], logits)


def decode_step(
    config: GemmaConfig,
    weights: GemmaWeights,
    traits: list[LayerTraits],
    caches: list[LayerCache],
    inputs: DecodeInputs,
) -> tuple[list[LayerCache], DecodeOutputs]:
    """Writes each row's token into its slot and draws the token after it."""
    rows = advance_rows(
        config, weights, traits, caches, inputs.token_ids, inputs.positions, inputs.slots
    )
    return rows.caches, jax.lax.map(lambda row: _finish_row(*row), (rows.logits, inputs))


def _finish_row(logits: Float[Array, " vocab"], row: DecodeInputs) -> DecodeOutputs:
    """Draws one row's token and measures it."""
    sampling = row.sampling
    adjusted = adjust(logits, row.penalties)
    allowed = jax.lax.cond(
        jnp.any(row.banned_ids < logits.shape[0]),
        lambda: adjusted.at[row.banned_ids].set(-jnp.inf, mode="drop"),
        lambda: adjusted,
    )
    token_id = jax.lax.cond(
        sampling.temperature >= MIN_TEMPERATURE,
        lambda: draw(allowed, *sampling, row.positions + 1).astype(jnp.int32),
        lambda: jnp.argmax(allowed).astype(jnp.int32),
    )
    logprob, top_ids, top_logprobs = jax.lax.cond(
        row.wants_logprobs, lambda: _measure(logits, token_id), lambda: _nothing(logits)
    )
    # One bad logit is enough: NaN reaches the maximum, and so does +inf.
    is_finite = jnp.isfinite(jnp.max(logits))
    return DecodeOutputs(token_id, is_finite, logprob, top_ids, top_logprobs)


_Measure = tuple[Float[Array, ""], Int[Array, " top"], Float[Array, " top"]]


def _measure(logits: Float[Array, " vocab"], token_id: Int[Array, ""]) -> _Measure:
    """Log-probabilities under the model's own distribution: before penalties, bans and cuts."""
    total = jax.nn.logsumexp(logits)
    top_logits, top_ids = jax.lax.top_k(logits, _num_alternatives(logits))
    return logits[token_id] - total, top_ids.astype(jnp.int32), top_logits - total


def _nothing(logits: Float[Array, " vocab"]) -> _Measure:
    count = _num_alternatives(logits)
    return jnp.float32(0), jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.float32)


def _num_alternatives(logits: Float[Array, " vocab"]) -> int:
    return min(MAX_LOGPROBS, logits.shape[0])
