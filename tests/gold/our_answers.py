"""Our model's answers to the gold cases, by two roads: one full forward, or prefill and decode."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from model.config import GemmaConfig
from model.gemma.forward import forward, head
from model.gemma.weights import GemmaWeights
from model.slots import (
    MAX_LOGPROBS,
    DecodeRow,
    Engine,
    PromptChunk,
    RowRules,
    SampledToken,
    Sampling,
)

# Sequences are padded to a multiple of this, and logits are made for this many positions at once:
# all positions of the longest case would be 1.6 GB.
_SLICE_TOKENS = 128

# The head is most of the time, so of a longer prompt only the end is scored, this much and up to a
# slice more: it has seen all that comes before.
_SCORED_TOKENS = 256

_GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)

Case = dict[str, Any]


class FullForward(NamedTuple):
    """Log-probabilities of one sequence, prompt and continuation.

    Attributes:
        prompt: Of the last prompt tokens, as many as are scored.
        following: [continuation, V]: of the whole vocabulary after the last prompt token and after
            each token of the continuation but the last.
    """

    prompt: NDArray[np.float32]
    following: NDArray[np.float32]


def full_forward(config: GemmaConfig, weights: GemmaWeights, case: Case) -> FullForward:
    """By `forward`, of the stored prompt and the stored continuation at once."""
    num_scored = len(case["token_ids"]) - 1
    sequence = np.array(case["token_ids"] + case["greedy_token_ids"][:-1], np.int32)
    token_ids = np.pad(sequence, (0, -len(sequence) % _SLICE_TOKENS))
    following_ids = np.roll(token_ids, -1)
    mask = np.arange(len(token_ids)) < len(sequence)
    x = _residual(config, weights, token_ids[None], mask[None])
    first = max(0, num_scored - _SCORED_TOKENS) // _SLICE_TOKENS * _SLICE_TOKENS
    slices = [slice(i, i + _SLICE_TOKENS) for i in range(first, num_scored, _SLICE_TOKENS)]
    scored = [_token_logprobs(config, weights, x[:, at], following_ids[at]) for at in slices]
    following = _logprobs(config, weights, x[:, num_scored : len(sequence)])
    return FullForward(np.concatenate(scored)[: num_scored - first], np.asarray(following))


@partial(jax.jit, static_argnums=0)
def _residual(
    config: GemmaConfig, weights: GemmaWeights, token_ids: jax.Array, padding_mask: jax.Array
) -> jax.Array:
    """The residual stream after the last block of `forward`, whose logits nobody computes."""
    streams: list[jax.Array] = []

    def keep(x: jax.Array, _layer: int) -> jax.Array:
        streams.append(x)
        return x

    forward(config, weights, token_ids, padding_mask, intercept=keep)
    return streams[-1]


@partial(jax.jit, static_argnums=0)
def _token_logprobs(
    config: GemmaConfig, weights: GemmaWeights, x: jax.Array, token_ids: jax.Array
) -> jax.Array:
    logits = head(config, weights, x)[0]
    of_tokens = jax.numpy.take_along_axis(logits, token_ids[:, None], axis=1)[:, 0]
    return of_tokens - jax.nn.logsumexp(logits, axis=1)


@partial(jax.jit, static_argnums=0)
def _logprobs(config: GemmaConfig, weights: GemmaWeights, x: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(head(config, weights, x)[0])


def cached(engine: Engine, cases: Sequence[Case]) -> list[list[SampledToken]]:
    """By prefill in chunks and decode side by side: what is drawn after each stored token.

    The stored token is fed, whatever was drawn; so one difference does not hide the next, and the
    continuation is the model's own exactly if every drawn token is the stored one.
    """
    chunk = engine.info.chunk_tokens
    for slot, case in enumerate(cases):
        before_last = case["token_ids"][:-1]
        for start in range(0, len(before_last), chunk):
            tokens = before_last[start : start + chunk]
            for _ in engine.prefill([PromptChunk(slot, tokens, start)]):
                pass
    drawn: list[list[SampledToken]] = [[] for _ in cases]
    for step in range(len(cases[0]["greedy_token_ids"])):
        rows = []
        for slot, case in enumerate(cases):
            position = len(case["token_ids"]) - 1 + step
            engine.begin(slot, (case["token_ids"] + case["greedy_token_ids"])[: position + 1])
            rules = RowRules(_GREEDY, position + 1, position + 2, num_logprobs=MAX_LOGPROBS)
            rows.append(DecodeRow(slot, position, rules))
        for tokens, new in zip(drawn, engine.decode(rows, 1).tokens(), strict=True):
            tokens += new
    return drawn
