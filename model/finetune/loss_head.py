"""Loss and its derivative at some places, a part of the vocabulary at a time.

A running softmax over parts of the tied table, as attention runs over blocks of keys: with the
maximum and the total of the logits so far goes the sum of table rows that their probabilities
weigh. So the table is read once for both directions, nothing of the size of the vocabulary is kept,
and whoever runs it can pause between two parts::

    loss = log total - logit of t
    d loss / d hidden = sum of p(v) · row(v) - row(t)        each times the slope of the soft cap
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.config import GemmaConfig
from model.gemma.attention import soft_cap
from model.gemma.norms import rms_norm
from model.kernels.back_product import back_product
from model.kernels.product import product

_NO_MAXIMUM = -1e30


class HeadSums(NamedTuple):
    """Of the parts so far, for each place."""

    maximum: Float[Array, " places"]
    total: Float[Array, " places"]
    of_token: Float[Array, " places"]
    by_hidden: Float[Array, "places width"]


def no_sums(num_places: int, width: int) -> HeadSums:
    """Before the first part."""
    zeros = jnp.zeros(num_places, jnp.float32)
    rows = jnp.zeros((num_places, width), jnp.float32)
    return HeadSums(zeros + _NO_MAXIMUM, zeros, zeros, rows)


def add_part(
    config: GemmaConfig,
    part: Float[Array, "part width"],
    first_id: Int[Array, ""],
    num_done: Int[Array, ""],
    final_norm: Float[Array, " width"],
    x: Float[Array, "places width"],
    token_ids: Int[Array, " places"],
    num_real: Int[Array, ""],
    sums: HeadSums,
    *,
    is_native: bool,
) -> HeadSums:
    """With the tokens of one part, whose first ``num_done`` were in the one before.

    Native products compute the first ``num_real`` places only.
    """
    hidden = rms_norm(x, final_norm, epsilon=config.final_norm_epsilon)
    if is_native:
        logits = product(hidden, part, num_real)
    else:
        logits = jax.lax.dot_general(hidden, part, (((1,), (1,)), ((), ())))
    logits = soft_cap(logits, config.final_soft_cap)
    places = jnp.arange(part.shape[0], dtype=jnp.int32)
    is_new = (places >= num_done)[None]
    is_token = is_new & (places[None] + first_id == token_ids[:, None])
    seen = jnp.where(is_new, logits, _NO_MAXIMUM)
    maximum = jnp.maximum(sums.maximum, jnp.max(seen, axis=1))
    shrink = jnp.exp(sums.maximum - maximum)
    weights = jnp.where(is_new, jnp.exp(seen - maximum[:, None]), 0.0)
    slopes = weights * _slope(config, logits)
    weighted = back_product(slopes, part, num_real) if is_native else slopes @ part
    return HeadSums(
        maximum,
        sums.total * shrink + jnp.sum(weights, axis=1),
        sums.of_token + jnp.sum(jnp.where(is_token, logits, 0.0), axis=1),
        sums.by_hidden * shrink[:, None] + weighted,
    )


def loss_and_derivative(
    config: GemmaConfig,
    embeddings: Float[Array, "vocab width"],
    final_norm: Float[Array, " width"],
    x: Float[Array, "places width"],
    token_ids: Int[Array, " places"],
    sums: HeadSums,
) -> tuple[Float[Array, " places"], Float[Array, "places width"]]:
    """−log p of each token, and its derivative by the residual stream in front of the head."""
    losses = sums.maximum + jnp.log(sums.total) - sums.of_token
    of_token = embeddings[token_ids] * _slope(config, sums.of_token[:, None])
    by_hidden = sums.by_hidden / sums.total[:, None] - of_token
    _, pull_back = jax.vjp(
        lambda rows: rms_norm(rows, final_norm, epsilon=config.final_norm_epsilon), x
    )
    [by_x] = pull_back(by_hidden)
    return losses, by_x


def _slope(config: GemmaConfig, logits: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Of the soft cap, where it gave these logits."""
    if config.final_soft_cap is None:
        return jnp.ones_like(logits)
    return 1.0 - jnp.square(logits / config.final_soft_cap)
