"""`RowRules` as arrays, made once for rows that stay together.

A batch changes when an output begins or ends, and not from step to step; so the arrays of the last
batch of each size are kept, and a dispatch sends positions only.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.decode import RuleRows
from model.samplers.draw import SamplingRows
from model.samplers.penalties import PenaltyRows
from model.slots import MAX_BIASES, MAX_STOP_IDS, RowRules, Sampling

# Fills up a batch; its slot does not exist, so it draws nothing.
_FILLER = RowRules(Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0), num_prompt=1, end=1)


class RuleArrays:
    """Makes `RuleRows`, and keeps the newest of each number of rows.

    Args:
        vocabulary_size: Stands where there is no id.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size
        self._newest: dict[int, tuple[tuple[RowRules, ...], RuleRows]] = {}

    def fillers(self, num_rows: int) -> RuleRows:
        """Rows that draw nothing."""
        return self.of((), num_rows)

    def of(self, rules: Sequence[RowRules], num_rows: int) -> RuleRows:
        """``rules`` and fillers, ``num_rows`` in all."""
        key = tuple(rules)
        kept = self._newest.get(num_rows)
        if kept is None or not _are_the_same(kept[0], key):
            padded = (*key, *[_FILLER] * (num_rows - len(key)))
            kept = self._newest[num_rows] = key, _arrays(padded, self._vocabulary_size)
        return kept[1]


def _are_the_same(one: tuple[RowRules, ...], other: tuple[RowRules, ...]) -> bool:
    """Compared as objects: an output hands in the same one at every step."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _arrays(rules: Sequence[RowRules], vocabulary_size: int) -> RuleRows:
    samplings = [each.sampling for each in rules]

    def column(values: Sequence[float | int], dtype: Any) -> jax.Array:
        return jnp.asarray(np.array(values, dtype))

    stop_ids = np.full((len(rules), MAX_STOP_IDS), vocabulary_size, np.int32)
    bias_ids = np.full((len(rules), MAX_BIASES), vocabulary_size, np.int32)
    biases = np.zeros((len(rules), MAX_BIASES), np.float32)
    for index, each in enumerate(rules):
        stop_ids[index, : len(each.stop_ids)] = each.stop_ids
        for place, (token_id, bias) in enumerate(each.sampling.logit_bias):
            bias_ids[index, place], biases[index, place] = token_id, bias
    return RuleRows(
        sampling=SamplingRows(
            temperature=column([each.temperature for each in samplings], np.float32),
            top_k=column([each.top_k for each in samplings], np.int32),
            top_p=column([each.top_p for each in samplings], np.float32),
            min_p=column([each.min_p for each in samplings], np.float32),
            seeds=column([each.seed for each in samplings], np.uint32),
        ),
        penalties=PenaltyRows(
            repetition=column([each.repetition_penalty for each in samplings], np.float32),
            presence=column([each.presence_penalty for each in samplings], np.float32),
            frequency=column([each.frequency_penalty for each in samplings], np.float32),
            bias_ids=jnp.asarray(bias_ids),
            biases=jnp.asarray(biases),
        ),
        num_prompt=column([each.num_prompt for each in rules], np.int32),
        end=column([each.end for each in rules], np.int32),
        stop_ids=jnp.asarray(stop_ids),
        may_stop_at=column([each.may_stop_at for each in rules], np.int32),
        wants_logprobs=column([each.num_logprobs is not None for each in rules], np.bool_),
    )
