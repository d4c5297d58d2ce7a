"""Beam search: the continuations of a row that are likeliest as a whole.

A row of the batch becomes ``num_beams`` rows beside each other, all copies of its prompt. Only beam
0 is alive at first; the others start at −1e9, so that the first free column fills all beams with
different tokens of beam 0. There is no length penalty, and a beam that holds a stop id is extended
like any other.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.samplers.sampler import Sampler, Start, Variables, repeat_rows, take_rows, write_column

_DEAD = -1e9


class _Beams(NamedTuple):
    column: Int[Array, ""]
    prompt: Int[Array, "rows length"]
    cache: Any
    logprobs: Float[Array, "batch beams"]


class BeamSampler(Sampler):
    """The likeliest of ``num_beams`` continuations that are followed side by side.

    Args:
        num_beams: At least 1.
        return_all_beams: A call then returns all beams [B, num_beams, T] and their
            log-probabilities [B, num_beams], likeliest first, instead of the likeliest [B, T].
        temperature: See `Sampler`.
        compat: In keras-hub a column of a longer prompt still ranks, and adds the
            log-probability of, tokens that it then throws away; so a row's result depends on the
            shortest prompt of its batch. Here such a column changes neither the beams nor their
            log-probabilities, unless this is ``"keras_hub"``.
    """

    is_stepwise = False

    def __init__(
        self,
        num_beams: int = 5,
        return_all_beams: bool = False,
        temperature: float = 1.0,
        *,
        compat: Literal["keras_hub"] | None = None,
    ) -> None:
        super().__init__(temperature)
        if num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {num_beams}")
        if compat not in (None, "keras_hub"):
            raise ValueError(f"compat must be None or 'keras_hub', got {compat!r}")
        self.num_beams = num_beams
        self.return_all_beams = return_all_beams
        self.compat = compat

    def get_config(self) -> dict[str, Any]:
        config = {
            **super().get_config(),
            "num_beams": self.num_beams,
            "return_all_beams": self.return_all_beams,
        }
        return config if self.compat is None else {**config, "compat": self.compat}

    def run(self, start: Start, variables: Variables) -> tuple[Any, Variables]:
        batch = start.prompt.shape[0]
        mask = jnp.repeat(start.mask, self.num_beams, axis=0)

        def goes_on(at: _Beams) -> Bool[Array, ""]:
            return start.goes_on(at.column, at.prompt)

        def step(at: _Beams) -> _Beams:
            logits, _, cache = start.next(at.prompt, at.cache, at.column)
            is_replayed = start.mask[:, at.column]
            logprobs, sources, tokens = self._extend(logits, at.logprobs, is_replayed)
            rows = (jnp.arange(batch)[:, None] * self.num_beams + sources).reshape(-1)
            prompt, cache = take_rows((at.prompt, cache), rows)
            prompt = write_column(prompt, at.column, tokens.reshape(-1), mask)
            return _Beams(at.column + 1, prompt, cache, logprobs)

        first = _Beams(
            start.column,
            repeat_rows(start.prompt, self.num_beams),
            repeat_rows(start.cache, self.num_beams),
            jnp.full((batch, self.num_beams), _DEAD, jnp.float32).at[:, 0].set(0.0),
        )
        last = jax.lax.while_loop(goes_on, step, first)
        return self._result(last), variables

    def _extend(
        self,
        logits: Float[Array, "rows vocab"],
        logprobs: Float[Array, "batch beams"],
        is_replayed: Bool[Array, " batch"],
    ) -> tuple[
        Float[Array, "batch beams"],
        Int[Array, "batch beams"],
        Int[Array, "batch beams"],
    ]:
        """The best one-token extensions: their log-probabilities, source beams and tokens."""
        batch, num_beams = logprobs.shape
        vocab = logits.shape[1]
        token_logprobs = jnp.log(self.compute_probabilities(logits))
        total = token_logprobs.reshape(batch, num_beams, vocab) + logprobs[:, :, None]
        best, found = jax.lax.top_k(total.reshape(batch, -1), num_beams)
        sources, tokens = found // vocab, found % vocab
        if self.compat is None:
            # A replayed column leaves each beam where it stands; the prompt has its token.
            itself = jnp.arange(num_beams, dtype=sources.dtype)[None, :]
            sources = jnp.where(is_replayed[:, None], itself, sources)
            best = jnp.where(is_replayed[:, None], logprobs, best)
        return best, sources, tokens

    def _result(self, beams: _Beams) -> Any:
        prompts = beams.prompt.reshape(*beams.logprobs.shape, -1)  # [B, beams, T]
        logprobs, order = jax.lax.top_k(beams.logprobs, self.num_beams)
        prompts = jnp.take_along_axis(prompts, order[:, :, None], axis=1)
        return (prompts, logprobs) if self.return_all_beams else prompts[:, 0]
