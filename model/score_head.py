"""What is told of a score: likelihoods of given tokens, from the residual stream before each.

A bounded number of places goes through the head together, whoever they belong to; so the memory
that it takes does not grow with the length of a text. XLA's product always has the same shape, a
row of the kernel's is its own affair, and everything else is done place by place; so neither a
neighbour nor the number of them changes a bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.config import GemmaConfig
from model.gemma.attention import soft_cap
from model.gemma.forward import final_hidden, head
from model.gemma.weights import GemmaWeights
from model.kernels.product import product
from model.slots import MAX_LOGPROBS

# The table is read once for all places that go through the head together: that is two fifths of the
# time of 16 places, and a sixth of that of 48 (docs/performance.md). The kernel's product takes
# time for real places alone, XLA's for all. 48 are 24, 16 or 12 places of 2, 3 or 4 versions.
_NATIVE_PLACES = 48
_XLA_PLACES = 16
# Of the native ones, no longer than a step of decoding.
_NATIVE_PLACES_OF_STEP = 8

# Up to here the series of the exponential is right to all digits.
_SMALL = 0.25


def head_places(*, is_native: bool) -> int:
    """Places that go through the head together at most."""
    return _NATIVE_PLACES if is_native else _XLA_PLACES


def head_places_of_step(*, is_native: bool) -> int:
    """Places for which the head takes no longer than a step; XLA's takes as long for any."""
    return _NATIVE_PLACES_OF_STEP if is_native else _XLA_PLACES


class AskedRows(NamedTuple):
    """Places, and what is asked about them; only the first of each are real.

    Attributes:
        num_rows: Real places.
        wants_top: Places whose likeliest tokens are told.
        num_pairs: Real pairs.
        pair_rows: The place of each pair.
        pair_ids: The token of each pair.
        num_compared: Real columns of the following.
        compared: Two places each: the first's distribution is compared with the other's.
    """

    num_rows: Int[Array, ""]
    wants_top: Bool[Array, " rows"]
    num_pairs: Int[Array, ""]
    pair_rows: Int[Array, " pairs"]
    pair_ids: Int[Array, " pairs"]
    num_compared: Int[Array, ""]
    compared: Int[Array, "2 rows"]


class HeadOutputs(NamedTuple):
    """Logits of every place, and what was asked.

    Attributes:
        logits: Of the model's own distribution.
        is_finite: Of each place; nothing else of it is valid if not.
        logprobs: Of each pair.
        ranks: Of each pair: tokens that are likelier, or as likely and of a lower id.
        top_ids: Of each place, best first; zeros where they were not asked for.
        top_logprobs: Theirs.
        divergences: Of each two places that are compared: KL(first ‖ other), in nats.
    """

    logits: Float[Array, "rows vocab"]
    is_finite: Bool[Array, " rows"]
    logprobs: Float[Array, " pairs"]
    ranks: Int[Array, " pairs"]
    top_ids: Int[Array, "rows top"]
    top_logprobs: Float[Array, "rows top"]
    divergences: Float[Array, " rows"]


def score_rows(
    config: GemmaConfig,
    weights: GemmaWeights,
    x: Float[Array, "rows width"],
    asked: AskedRows,
    room: Float[Array, "rows vocab"],
    *,
    is_native: bool,
) -> HeadOutputs:
    """Final norm, tied table, and what is asked of the result.

    Args:
        config: Architecture (static).
        weights: Of the model.
        x: The residual stream after the last block, at each place.
        asked: About them.
        room: Memory that the logits take over (`model.logits_room`); it is not read.
        is_native: The native kernel makes the logits, of the real places only; those of others are
            zeros then.
    """
    # JAX would leave out an argument that is not used at all, and its memory with it.
    x, _ = jax.lax.optimization_barrier((x, room))
    # What follows goes row by row and must not be fused with what has all rows.
    logits = jax.lax.optimization_barrier(
        _logits(config, weights, x, asked.num_rows, is_native=is_native)
    )
    (rows, vocab), pairs = logits.shape, asked.pair_ids.shape[0]
    num_top = min(MAX_LOGPROBS, vocab)
    nothing = _RowMeasures(
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(rows, bool),
        jnp.zeros((rows, num_top), jnp.int32),
        jnp.zeros((rows, num_top), jnp.float32),
    )

    def measure_row(row: Int[Array, ""], found: _RowMeasures) -> _RowMeasures:
        measured = _measure(logits[row], asked.wants_top[row], num_top)
        each = zip(found, measured, strict=True)
        return _RowMeasures(*(all_.at[row].set(new) for all_, new in each))

    of_rows = jax.lax.fori_loop(0, asked.num_rows, measure_row, nothing)

    def measure_pair(pair: Int[Array, ""], found: tuple[Array, Array]) -> tuple[Array, Array]:
        row, token_id = asked.pair_rows[pair], asked.pair_ids[pair]
        logit = logits[row, token_id]
        is_before = jnp.arange(vocab, dtype=jnp.int32) < token_id
        comes_first = (logits[row] > logit) | ((logits[row] == logit) & is_before)
        logprobs, ranks = found
        rank = jnp.sum(comes_first.astype(jnp.int32))
        return logprobs.at[pair].set(logit - of_rows.total[row]), ranks.at[pair].set(rank)

    no_pairs = (jnp.zeros(pairs, jnp.float32), jnp.zeros(pairs, jnp.int32))
    logprobs, ranks = jax.lax.fori_loop(0, asked.num_pairs, measure_pair, no_pairs)

    def compare(column: Int[Array, ""], found: Array) -> Array:
        first, other = asked.compared[:, column]
        of_first, of_other = (logits[row] - of_rows.total[row] for row in (first, other))
        return found.at[column].set(_divergence(of_first, of_other))

    divergences = jax.lax.fori_loop(
        0, asked.num_compared, compare, jnp.zeros(asked.compared.shape[1], jnp.float32)
    )
    tops = (of_rows.top_ids, of_rows.top_logprobs)
    return HeadOutputs(logits, of_rows.is_finite, logprobs, ranks, *tops, divergences)


def _logits(
    config: GemmaConfig,
    weights: GemmaWeights,
    x: Float[Array, "rows width"],
    num_real: Int[Array, ""],
    *,
    is_native: bool,
) -> Float[Array, "rows vocab"]:
    if not is_native:
        return head(config, weights, x[None])[0].astype(jnp.float32)
    hidden = final_hidden(config, weights, x[None])[0]
    return soft_cap(product(hidden, weights.embeddings, num_real), config.final_soft_cap)


def _divergence(p: Float[Array, " vocab"], q: Float[Array, " vocab"]) -> Float[Array, ""]:
    """KL(p ‖ q) of log-probabilities, as a sum of p · (eᵈ − 1 − d) where d = log q − log p.

    No term is negative, so none takes away what others added; and as p and q sum to 1, whatever
    is wrong with d alike everywhere, as the rounding of the sums is, counts by its square only.
    """
    d = q - p
    # Where d is small its exponential would leave nothing but rounding.
    series = 0.5 * d * d * (1.0 + d / 3.0 * (1.0 + d / 4.0 * (1.0 + d / 5.0 * (1.0 + d / 6.0))))
    weight = jnp.exp(p)
    terms = jnp.where(jnp.abs(d) < _SMALL, weight * series, jnp.exp(q) - weight * (1.0 + d))
    # What p cannot be, it adds nothing for; the difference may be no number there.
    return jnp.sum(jnp.where(weight > 0, jnp.maximum(terms, 0.0), jnp.exp(q)))


class _RowMeasures(NamedTuple):
    """Of one place, or of all."""

    total: Float[Array, "*rows"]
    is_finite: Bool[Array, "*rows"]
    top_ids: Int[Array, "*rows top"]
    top_logprobs: Float[Array, "*rows top"]


def _measure(
    logits: Float[Array, " vocab"], wants_top: Bool[Array, ""], num_top: int
) -> _RowMeasures:
    total = jax.nn.logsumexp(logits)

    def likeliest() -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(logits, num_top)
        return ids.astype(jnp.int32), values - total

    def nothing() -> tuple[Array, Array]:
        return jnp.zeros(num_top, jnp.int32), jnp.zeros(num_top, jnp.float32)

    # One bad logit is enough: NaN reaches the maximum, and so does +inf.
    is_finite = jnp.isfinite(jnp.max(logits))
    return _RowMeasures(total, is_finite, *jax.lax.cond(wants_top, likeliest, nothing))
