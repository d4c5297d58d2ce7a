"""Decode: up to eight tokens for each row of a batch, in one compiled program per row count.

Everything that a request can vary is an array, the number of steps is a loop bound, and everything
that a row does beyond the products with the weights is done row by row; so neither a value nor a
neighbour changes the program or the bits. What no row asks for is skipped under a condition.

A step reads its token from the slot and writes the one it draws behind it. A row that has ended,
by an id or at its length, goes on as a filler of the batch.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.adapter_bank import BankArrays, bank_terms
from model.config import GemmaConfig
from model.gemma.block import LayerTraits, block
from model.gemma.cached_attention import SlotRows
from model.gemma.forward import (
    EMBEDDING_LAYER,
    embed,
    final_hidden,
    look_up,
    scale_embeddings,
    unembed,
)
from model.gemma.kv_cache import LayerCache
from model.gemma.low_rank import row_slots
from model.gemma.padded_rows import pad_rows, padded_again, step_rows
from model.gemma.slot_tokens import SlotTokens
from model.gemma.weights import GemmaWeights
from model.interventions import DrawingInterventions, RowInterventions, intervene_rows
from model.samplers.draw import MIN_TEMPERATURE, SamplingRows, draw
from model.samplers.penalties import PenaltyRows, adjust, is_adjusted
from model.samplers.selection import likeliest
from model.slots import MAX_LOGPROBS, MAX_STEPS


class SlotStates(NamedTuple):
    """What the slots hold: the tokens of each sequence, and their keys and values by layer."""

    tokens: Int[Array, "slots context"]
    caches: list[LayerCache]


class RuleRows(NamedTuple):
    """`model.slots.RowRules` of each row; every field is an array, so no value compiles anything.

    Attributes:
        sampling: How each row draws.
        penalties: What changes its logits before.
        num_prompt: Tokens of its prompt.
        end: Tokens of its sequence when it is at its longest.
        stop_ids: Ids that end it; V where there is none.
        may_stop_at: First position at which one of them may be drawn.
        wants_logprobs: Rows that report log-probabilities.
    """

    sampling: SamplingRows
    penalties: PenaltyRows
    num_prompt: Int[Array, " batch"]
    end: Int[Array, " batch"]
    stop_ids: Int[Array, "batch stops"]
    may_stop_at: Int[Array, " batch"]
    wants_logprobs: Bool[Array, " batch"]


class DecodeOutputs(NamedTuple):
    """What each row drew at one step; log-probabilities are zeros in rows that want none.

    ``is_drawn`` is False for a row that had ended: nothing else of it is valid then.
    """

    is_drawn: Bool[Array, "*steps batch"]
    token_ids: Int[Array, "*steps batch"]
    is_finite: Bool[Array, "*steps batch"]
    logprobs: Float[Array, "*steps batch"]
    top_ids: Int[Array, "*steps batch top"]
    top_logprobs: Float[Array, "*steps batch top"]


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
    interventions: RowInterventions,
    bank: BankArrays | None,
    adapters: Int[Array, " batch"],
    *,
    is_native: bool,
) -> ModelRows:
    """Writes each row's token into its slot; hidden states and logits after it.

    The bits of a row depend neither on the number of rows nor on its place among them. A row with
    the slot ``num_slots`` only fills the batch. ``adapters`` are slots of the bank, 0 for the base,
    which is all there is without one. With ``is_native`` the native kernel computes; its bits are
    not those of XLA, and it needs no padding.
    """
    step = step_rows(len(token_ids), is_native=is_native)
    num_rows = len(token_ids) if is_native else step.num_padded
    slots = pad_rows(slots, num_rows, caches[0].keys.shape[0])
    positions = pad_rows(positions, num_rows)[:, None]
    change = partial(intervene_rows, changes=interventions, num_padded=step.num_padded)
    padded_ids = pad_rows(token_ids, num_rows)[:, None]
    x = jax.lax.optimization_barrier(_embed_rows(weights, padded_ids, interventions, change))
    used = row_slots(adapters, is_native=is_native)
    new_caches = []
    for layer, cache in enumerate(caches):
        rows = (
            SlotTokens(cache, slots, jnp.int32(num_rows))
            if is_native
            else SlotRows(cache, slots, step)
        )
        terms = {} if bank is None else bank_terms(bank.layers[layer], bank.ranks, used)
        x, new_cache = block(
            config,
            weights.blocks[layer],
            traits[layer],
            x,
            positions,
            rows=rows,
            adapters=terms,
            intervene=partial(change, layer=layer),
        )
        assert new_cache is not None
        new_caches.append(new_cache)
    if is_native:
        x = padded_again(x, step)
    hidden = final_hidden(config, weights, x)
    logits = unembed(config, weights, hidden, step)[:, 0].astype(jnp.float32)
    return ModelRows(new_caches, hidden[: step.num_real, 0], logits)


def _embed_rows(
    weights: GemmaWeights,
    token_ids: Int[Array, "batch 1"],
    interventions: RowInterventions,
    change_rows: Callable[..., Array],
) -> Float[Array, "batch 1 width"]:
    """The residual stream before the first block.

    Scaling is in the branches: with it behind the condition, bits depended on the number of rows.
    """

    def change(token_ids: Int[Array, "batch 1"]) -> Float[Array, "batch 1 width"]:
        return scale_embeddings(change_rows(look_up(weights, token_ids), layer=EMBEDDING_LAYER))

    is_any_due = jnp.any(interventions.layers[:, :, EMBEDDING_LAYER + 1])
    embedded: Array = jax.lax.cond(is_any_due, change, partial(embed, weights), token_ids)
    return embedded


class _Progress(NamedTuple):
    """Between two steps: how many were made, which rows go on, and the ids that ended others."""

    step: Int[Array, ""]
    goes_on: Bool[Array, " batch"]
    stopped_by: Int[Array, " batch"]
    states: SlotStates
    outputs: DecodeOutputs


def decode_steps(
    config: GemmaConfig,
    weights: GemmaWeights,
    traits: list[LayerTraits],
    states: SlotStates,
    slots: Int[Array, " batch"],
    positions: Int[Array, " batch"],
    rules: RuleRows,
    interventions: DrawingInterventions,
    num_steps: Int[Array, ""],
    bank: BankArrays | None,
    adapters: Int[Array, " batch"],
    *,
    is_native: bool,
) -> tuple[SlotStates, DecodeOutputs]:
    """Draws up to ``num_steps`` tokens for each row and writes them into its slot.

    Args:
        config: Architecture (static).
        weights: Of the model.
        traits: Of the layers.
        states: Of all slots.
        slots: Which sequence each row continues; ``num_slots`` marks a row that only fills the
            batch.
        positions: Of the newest token of each.
        rules: Of each row.
        interventions: Of each row.
        num_steps: At most `MAX_STEPS`.
        bank: Adapters, if there may be any.
        adapters: Slot of each row's adapter; 0 is the base.
        is_native: Products are made by the native kernel, not by XLA (static).

    Returns:
        The states with the drawn tokens, and `MAX_STEPS` outputs in order.
    """
    num_slots, num_rows = states.tokens.shape[0], len(slots)
    newest = states.tokens.at[slots, positions].get(mode="clip")
    # The dispatch before may have drawn the end of a row after this one was asked for.
    first = _Progress(
        jnp.int32(0),
        (slots < num_slots) & goes_on(newest, positions, rules),
        jnp.full(num_rows, config.vocabulary_size, jnp.int32),
        states,
        no_outputs(config, num_rows),
    )

    def is_unfinished(at: _Progress) -> Bool[Array, ""]:
        return (at.step < num_steps) & jnp.any(at.goes_on)

    def step(at: _Progress) -> _Progress:
        drawn_at = positions + at.step + 1
        states, drawn = _decode_step(
            config,
            weights,
            traits,
            at.states,
            jnp.where(at.goes_on, slots, num_slots),
            drawn_at - 1,
            rules,
            interventions.at(drawn_at - 1, rules.num_prompt),
            bank,
            adapters,
            is_native=is_native,
        )
        outputs = jax.tree.map(
            lambda all_, new: all_.at[at.step].set(new),
            at.outputs,
            drawn._replace(is_drawn=at.goes_on),
        )
        is_stop = _is_stop(drawn.token_ids, rules.stop_ids)
        stopped_by = jnp.where(at.goes_on & is_stop, drawn.token_ids, at.stopped_by)
        has_more = at.goes_on & ~is_stop & (drawn_at + 1 < rules.end) & drawn.is_finite
        return _Progress(at.step + 1, has_more, stopped_by, states, outputs)

    last = jax.lax.while_loop(is_unfinished, step, first)
    # The next dispatch looks for the end of a row where it begins itself.
    ended = jnp.where(last.stopped_by < config.vocabulary_size, slots, num_slots)
    tokens = last.states.tokens.at[ended, positions + num_steps].set(last.stopped_by, mode="drop")
    return last.states._replace(tokens=tokens), last.outputs


def goes_on(
    newest: Int[Array, " batch"], positions: Int[Array, " batch"], rules: RuleRows
) -> Bool[Array, " batch"]:
    """Rows whose newest token, at ``positions``, is not their last one."""
    has_ended = (positions >= rules.num_prompt) & _is_stop(newest, rules.stop_ids)
    return ~has_ended & (positions + 1 < rules.end)


def _is_stop(
    token_ids: Int[Array, " batch"], stop_ids: Int[Array, "batch stops"]
) -> Bool[Array, " batch"]:
    return jnp.any(token_ids[:, None] == stop_ids, axis=1)


def no_outputs(config: GemmaConfig, num_rows: int) -> DecodeOutputs:
    """Room for what `MAX_STEPS` steps draw."""

    def zeros(dtype: jnp.dtype, *width: int) -> Array:
        return jnp.zeros((MAX_STEPS, num_rows, *width), dtype)

    top = min(MAX_LOGPROBS, config.vocabulary_size)
    integer, number, truth = jnp.dtype("int32"), jnp.dtype("float32"), jnp.dtype("bool")
    return DecodeOutputs(
        zeros(truth), zeros(integer), zeros(truth), zeros(number), zeros(integer, top),
        zeros(number, top),
    )  # fmt: skip


def _decode_step(
    config: GemmaConfig,
    weights: GemmaWeights,
    traits: list[LayerTraits],
    states: SlotStates,
    slots: Int[Array, " batch"],
    positions: Int[Array, " batch"],
    rules: RuleRows,
    interventions: RowInterventions,
    bank: BankArrays | None,
    adapters: Int[Array, " batch"],
    *,
    is_native: bool,
) -> tuple[SlotStates, DecodeOutputs]:
    """One step of every row: reads its newest token, writes the next."""
    tokens, caches = states
    newest = tokens.at[slots, positions].get(mode="clip")
    model = (config, weights, traits, caches)
    rows = advance_rows(
        *(*model, newest, positions, slots, interventions, bank, adapters), is_native=is_native
    )
    tokens, drawn = draw_rows(tokens, rows.logits, slots, positions, rules)
    return SlotStates(tokens, rows.caches), drawn


def draw_rows(
    tokens: Int[Array, "slots context"],
    logits: Float[Array, "batch vocab"],
    slots: Int[Array, " batch"],
    positions: Int[Array, " batch"],
    rules: RuleRows,
) -> tuple[Int[Array, "slots context"], DecodeOutputs]:
    """Draws the token behind ``positions`` of each row, and writes it into its slot."""
    is_past = jnp.arange(tokens.shape[1])[None, :] <= positions[:, None]
    history = jnp.where(is_past, tokens.at[slots].get(mode="clip"), logits.shape[1])
    drawn = jax.lax.map(lambda row: finish_row(*row), (logits, rules, history, positions + 1))
    return tokens.at[slots, positions + 1].set(drawn.token_ids, mode="drop"), drawn


def finish_row(
    logits: Float[Array, " vocab"],
    rules: RuleRows,
    history: Int[Array, " context"],
    position: Int[Array, ""],
) -> DecodeOutputs:
    """Draws the token at ``position`` of one row and measures it."""
    vocab = logits.shape[0]
    may_not_stop = (position < rules.may_stop_at) & jnp.any(rules.stop_ids < vocab)
    is_drawn = rules.sampling.temperature >= MIN_TEMPERATURE
    largest = jnp.max(logits)

    def choose() -> Int[Array, ""]:
        adjusted = adjust(logits, rules.penalties, history, rules.num_prompt)
        allowed = jax.lax.cond(
            may_not_stop,
            lambda: adjusted.at[rules.stop_ids].set(-jnp.inf, mode="drop"),
            lambda: adjusted,
        )
        chosen: Array = jax.lax.cond(
            is_drawn,
            lambda: draw(allowed, *rules.sampling, position).astype(jnp.int32),
            lambda: likeliest(allowed),
        )
        return chosen

    # Most rows want the largest logit as it is: each array that is passed on costs a copy.
    token_id = jax.lax.cond(
        is_drawn | may_not_stop | is_adjusted(rules.penalties, vocab),
        choose,
        lambda: likeliest(logits, largest),
    )
    logprob, top_ids, top_logprobs = jax.lax.cond(
        rules.wants_logprobs, lambda: _measure(logits, token_id), lambda: _nothing(logits)
    )
    # One bad logit is enough: NaN reaches the maximum, and so does +inf.
    is_finite = jnp.isfinite(largest)
    return DecodeOutputs(jnp.bool_(True), token_id, is_finite, logprob, top_ids, top_logprobs)


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
