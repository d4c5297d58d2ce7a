"""Which tokens of one row may be drawn: top-k and top-p without sorting the vocabulary.

A sort of 262,144 logits costs more than the model. Both rules only need a threshold, and a float32
orders like its bits (after one fix for the sign), so the threshold is found bit by bit: 32 passes
that each count, or weigh, the logits at or above a candidate.

Ties: of equal logits the lower id stands first, as in a stable descending sort.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

_NUM_BITS = 32
# The smallest normal float32: keeps a division by a vanished weight finite.
_SMALLEST_WEIGHT = 1.1754944e-38


def ordered_bits(x: Float[Array, " vocab"]) -> UInt32[Array, " vocab"]:
    """Unsigned integers that compare as the float32 values do; −0.0 and 0.0 become equal."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def likeliest(
    logits: Float[Array, " vocab"], largest: Float[Array, ""] | None = None
) -> Int[Array, ""]:
    """The lowest id of the largest logit (found if not given); the last id if one of them is NaN.

    Two plain reductions, which a CPU runs at the speed of memory; one that carries the place of
    the maximum along, as ``jnp.argmax`` does, took twelve times as long for 262,144 logits.
    """
    last = logits.shape[0] - 1
    ids = jnp.arange(logits.shape[0], dtype=jnp.int32)
    largest = jnp.max(logits) if largest is None else largest
    return jnp.min(jnp.where(logits == largest, ids, last))


def _largest_threshold(holds: Callable[[UInt32[Array, ""]], Bool[Array, ""]]) -> UInt32[Array, ""]:
    """The largest t for which ``holds(t)``; it must hold at 0 and stop holding once for good."""

    def set_bit(step: Int[Array, ""], found: UInt32[Array, ""]) -> UInt32[Array, ""]:
        candidate = found | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, _NUM_BITS, set_bit, jnp.uint32(0))


def _first_ties(is_tie: Bool[Array, " vocab"], num_kept: Int[Array, ""]) -> Bool[Array, " vocab"]:
    """The ``num_kept`` members of ``is_tie`` with the lowest ids."""
    ids = jnp.arange(is_tie.shape[0], dtype=jnp.uint32)

    def bisect() -> Bool[Array, " vocab"]:
        # A cumulative sum over the vocabulary would cost many more passes.
        end = _largest_threshold(
            lambda bound: jnp.sum((is_tie & (ids < bound)).astype(jnp.int32)) <= num_kept
        )
        return is_tie & (ids < end)

    every_tie_stays = jnp.sum(is_tie.astype(jnp.int32)) <= num_kept
    return jax.lax.cond(every_tie_stays, lambda: is_tie, bisect)


def top_k_mask(logits: Float[Array, " vocab"], k: Int[Array, ""]) -> Bool[Array, " vocab"]:
    """True for the k largest logits; for all of them if k is 0 or at least V."""
    keys = ordered_bits(logits)
    wanted = jnp.where(k <= 0, logits.shape[0], jnp.minimum(k, logits.shape[0]))
    threshold = _largest_threshold(
        lambda bound: jnp.sum((keys >= bound).astype(jnp.int32)) >= wanted
    )
    above = keys > threshold
    num_ties = wanted - jnp.sum(above.astype(jnp.int32))
    return above | _first_ties(keys == threshold, num_ties)


def top_p_mask(
    logits: Float[Array, " vocab"],
    weights: Float[Array, " vocab"],
    top_p: Float[Array, ""],
) -> Bool[Array, " vocab"]:
    """True for each token whose likelier tokens have together at most ``top_p`` of the mass.

    So the token that crosses ``top_p`` is kept, and the likeliest always is.

    Args:
        logits: Their order decides what is likelier.
        weights: exp(logit − largest); zero where a token is already excluded. Any common factor.
        top_p: In (0, 1].

    Source: Holtzman et al. 2019, https://arxiv.org/abs/1904.09751, section 3.1; the rule about the
    crossing token is keras-hub's (spec 4.3).
    """
    keys = ordered_bits(logits)
    budget = top_p * jnp.sum(weights)

    def mass_at_or_above(bound: UInt32[Array, ""]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(keys >= bound, weights, 0.0))

    # The largest value with more than the budget at or above it crosses the budget; if there is
    # none, every token stays.
    threshold = _largest_threshold(lambda bound: (bound == 0) | (mass_at_or_above(bound) > budget))
    above = keys > threshold
    is_tie = keys == threshold
    left = budget - jnp.sum(jnp.where(above, weights, 0.0))
    tie_weight = jnp.max(jnp.where(is_tie, weights, 0.0))
    num_ties = jnp.floor(left / jnp.maximum(tie_weight, _SMALLEST_WEIGHT)) + 1.0
    kept = jnp.minimum(num_ties, logits.shape[0]).astype(jnp.int32)
    return (top_p >= 1.0) | above | _first_ties(is_tie, kept)
