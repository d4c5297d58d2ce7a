"""The derivative of log-probabilities by the residual stream in front of the head.

It goes on from the logits that `model.score_head` made for some places, so the table is read once
more and no longer text makes it hold more than those places have::

    d log p(t) / d logits = [1 at t] − p
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.config import GemmaConfig
from model.gemma.forward import final_hidden
from model.gemma.weights import GemmaWeights
from model.kernels.back_product import back_product


def score_gradient(
    config: GemmaConfig,
    weights: GemmaWeights,
    x: Float[Array, "rows width"],
    logits: Float[Array, "rows vocab"],
    token_ids: Int[Array, " rows"],
    amounts: Float[Array, " rows"],
    num_real: Int[Array, ""],
    *,
    is_native: bool,
) -> tuple[Float[Array, "rows width"], Float[Array, "rows vocab"]]:
    """The derivative of ``sum(amounts · log p(token_ids))`` by each row of ``x``.

    Returns it, and the memory of ``logits``, which is taken over (`model.logits_room`).

    Args:
        config: Architecture (static).
        weights: Of the model.
        x: The residual stream after the last block, at each place.
        logits: That the head made of it, after the soft cap.
        token_ids: One behind each place.
        amounts: How much each counts; 0 for places that only fill up the shape.
        num_real: Places in front of those; native products compute no more.
        is_native: The native kernel weighs the rows of the table, not XLA.
    """
    of_token = jnp.take_along_axis(logits, token_ids[:, None], axis=1)
    by_hidden = weights.embeddings[token_ids] * _slope(config, of_token)
    # Before the logits are overwritten.
    by_hidden, logits = jax.lax.optimization_barrier((by_hidden, logits))

    def weigh_row(row: Int[Array, ""], found: Array) -> Array:
        of_row = jax.nn.softmax(found[row]) * _slope(config, found[row])
        return found.at[row].set(of_row)

    # Of places that are not real it would cost as much.
    probabilities = jax.lax.fori_loop(0, num_real, weigh_row, logits)
    if is_native:
        by_hidden -= back_product(probabilities, weights.embeddings, num_real)
    else:
        by_hidden -= probabilities @ weights.embeddings
    _, pull_back = jax.vjp(lambda rows: final_hidden(config, weights, rows[None])[0], x)
    [by_x] = pull_back(by_hidden * amounts[:, None])
    return by_x, probabilities


def _slope(config: GemmaConfig, logits: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Of the soft cap, where it gave these logits."""
    if config.final_soft_cap is None:
        return jnp.ones_like(logits)
    return 1.0 - jnp.square(logits / config.final_soft_cap)
