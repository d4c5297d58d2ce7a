"""One step of beam search: from the logits of every beam to the likeliest continuations of all.

No vocabulary is sorted: the best eight of all continuations are among the best eight of each beam.
A beam that is done has one continuation, itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.search_rows import Measure, SearchRuleArrays, adjusted, measure, no_measure
from model.search_slots import MAX_WIDTH

NO_TOKEN = -1


class BeamRows(NamedTuple):
    """The beams of one search; a row that is neither live nor done only fills the batch."""

    logprobs: Float[Array, " beams"]
    is_live: Bool[Array, " beams"]
    is_done: Bool[Array, " beams"]


class BeamOutputs(NamedTuple):
    """The likeliest continuations, best first, and what is known of the row that each continues.

    Attributes:
        sources: Which beam each continues.
        token_ids: Its new token; `NO_TOKEN` if it was done.
        logprobs: Of all its tokens together.
        own_logprobs: Of its new token under the model's own distribution.
        top_ids: The likeliest tokens in its place, and
        top_logprobs: their log-probabilities.
        is_finite: False if a live beam had NaN or infinity among its logits.
    """

    sources: Int[Array, " beams"]
    token_ids: Int[Array, " beams"]
    logprobs: Float[Array, " beams"]
    own_logprobs: Float[Array, " beams"]
    top_ids: Int[Array, "beams top"]
    top_logprobs: Float[Array, "beams top"]
    is_finite: Bool[Array, ""]


class _Continuations(NamedTuple):
    token_ids: Int[Array, " width"]
    logprobs: Float[Array, " width"]
    own_logprobs: Float[Array, " width"]
    measure: Measure
    is_finite: Bool[Array, ""]


def extend_beams(
    logits: Float[Array, "beams vocab"], beams: BeamRows, rules: SearchRuleArrays
) -> BeamOutputs:
    """The best continuations of all beams by one token. Ties: the earlier beam, the lower id."""
    found = jax.lax.map(lambda row: _continue_beam(row[0], row[1], rules), (logits, beams))
    width = found.logprobs.shape[1]
    logprobs, places = jax.lax.top_k(found.logprobs.reshape(-1), len(logits))
    sources = (places // width).astype(jnp.int32)
    return BeamOutputs(
        sources,
        found.token_ids.reshape(-1)[places],
        logprobs,
        found.own_logprobs.reshape(-1)[places],
        found.measure.top_ids[sources],
        found.measure.top_logprobs[sources],
        jnp.all(found.is_finite),
    )


def _continue_beam(
    logits: Float[Array, " vocab"], beam: BeamRows, rules: SearchRuleArrays
) -> _Continuations:
    """The best continuations of one beam; −inf where it has fewer."""
    width = min(MAX_WIDTH, logits.shape[0])

    def look() -> _Continuations:
        allowed = adjusted(logits, rules)
        best, ids = jax.lax.top_k(allowed, width)
        own = measure(logits, rules)
        return _Continuations(
            ids.astype(jnp.int32),
            beam.logprobs + (best - jax.nn.logsumexp(allowed)),
            logits[ids] - own.total,
            own,
            # One bad logit is enough: NaN reaches the maximum, and so does +inf.
            jnp.isfinite(jnp.max(logits)),
        )

    def stay() -> _Continuations:
        itself = jnp.where(beam.is_done, beam.logprobs, -jnp.inf)
        return _Continuations(
            jnp.full(width, NO_TOKEN, jnp.int32),
            jnp.full(width, -jnp.inf, jnp.float32).at[0].set(itself),
            jnp.zeros(width, jnp.float32),
            no_measure(logits),
            jnp.bool_(True),
        )

    continuations: _Continuations = jax.lax.cond(beam.is_live, look, stay)
    return continuations
