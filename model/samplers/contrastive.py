"""Contrastive search: of the likeliest tokens, the one that repeats the context least.

Every candidate is fed to the model, for the hidden state that it would leave. So a token costs a
step of ``batch · k`` rows, and the step of the winner gives the logits of the next column.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.samplers.sampler import Sampler, Start, Variables, repeat_rows, take_rows, write_column
from model.samplers.simple import likeliest

# Keeps the direction of an all-zero hidden state finite.
_SMALLEST_NORM = 1e-12


class _Search(NamedTuple):
    column: Int[Array, ""]
    prompt: Int[Array, "batch length"]
    cache: Any
    hidden: Float[Array, "batch length width"]
    logits: Float[Array, "batch vocab"]


class ContrastiveSampler(Sampler):
    """The candidate with the best ``(1 − alpha) · probability − alpha · similarity``.

    The similarity is the largest cosine between the hidden state that the candidate leaves and
    those of the tokens before it. A call needs ``hidden_states``.

    Args:
        k: How many candidates, the likeliest ones.
        alpha: From 0, which is greedy, to 1.
        temperature: See `Sampler`.

    Source: Su et al. 2022, https://arxiv.org/abs/2202.06417, eq. 5.
    """

    is_stepwise = False

    def __init__(self, k: int = 5, alpha: float = 0.6, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
        self.k = k
        self.alpha = alpha

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "k": self.k, "alpha": self.alpha}

    def run(self, start: Start, variables: Variables) -> tuple[Any, Variables]:
        if start.hidden_states is None:
            raise ValueError("Contrastive search needs hidden_states, those of the prompt.")
        batch = start.prompt.shape[0]
        mask = jnp.repeat(start.mask, self.k, axis=0)

        def goes_on(at: _Search) -> Bool[Array, ""]:
            return start.goes_on(at.column, at.prompt)

        def step(at: _Search) -> _Search:
            probabilities, tokens = likeliest(self.compute_probabilities(at.logits), self.k)
            prompt, cache = repeat_rows((at.prompt, at.cache), self.k)
            prompt = write_column(prompt, at.column, tokens.reshape(-1), mask)
            logits, hidden, cache = start.next(prompt, cache, at.column + 1)
            repetition = similarity(hidden.reshape(batch, self.k, -1), at.hidden, at.column)
            score = (1 - self.alpha) * probabilities - self.alpha * repetition
            rows = jnp.arange(batch) * self.k + jnp.argmax(score, axis=1)
            prompt, cache, logits, chosen = take_rows((prompt, cache, logits, hidden), rows)
            return _Search(
                at.column + 1,
                prompt,
                cache,
                at.hidden.at[:, at.column].set(chosen.astype(at.hidden.dtype)),
                logits,
            )

        logits, _, cache = start.next(start.prompt, start.cache, start.column)
        first = _Search(start.column, start.prompt, cache, start.hidden_states, logits)
        return jax.lax.while_loop(goes_on, step, first).prompt, variables


def similarity(
    candidates: Float[Array, "batch k width"],
    context: Float[Array, "batch length width"],
    index: Int[Array, ""],
) -> Float[Array, "batch k"]:
    """The largest cosine of each candidate with a context column before ``index``; −1 if none."""
    cosines = jnp.einsum("bkd,btd->bkt", direction(candidates), direction(context))
    is_before = jnp.arange(context.shape[1]) < index
    return jnp.max(jnp.where(is_before[None, None, :], cosines, -1.0), axis=2)


def direction(x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
    """``x`` divided by its length, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), _SMALLEST_NORM)
