"""When jobs train: what the loop and its scheduler know of training.

While nobody else wants a turn, a slice follows another. Otherwise training waits until it is due,
and then takes slices for about as long as it has earned, but no longer than a running stream can
bear.
"""

import time
from collections.abc import Sequence

from service.protocol.training import CancelJob, HaltJobs, StartJob, TrainingEvent
from service.worker.actions import Action, Idle, Train
from service.worker.file_work import CheckpointRead, CheckpointWritten
from service.worker.pace import Pace
from service.worker.training_desk import PreparedJob, TrainingDesk
from service.worker.training_share import TrainingShare

TrainingArrival = PreparedJob | StartJob | CancelJob | HaltJobs | CheckpointRead | CheckpointWritten


class TrainingTurns:
    """Turns of a worker's jobs.

    Args:
        desk: Of the jobs; None: there are none.
        share: Of the time, while others are served.
    """

    def __init__(self, desk: TrainingDesk | None = None, share: float = 0.0) -> None:
        self._desk = desk
        self._share = TrainingShare(share)

    @property
    def has_work(self) -> bool:
        """Whether a job trains."""
        return self._desk is not None and self._desk.has_work

    @property
    def is_due(self) -> bool:
        """Whether it is training's turn, even while others wait."""
        return self._share.is_due

    @property
    def seconds(self) -> float:
        """That jobs trained since the worker started."""
        return 0.0 if self._desk is None else self._desk.seconds

    def take(self, arrival: TrainingArrival) -> Sequence[TrainingEvent]:
        """What was prepared, said, read or written."""
        assert self._desk is not None, "nothing was prepared"
        match arrival:
            case PreparedJob():
                self._desk.add(arrival)
                return []
            case StartJob():
                return self._desk.start(arrival)
            case CancelJob():
                return self._desk.cancel(arrival.job_id)
            case HaltJobs():
                return self._desk.halt(arrival.request_id)
            case CheckpointRead() | CheckpointWritten():
                return self._desk.take(arrival)

    def retry(self) -> None:
        """Goes back to what could not be written, when it is time."""
        if self._desk is not None:
            self._desk.retry()

    def train(
        self, pace: Pace, *, has_others: bool, is_accompanied: bool
    ) -> Sequence[TrainingEvent]:
        """Slices: one if nobody else wants a turn."""
        assert self._desk is not None, "a job trains"
        until = time.monotonic()
        if has_others:
            most = pace.training_seconds(self._share.per_other, is_accompanied=is_accompanied)
            until += min(self._share.earned_seconds, most)
        return self._desk.step(until)

    def note_turn(self, action: Action, seconds: float, *, has_others: bool) -> None:
        """A turn of the loop took so long."""
        if isinstance(action, Train):
            if has_others:
                self._share.note_training(seconds)
        elif self.has_work and not isinstance(action, Idle):
            self._share.note_others(seconds)
