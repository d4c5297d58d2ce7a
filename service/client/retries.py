"""When a request is sent again: decided here from times, waited for and sent by the transports.

A request that was refused with ``Retry-After`` (429 and 503) waits as long as that says; one that
found nobody at the address waits 0.5 s, then 1 s, then 2 s each time. Nothing else is sent again,
in particular nothing of whose answer a byte has come. Generating and scoring have no effect but
their answer, so this is safe: a worker that died in the middle of a generation left nothing behind,
and the same request with the same seed gives the same answer.

What starts a job or uploads a file carries an Idempotency-Key, by which the service does it once:
that is sent again also if its connection broke. Events of a job are stored, and asked for again
from the last one that came, for as long as a silence may be.
"""

from dataclasses import dataclass

from service.client.errors import ConnectionFailed, GemmaError, Unavailable

# Seconds after the first attempt that found nobody, after the second, and after any later one.
_CONNECTION_PAUSES = (0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class RetryRules:
    """How often and for how long.

    Attributes:
        max_retries: Attempts after the first; None: as many as there is time for.
        timeout_s: Seconds for all attempts and the waits between them.
    """

    max_retries: int | None
    timeout_s: float

    def __post_init__(self) -> None:
        if self.max_retries is not None and self.max_retries < 0:
            raise ValueError(f"max_retries should be at least 0, got {self.max_retries}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s should be above 0, got {self.timeout_s}")


class Attempts:
    """Those of one request, which began at ``now``.

    Args:
        rules: How often and for how long.
        now: On a clock in seconds.
        also: Errors after which this request may be sent again, beside those of every request.
    """

    def __init__(
        self, rules: RetryRules, now: float, also: tuple[type[GemmaError], ...] = ()
    ) -> None:
        self._rules = rules
        self._again: tuple[type[GemmaError], ...] = (ConnectionFailed, *also)
        self._deadline = now + rules.timeout_s
        self._num_failed = 0

    def seconds_left(self, now: float) -> float:
        """For this attempt. Above 0, as none begins after the deadline."""
        return max(self._deadline - now, 0.001)

    def seconds_until_next(self, error: GemmaError, now: float) -> float:
        """How long to wait after ``error``; raises it if that was the last attempt."""
        seconds = self._pause(error)
        self._num_failed += 1
        most = self._rules.max_retries
        is_last = most is not None and self._num_failed > most
        if seconds is None or is_last or now + seconds >= self._deadline:
            raise error
        return seconds

    def _pause(self, error: GemmaError) -> float | None:
        """None: it would not help, or nobody knows when it would."""
        if isinstance(error, Unavailable) and error.retry_after_s is not None:
            return error.retry_after_s
        if isinstance(error, self._again):
            return _CONNECTION_PAUSES[min(self._num_failed, len(_CONNECTION_PAUSES) - 1)]
        return None
