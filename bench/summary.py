"""From records of requests to the numbers of a table."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.streams import Record


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of the sorted values; not a number if there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def token_gaps(record: Record) -> list[float]:
    """Seconds between tokens; those that arrive together share their time evenly."""
    gaps = []
    for (before, _), (now, count) in itertools.pairwise(record.arrivals):
        gaps += [(now - before) / count] * count
    return gaps


def longest_wait(record: Record, begin: float, end: float) -> float:
    """The longest time without a token that overlaps the span from ``begin`` to ``end``."""
    times = [time for time, _ in record.arrivals]
    return max(
        now - before for before, now in itertools.pairwise(times) if now > begin and before < end
    )


@dataclass(frozen=True, slots=True)
class Target:
    """What a client is content with."""

    first_token_seconds: float
    median_gap_seconds: float

    def is_met(self, record: Record) -> bool:
        """Whether all tokens came, and as fast as this."""
        if record.outcome != "done" or record.first_token_seconds > self.first_token_seconds:
            return False
        gaps = token_gaps(record)
        return not gaps or percentile(gaps, 50) <= self.median_gap_seconds


def summarize(
    records: Sequence[Record], window_seconds: float, target: Target
) -> dict[str, float | int]:
    """The row of one rate. Tokens count that came inside of the window, good requests at any time.

    First-token times are of all requests that were taken in. One that was given up before its first
    token counts with the time that it had waited by then, so with such ones they are lower bounds.
    """
    first = [record.first_token_seconds for record in records if record.outcome != "refused"]
    gaps = [gap for record in records for gap in token_gaps(record)]
    arrivals = [arrival for record in records for arrival in record.arrivals]
    num_tokens = sum(count for time, count in arrivals if time <= window_seconds)
    return {
        "requests": len(records),
        "refused": sum(record.outcome == "refused" for record in records),
        "failed": sum(record.outcome == "failed" for record in records),
        "unfinished": sum(record.outcome == "unfinished" for record in records),
        "sent_late_seconds": max((record.sent - record.due for record in records), default=0.0),
        "first_token_p50": percentile(first, 50),
        "first_token_p95": percentile(first, 95),
        "gap_p50": percentile(gaps, 50),
        "gap_p95": percentile(gaps, 95),
        "gap_p99": percentile(gaps, 99),
        "tokens_per_second": num_tokens / window_seconds,
        "goodput": sum(target.is_met(record) for record in records) / window_seconds,
    }
