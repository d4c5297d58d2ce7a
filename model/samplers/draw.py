"""Drawing one token of one row, from its seed and its position alone.

The engine's rule (the Keras-named samplers have keras-hub's own): one uniform number per
(seed, position), turned into a token by inverting the cumulative mass of the allowed tokens in the
order of their ids. Noise over the whole vocabulary would cost sixteen times as much.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from model.samplers.selection import top_k_mask, top_p_mask

_SEGMENT = 512
# Below it a temperature is greedy: a denormal float32 counts as zero on some processors.
MIN_TEMPERATURE = 1e-30


class SamplingRows(NamedTuple):
    """How each row of a batch draws. Every field is an array, so no value compiles anything.

    Attributes:
        temperature: 0, or anything below `MIN_TEMPERATURE`, is greedy.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
        seeds: One per row.
    """

    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]
    min_p: Float[Array, " batch"]
    seeds: UInt32[Array, " batch"]


def uniform(seed: UInt32[Array, ""], position: Int[Array, ""]) -> Float[Array, ""]:
    """A number in [0, 1) that depends on the seed and the position of the drawn token only."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    return jax.random.uniform(key, dtype=jnp.float32)


def invert(weights: Float[Array, " vocab"], fraction: Float[Array, ""]) -> Int[Array, ""]:
    """The first id at which the running sum of ``weights`` exceeds ``fraction`` of the total.

    Summed in fixed segments, so that the result does not depend on anything but the weights.
    """
    vocab = weights.shape[0]
    padded = jnp.pad(weights, (0, -vocab % _SEGMENT)).reshape(-1, _SEGMENT)
    segment_ends = jnp.cumsum(jnp.sum(padded, axis=1))
    target = fraction * segment_ends[-1]
    segment = jnp.minimum(jnp.sum((segment_ends <= target).astype(jnp.int32)), len(padded) - 1)
    before = jnp.where(segment > 0, segment_ends[jnp.maximum(segment - 1, 0)], 0.0)
    inside = before + jnp.cumsum(padded[segment])
    offset = jnp.sum((inside <= target).astype(jnp.int32))
    # Rounding can leave the target at the very end: the last token with any weight, then.
    last = jnp.max(jnp.where(padded[segment] > 0, jnp.arange(_SEGMENT, dtype=jnp.int32), 0))
    return segment * _SEGMENT + jnp.minimum(offset, last)


def draw(
    logits: Float[Array, " vocab"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    min_p: Float[Array, ""],
    seed: UInt32[Array, ""],
    position: Int[Array, ""],
) -> Int[Array, ""]:
    """A token id from softmax(logits / temperature) cut to min-p, then to top-k, then to top-p.

    Args:
        logits: float32; −inf excludes a token.
        temperature: At least `MIN_TEMPERATURE`.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        min_p: Excludes tokens with less than this share of the likeliest one's probability; 0
            keeps all.
        seed: Of the row.
        position: Of the token that is drawn, in its own sequence.
    """
    # The largest goes first: a tiny temperature then gives exp(0) and exp(−inf), never inf − inf.
    weights = jnp.exp((logits - jnp.max(logits)) / temperature)
    # The likeliest token weighs 1, so a weight is a share of its probability.
    weights = jnp.where(weights >= min_p, weights, 0.0)
    weights = jax.lax.cond(
        top_k > 0, lambda: jnp.where(top_k_mask(logits, top_k), weights, 0.0), lambda: weights
    )
    weights = jax.lax.cond(
        top_p < 1.0,
        lambda: jnp.where(top_p_mask(logits, weights, top_p), weights, 0.0),
        lambda: weights,
    )
    return invert(weights, uniform(seed, position))
