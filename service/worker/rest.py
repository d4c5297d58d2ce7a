"""A worker that has nothing to do gives back the memory that it needed for a moment.

The heap keeps what is freed, as the next call needs as much again. Hundreds of megabytes of it, in
holes between what stays, are of use to nobody while nothing is asked.
"""

from collections.abc import Callable

# Those who ask now and then, one thing after another, should find the heap as they left it.
_REST_SECONDS = 1.0


class Rest:
    """Since when there has been nothing to do.

    Args:
        give_back: Gives back what is free; takes some 10 ms for the heap of a real model.
    """

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back = give_back
        self._idle_since: float | None = None
        self._has_worked = True

    def note_work(self) -> None:
        """There is something to do."""
        self._idle_since = None
        self._has_worked = True

    def note_idle(self, now: float) -> None:
        """There is nothing to do at ``now``, monotonic seconds."""
        if self._idle_since is None:
            self._idle_since = now
        if self._has_worked and now - self._idle_since >= _REST_SECONDS:
            self._has_worked = False
            self._give_back()
