"""How far a job is, gathered from its events: what a bar, a line or a plot shows."""

from collections import deque
from dataclasses import dataclass, field
from typing import assert_never

from service.client.job_events import (
    EvalEvent,
    JobDoneEvent,
    JobEvent,
    JobFailedEvent,
    StatusEvent,
    StepEvent,
    VersionEvent,
)
from service.client.jobs import JobState

# Over so many of the last steps speed is measured.
_STEPS_OF_SPEED = 20


@dataclass
class JobProgress:
    """Attributes:
    job_id: Of which job.
    adapter: That it trains.
    total_steps: All of them.
    status: As last told; ``detail`` says why it pauses or has failed.
    step: The last one that was made.
    losses: Step and loss.
    valid_losses: The same on the validation rows; step 0 is before the first.
    versions: Step, number, and whether that version was live when it was made.
    """

    job_id: str
    adapter: str
    total_steps: int
    status: str = "queued"
    detail: str | None = None
    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    valid_losses: list[tuple[int, float]] = field(default_factory=list)
    versions: list[tuple[int, int, bool]] = field(default_factory=list)
    _speeds: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_STEPS_OF_SPEED))

    @classmethod
    def of(cls, state: JobState) -> "JobProgress":
        """Of a job of which no event is known yet."""
        return cls(state.id, state.adapter, state.total_steps)

    def take(self, event: JobEvent) -> None:
        """The job after an event; they come in order."""
        match event:
            case StatusEvent(status=status, detail=detail):
                self.status, self.detail = status, detail
            case StepEvent():
                self.status, self.detail, self.step = "running", None, event.step
                self.losses.append((event.step, event.loss))
                if event.tokens_per_s > 0:
                    self._speeds.append((event.tokens, event.tokens / event.tokens_per_s))
            case EvalEvent(step=step, valid_loss=valid_loss):
                self.valid_losses.append((step, valid_loss))
            case VersionEvent(step=step, version=version, live=live):
                self.versions.append((step, version, live))
            case JobDoneEvent(status=status):
                self.status, self.detail = status, None
            case JobFailedEvent(status=status, detail=detail, code=code):
                self.status, self.detail = status, detail or code
            case _ as unreachable:
                assert_never(unreachable)

    @property
    def has_ended(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")

    @property
    def loss(self) -> float | None:
        """Of the last step."""
        return self.losses[-1][1] if self.losses else None

    @property
    def valid_loss(self) -> float | None:
        """As last measured."""
        return self.valid_losses[-1][1] if self.valid_losses else None

    @property
    def version(self) -> int | None:
        """The newest one."""
        return self.versions[-1][1] if self.versions else None

    @property
    def tokens_per_s(self) -> float | None:
        """That were learned from, over the last steps; None before the first."""
        if not self._speeds:
            return None
        tokens, seconds = map(sum, zip(*self._speeds, strict=True))
        return float(tokens / seconds)

    @property
    def seconds_left(self) -> float | None:
        """If the steps that are left take as long as the last ones did; None before the first."""
        if not self._speeds or self.has_ended:
            return None
        per_step = sum(seconds for _, seconds in self._speeds) / len(self._speeds)
        return per_step * (self.total_steps - self.step)

    def figures(self) -> list[str]:
        """For people: what is known of the losses, the speed, the versions and the time left."""
        known = []
        if self.loss is not None:
            known.append(f"loss {self.loss:.4g}")
        if self.valid_loss is not None:
            known.append(f"valid {self.valid_loss:.4g}")
        if (speed := self.tokens_per_s) is not None and not self.has_ended:
            known.append(f"{speed:,.0f} tokens/s")
        if self.version is not None:
            known.append(f"@{self.version}{' live' if self.versions[-1][2] else ''}")
        if (left := self.seconds_left) is not None:
            known.append(f"{duration(left)} left")
        return known


def duration(seconds: float) -> str:
    """61 is 1:01, 3661 is 1:01:01."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
