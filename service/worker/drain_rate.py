"""How fast the queue moves, and so how long it takes until there is room in it.

Only time in which somebody waits counts: a queue that was empty all night did not move, and says
nothing about how fast it will. What is older counts less, and hardly at all after some minutes.
"""

import math
import time
from collections.abc import Callable

# A minute ago counts for a third of now.
_MEMORY_SECONDS = 60.0
_LEAST_SECONDS = 1
_MOST_SECONDS = 600


class DrainRate:
    """Told when the queue begins and ceases to hold somebody, and who leaves it. Not thread-safe.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._updated_at = clock()
        self._is_waiting = False
        # All three fade in the same way, so their ratios are weighted rates.
        self._seconds = 0.0
        self._requests = 0.0
        self._tokens = 0.0

    def set_waiting(self, is_waiting: bool) -> None:
        """Whether anybody waits from now on."""
        self._pass_time()
        self._is_waiting = is_waiting

    def left(self, num_requests: int, num_tokens: int) -> None:
        """So many requests and prompt tokens left the queue."""
        self._pass_time()
        self._requests += num_requests
        self._tokens += num_tokens

    def seconds_until_left(self, num_requests: int, num_tokens: int) -> int:
        """Whole seconds, 1 to 600, until so many more will have left; 1 if nothing ever has."""
        self._pass_time()
        seconds = max(
            self._seconds_for(num_requests, self._requests),
            self._seconds_for(num_tokens, self._tokens),
        )
        return math.ceil(min(max(seconds, _LEAST_SECONDS), _MOST_SECONDS))

    def _seconds_for(self, amount: int, left: float) -> float:
        # Nothing of what is to leave was ever seen leaving: nothing is known.
        return amount * self._seconds / left if amount > 0 and left > 0 else 0.0

    def _pass_time(self) -> None:
        now = self._clock()
        if self._is_waiting:
            fade = math.exp((self._updated_at - now) / _MEMORY_SECONDS)
            self._seconds = self._seconds * fade + _MEMORY_SECONDS * (1 - fade)
            self._requests *= fade
            self._tokens *= fade
        self._updated_at = now
