"""Penalties on tokens that a sequence has already, and biases that a request adds.

The tokens are counted anew at every step, from the slot's own ids. So no count stays on the device
between steps, and a row's logits depend on its own request alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class PenaltyRows(NamedTuple):
    """What changes the logits of each row before it draws.

    Attributes:
        repetition: Divides a positive logit of a token seen in prompt or completion, multiplies a
            negative one; 1 is off.
        presence: Taken from the logit of a token of the completion; 0 is off.
        frequency: Taken from it once for each time it is there; 0 is off.
        bias_ids: V fills it up.
        biases: Added to the logits of ``bias_ids``.
    """

    repetition: Float[Array, " batch"]
    presence: Float[Array, " batch"]
    frequency: Float[Array, " batch"]
    bias_ids: Int[Array, "batch biases"]
    biases: Float[Array, "batch biases"]


def is_adjusted(row: PenaltyRows, vocabulary_size: int) -> Bool[Array, ""]:
    """Whether `adjust` changes anything for one row."""
    return _is_penalized(row) | _is_biased(row.bias_ids, vocabulary_size)


def adjust(
    logits: Float[Array, " vocab"],
    row: PenaltyRows,
    history: Int[Array, " history"],
    num_prompt: Int[Array, ""],
) -> Float[Array, " vocab"]:
    """One row's logits with its penalties, then with its biases; what is off is skipped.

    Args:
        logits: float32.
        row: `PenaltyRows` without the batch axis.
        history: The row's tokens so far, prompt first; V where there is none.
        num_prompt: How many of them are the prompt.
    """
    penalized = jax.lax.cond(
        _is_penalized(row), lambda: _penalized(logits, row, history, num_prompt), lambda: logits
    )
    return add_biases(penalized, row.bias_ids, row.biases)


def add_biases(
    logits: Float[Array, " vocab"], bias_ids: Int[Array, " biases"], biases: Float[Array, " biases"]
) -> Float[Array, " vocab"]:
    """One row's logits with its biases; skipped if every id is V."""
    return jax.lax.cond(
        _is_biased(bias_ids, logits.shape[0]),
        lambda: logits.at[bias_ids].add(biases, mode="drop"),
        lambda: logits,
    )


def _is_penalized(row: PenaltyRows) -> Bool[Array, ""]:
    return (row.repetition != 1) | (row.presence != 0) | (row.frequency != 0)


def _is_biased(bias_ids: Int[Array, " biases"], vocabulary_size: int) -> Bool[Array, ""]:
    return jnp.any(bias_ids < vocabulary_size)


def _penalized(
    logits: Float[Array, " vocab"],
    row: PenaltyRows,
    history: Int[Array, " history"],
    num_prompt: Int[Array, ""],
) -> Float[Array, " vocab"]:
    is_completion = jnp.arange(history.shape[0]) >= num_prompt
    # Counts are whole numbers: the order in which a scatter adds them is not in the result.
    nothing = jnp.zeros(logits.shape, jnp.float32)
    counts = nothing.at[history].add(is_completion.astype(jnp.float32), mode="drop")
    is_seen = nothing.at[history].set(1.0, mode="drop") > 0
    repeated = jnp.where(logits > 0, logits / row.repetition, logits * row.repetition)
    penalized = jnp.where(is_seen, repeated, logits)
    return penalized - row.frequency * counts - jnp.where(counts > 0, row.presence, 0.0)
