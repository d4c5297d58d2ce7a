"""Steps that run on the device, and what they drew once they are done."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from model.decode import DecodeOutputs
from model.slots import DecodeRow, SampledToken


class DispatchPart(NamedTuple):
    """Rows that ran in one program, and its results."""

    rows: Sequence[DecodeRow]
    outputs: DecodeOutputs


class DeviceDispatch:
    """The parts of one dispatch; a `model.slots.Dispatch`."""

    def __init__(self, parts: Sequence[DispatchPart]) -> None:
        self._parts = parts

    def wait(self) -> None:
        jax.block_until_ready([part.outputs for part in self._parts])

    def tokens(self) -> list[list[SampledToken]]:
        return [row for part in self._parts for row in _tokens_of_part(part)]


def _tokens_of_part(part: DispatchPart) -> list[list[SampledToken]]:
    outputs = jax.device_get(part.outputs)
    return [
        [
            _sampled(outputs, step, index, row.rules.num_logprobs)
            for step in range(len(outputs.is_drawn))
            if outputs.is_drawn[step, index]
        ]
        for index, row in enumerate(part.rows)
    ]


def _sampled(
    outputs: DecodeOutputs, step: int, index: int, num_logprobs: int | None
) -> SampledToken:
    token_id = int(outputs.token_ids[step, index])
    is_finite = bool(outputs.is_finite[step, index])
    if num_logprobs is None:
        return SampledToken(token_id, is_finite=is_finite)
    alternatives = zip(
        outputs.top_ids[step, index, :num_logprobs].tolist(),
        outputs.top_logprobs[step, index, :num_logprobs].tolist(),
        strict=True,
    )
    logprob = float(outputs.logprobs[step, index])
    return SampledToken(token_id, logprob, tuple(alternatives), is_finite)
