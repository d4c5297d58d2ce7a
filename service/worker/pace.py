"""How long a turn of the loop may take, from how long steps take here.

A running stream notices a gap; a waiting prompt notices every step that goes before it. So parts of
a prompt and steps take turns in a fixed proportion, whatever the machine.
"""

from model.slots import MAX_STEPS

# A stream's tokens come at most this far apart in time because of how they are dispatched: no
# longer than a turn beside a prompt, which may arrive when a dispatch has just begun.
_DISPATCH_SECONDS = 0.08
# A stream then waits less than three times as long as usual, with something left for a step that
# happens to be slow; and a prompt gets almost two thirds of the time.
_PREFILL_STEPS = 1.9
# A text that is scored takes turns with steps too, and nobody reads along: a stream then waits less
# than twice as long as usual.
_SCORE_STEPS = 0.9
# Alone a prompt pauses only for those who arrive or leave.
_PREFILL_SECONDS = 0.1
# A step's length is smoothed over about ten.
_SMOOTHING = 0.1


class Pace:
    """Measures steps, and says how many fit."""

    def __init__(self) -> None:
        self._step_seconds: float | None = None

    def note_steps(self, num_steps: int, seconds: float) -> None:
        """A dispatch of ``num_steps`` took ``seconds``."""
        each = seconds / num_steps
        before = each if self._step_seconds is None else self._step_seconds
        self._step_seconds = before + _SMOOTHING * (each - before)

    def num_steps(self, most: int) -> int:
        """Steps of the next dispatch, of ``most`` that are wanted; 1 while nothing is known."""
        if not self._step_seconds:
            return 1
        return max(1, min(most, MAX_STEPS, int(_DISPATCH_SECONDS / self._step_seconds)))

    def prefill_seconds(self, *, is_accompanied: bool) -> float:
        """How long a part of a prompt may take, with rows that decode beside it or without."""
        if is_accompanied and self._step_seconds is not None:
            return _PREFILL_STEPS * self._step_seconds
        return _PREFILL_SECONDS

    def training_seconds(self, per_step: float, *, is_accompanied: bool) -> float:
        """The same for slices of training, which may take ``per_step`` of a step if that is more
        than what streams hardly notice.
        """
        if is_accompanied and self._step_seconds is not None:
            return max(_SCORE_STEPS, per_step) * self._step_seconds
        return _PREFILL_SECONDS

    def score_seconds(self, *, is_accompanied: bool) -> float:
        """The same for a part of a text that is scored."""
        if is_accompanied and self._step_seconds is not None:
            return _SCORE_STEPS * self._step_seconds
        return _PREFILL_SECONDS
