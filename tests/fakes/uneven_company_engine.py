"""The real engine with one mistake: the last row of several gets one unit in the last place more.

It is what the comparison of answers in company with answers alone must find.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from model import engine
from model.dispatch import DeviceDispatch
from model.engine import GemmaEngine
from model.progress import Progress
from model.slots import DecodeRow, EngineOptions, SampledToken


class UnevenDispatch:
    """A dispatch whose last row is told wrongly, by as little as there is."""

    def __init__(self, dispatch: DeviceDispatch) -> None:
        self._dispatch = dispatch

    def wait(self) -> None:
        self._dispatch.wait()

    def tokens(self) -> list[list[SampledToken]]:
        *rows, last = self._dispatch.tokens()
        uneven = [
            replace(token, logprob=token.logprob and math.nextafter(token.logprob, 0.0))
            for token in last
        ]
        return [*rows, uneven] if rows else [last]


def load(options: EngineOptions, progress: Progress) -> GemmaEngine:
    """As `model.engine.load`."""
    loaded = engine.load(options, progress)
    decode = loaded.decode

    def decode_unevenly(rows: Sequence[DecodeRow], num_steps: int) -> UnevenDispatch:
        return UnevenDispatch(decode(rows, num_steps))

    loaded.decode = decode_unevenly  # type: ignore[method-assign, assignment]
    return loaded
