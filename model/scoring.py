"""Scores of given tokens, layer by layer and eagerly: the function behind `GemmaCausalLM.score`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from model.config import GemmaConfig
from model.gemma.forward import Intercept, forward
from model.gemma.weights import GemmaWeights

_MODES = ("logits", "loss")


def score(
    config: GemmaConfig,
    weights: GemmaWeights,
    token_ids: Any,
    padding_mask: Any,
    scoring_mode: str,
    layer_intercept_fn: Intercept | None,
    target_ids: Any,
) -> Array:
    """Logits or losses of every position; arguments and errors are those of the method."""
    if scoring_mode not in _MODES:
        raise ValueError(
            f"scoring_mode must be 'logits' or 'loss', got {str(scoring_mode)[:40]!r}."
        )
    if scoring_mode == "loss" and target_ids is None:
        raise ValueError("scoring_mode 'loss' needs target_ids.")
    ids = _ids("token_ids", token_ids, config.vocabulary_size)
    mask = jnp.ones(ids.shape, bool) if padding_mask is None else jnp.asarray(padding_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"padding_mask has shape {mask.shape}, token_ids {ids.shape}.")
    logits = forward(config, weights, ids, mask.astype(bool), intercept=layer_intercept_fn).logits
    if scoring_mode == "logits":
        return logits
    targets = _ids("target_ids", target_ids, config.vocabulary_size)
    if targets.shape != ids.shape:
        raise ValueError(f"target_ids has shape {targets.shape}, token_ids {ids.shape}.")
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]


def _ids(name: str, given: Any, vocabulary_size: int) -> Int[Array, "batch tokens"]:
    """Ids [B, T], checked unless they are traced: JAX reads another row for one out of range."""
    ids = jnp.asarray(given, jnp.int32)
    if ids.ndim != 2:
        raise ValueError(f"{name} must be [batch, tokens], got shape {ids.shape}.")
    if not isinstance(ids, jax.core.Tracer):
        outside = np.argwhere((np.asarray(ids) < 0) | (np.asarray(ids) >= vocabulary_size))
        if len(outside):
            row, column = outside[0]
            raise ValueError(
                f"{name} has {ids[row, column]} in row {row}, column {column}; ids must be in "
                f"[0, {vocabulary_size})."
            )
    return ids
