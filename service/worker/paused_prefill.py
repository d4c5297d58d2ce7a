"""A chunk of prompts that is prefilled in parts, with other work between them."""

import time
from collections.abc import Callable, Iterator, Sequence

from model.slots import Engine, PromptChunk
from service.worker.actions import Prefill


class PausedPrefill:
    """The chunk that was begun last.

    Args:
        engine: Does the work.
        clock: Monotonic seconds.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._action: Prefill | None = None
        self._layers: Iterator[None] = iter(())

    def run(self, action: Prefill, chunks: Sequence[PromptChunk], until: float) -> bool:
        """Goes on with ``action``, or begins it; returns whether it is done.

        Stops before a layer that would last beyond ``until`` (monotonic seconds) if it takes as
        long as the longest of those before it; one is always done.
        """
        if self._action is not action:
            self._action, self._layers = action, self._engine.prefill(chunks)
        if not run_until(self._layers, until, self._clock):
            return False
        self._action = None
        return True


def run_until(layers: Iterator[None], until: float, clock: Callable[[], float]) -> bool:
    """Takes layers as long as the next one is likely to end in time; whether it took the last."""
    longest = 0.0
    began = clock()
    for _ in layers:
        now = clock()
        longest = max(longest, now - began)
        began = now
        if now + longest > until:
            return False
    return True
