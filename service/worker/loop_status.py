"""What the loop is doing, for the heartbeat's thread to read."""

import time

from service.protocol.messages import Phase
from service.protocol.worker_counts import AdapterCounts, WorkCounts


class LoopStatus:
    """Set by the loop, read by another thread."""

    def __init__(self) -> None:
        self.turn = 0
        self.num_running = 0
        self.num_scoring = 0
        self.work = WorkCounts()
        self.adapters = AdapterCounts()
        self.training_seconds = 0.0
        self._phase: tuple[Phase, float] = ("start", time.monotonic())

    @property
    def phase(self) -> tuple[Phase, float]:
        """The phase and the monotonic second at which it began."""
        return self._phase

    def enter(self, phase: Phase) -> None:
        """Begins a phase; entering the same one again is progress too."""
        self._phase = (phase, time.monotonic())
        self.turn += 1
