"""What beam and contrastive search share: rows of one request that go through the model together.

A step is two programs. The large one, `advance_padded`, is the model for 4 or 8 rows; the small one
looks at what came out, and is the same for any number of rows. A row that only fills the batch has
the slot ``num_slots``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.adapter_bank import BankArrays
from model.config import GemmaConfig
from model.decode import ModelRows, advance_rows
from model.gemma.block import LayerTraits
from model.gemma.kv_cache import LayerCache
from model.gemma.padded_rows import pad_rows
from model.gemma.weights import GemmaWeights
from model.interventions import RowInterventions
from model.samplers.penalties import add_biases
from model.slots import MAX_LOGPROBS

# Rows of what a step of a search looks at, whatever the number of its rows.
SEARCH_ROWS = 8


class SearchRuleArrays(NamedTuple):
    """`model.search_slots.SearchRules` as arguments of a program; V where there is no id."""

    banned_ids: Int[Array, " banned"]
    bias_ids: Int[Array, " biases"]
    biases: Float[Array, " biases"]
    wants_logprobs: Bool[Array, ""]


class Measure(NamedTuple):
    """The model's own distribution of one row; zeros where nobody wants it.

    ``total`` is what a logit is lowered by to be a log-probability.
    """

    total: Float[Array, ""]
    top_ids: Int[Array, " top"]
    top_logprobs: Float[Array, " top"]


def advance_padded(
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
    """`model.decode.advance_rows` with eight rows of results, whatever the number of rows."""
    model = (config, weights, traits, caches)
    rows = advance_rows(
        *(*model, token_ids, positions, slots, interventions, bank, adapters),
        is_native=is_native,
    )
    hidden, logits = (pad_rows(x, SEARCH_ROWS) for x in (rows.hidden, rows.logits))
    return ModelRows(rows.caches, hidden, logits)


def adjusted(logits: Float[Array, " vocab"], rules: SearchRuleArrays) -> Float[Array, " vocab"]:
    """Logits with the biases of a request, and −inf for what is banned."""
    biased = add_biases(logits, rules.bias_ids, rules.biases)
    allowed: Array = jax.lax.cond(
        jnp.any(rules.banned_ids < logits.shape[0]),
        lambda: biased.at[rules.banned_ids].set(-jnp.inf, mode="drop"),
        lambda: biased,
    )
    return allowed


def measure(logits: Float[Array, " vocab"], rules: SearchRuleArrays) -> Measure:
    """The model's own distribution, before biases and bans, if the request wants it."""
    count = _num_alternatives(logits)

    def look() -> Measure:
        total = jax.nn.logsumexp(logits)
        top_logits, top_ids = jax.lax.top_k(logits, count)
        return Measure(total, top_ids.astype(jnp.int32), top_logits - total)

    measured: Measure = jax.lax.cond(rules.wants_logprobs, look, lambda: no_measure(logits))
    return measured


def no_measure(logits: Float[Array, " vocab"]) -> Measure:
    """Zeros in the place of a measure."""
    count = _num_alternatives(logits)
    return Measure(jnp.float32(0), jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.float32))


def _num_alternatives(logits: Float[Array, " vocab"]) -> int:
    return min(MAX_LOGPROBS, logits.shape[0])
