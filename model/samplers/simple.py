"""The samplers that choose each token from its own distribution alone.

The draws are keras-hub's to the bit (spec 4.4): candidates stand in descending order of
probability, and the seed generator's state, ``[seed, number of draws so far]``, is itself the key.
So a seed gives the tokens that it gives there, and they depend on the whole batch. The engine draws
by another rule, `model.samplers.draw`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import keras
from jaxtyping import Array, Float, Int, UInt32

from model.samplers.sampler import Sampler


class GreedySampler(Sampler):
    """The likeliest token; of equals the lowest id."""

    def get_next_token(self, probabilities: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
        return jnp.argmax(probabilities, axis=-1)


class RandomSampler(Sampler):
    """A token drawn from the whole vocabulary.

    Args:
        seed: From 0 to 2³² − 1. None takes a random one, once; the config keeps None.
        temperature: See `Sampler`.
    """

    def __init__(self, seed: int | None = None, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        self.seed = seed
        self.seed_generator = _seed_generator(seed)

    def get_next_token(self, probabilities: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
        return draw_columns(probabilities, self.seed_generator.next())

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "seed": self.seed}


class TopKSampler(Sampler):
    """A token drawn from the ``k`` likeliest.

    Args:
        k: At least 1, at most the vocabulary.
        seed: As in `RandomSampler`.
        temperature: See `Sampler`.
    """

    def __init__(self, k: int = 5, seed: int | None = None, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self.seed = seed
        self.seed_generator = _seed_generator(seed)

    def get_next_token(self, probabilities: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
        candidates, token_ids = likeliest(probabilities, self.k)
        columns = draw_columns(candidates, self.seed_generator.next())
        return jnp.take_along_axis(token_ids, columns[:, None], axis=1)[:, 0]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "k": self.k, "seed": self.seed}


class TopPSampler(Sampler):
    """A token drawn from the likeliest ones that together have the mass ``p``.

    The token that crosses ``p`` is among them, so at least one always is.

    Args:
        p: From 0 to 1.
        k: Looks at the ``k`` likeliest only, a shortcut for large vocabularies. Their mass is not
            scaled up to 1.
        seed: As in `RandomSampler`.
        temperature: See `Sampler`.
    """

    def __init__(
        self,
        p: float = 0.1,
        k: int | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(temperature)
        if not 0 <= p <= 1:
            raise ValueError(f"p must be from 0 to 1, got {p}")
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, or None for all, got {k}")
        self.p = p
        self.k = k
        self.seed = seed
        self.seed_generator = _seed_generator(seed)

    def get_next_token(self, probabilities: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
        candidates, token_ids = likeliest(probabilities, self.k or probabilities.shape[1])
        kept = candidates_within(candidates, self.p)
        columns = draw_columns(kept, self.seed_generator.next())
        return jnp.take_along_axis(token_ids, columns[:, None], axis=1)[:, 0]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "p": self.p, "k": self.k, "seed": self.seed}


def likeliest(
    probabilities: Float[Array, "batch vocab"], k: int
) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"]]:
    """The ``k`` largest probabilities in descending order, and their ids; ties: lowest id first."""
    vocab = probabilities.shape[-1]
    if k > vocab:
        raise ValueError(f"k is {k}, but the vocabulary has only {vocab} tokens")
    largest, token_ids = jax.lax.top_k(probabilities, k)
    return largest, token_ids


def candidates_within(
    candidates: Float[Array, "batch columns"], p: float
) -> Float[Array, "batch columns"]:
    """Probability 0 for each candidate with more than ``p`` before it.

    The rule of `model.samplers.selection.top_p_mask` for columns that are sorted already, except
    that the mass is not scaled to 1.

    Args:
        candidates: Probabilities in descending order.
        p: 1 keeps all.
    """
    if p >= 1:
        return candidates
    before = jnp.pad(jnp.cumsum(candidates, axis=1)[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(before <= p, candidates, 0.0)


def draw_columns(
    probabilities: Float[Array, "batch columns"], key_data: UInt32[Array, " 2"]
) -> Int[Array, " batch"]:
    """A column for each row, with odds as its probabilities, which need not sum to 1.

    Args:
        probabilities: Zero excludes a column.
        key_data: The two words of a threefry key.
    """
    key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
    # The shape of the noise, [B, C, 1], decides which number each column gets.
    logits = jnp.log(probabilities)[:, :, None]  # [B, C, 1]
    return jax.random.categorical(key, logits, axis=1)[:, 0]


def _seed_generator(seed: int | None) -> Any:
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {seed}")
    return keras.random.SeedGenerator(seed)
