"""What one run of the bench was asked for, and the services that its parts share."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.service_process import RunningService, running_service
from bench.summary import Target

# The model of which every peer gets the same weights.
PRESET = "gemma3_270m"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The command line; see `bench.__main__`.

    Attributes:
        quick: Fewer rounds and sizes: shows that all works, and no more.
        rates: Requests a second of the open loop.
        window_seconds: For which requests arrive at each rate.
        target: What counts as a good answer.
        peers: Names of `bench.peers_in_turns.PEERS`.
        environments: Folder of environments, model files and logs.
        seed: Of prompts and arrivals.
    """

    quick: bool
    rates: tuple[float, ...]
    window_seconds: float
    target: Target
    peers: tuple[str, ...]
    environments: Path
    seed: int

    @property
    def stream_counts(self) -> tuple[int, ...]:
        """Sequences at once, in closed loops and batches."""
        return (1, 8) if self.quick else (1, 4, 8, 16)

    def rounds(self, full: int) -> int:
        """How often a measurement is repeated."""
        return 1 if self.quick else full


class Services:
    """Started when a part first needs them, each with its own data folder, and kept for others."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._running: dict[int, RunningService] = {}

    def __enter__(self) -> "Services":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def for_streams(self, num_streams: int) -> RunningService:
        """A service with 8 slots, or with 16 if that is what it takes."""
        num_slots = 8 if num_streams <= 8 else 16
        if num_slots not in self._running:
            stage(f"starting a service with {num_slots} slots")
            service = self._stack.enter_context(fresh_service(num_slots))
            self._running[num_slots] = service
        return self._running[num_slots]

    def stop(self) -> None:
        self._running.clear()
        self._stack.close()


@contextmanager
def fresh_service(num_slots: int, *more: str) -> Iterator[RunningService]:
    """A service of the bench's model that nothing else uses, with ``more`` options."""
    with tempfile.TemporaryDirectory() as data_dir:
        options = ("--preset", PRESET, "--slots", str(num_slots), "--data-dir", data_dir, *more)
        with running_service(*options) as service:
            yield service


def stage(text: str) -> None:
    """One line for the person who waits: the time, how busy the machine is, and what comes now."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')}  load {os.getloadavg()[0]:5.2f}  {text}\n")
    sys.stderr.flush()
