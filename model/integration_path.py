"""Where integrated gradients look along the line from zero to the residual stream.

Along this line a log-probability lies still for long stretches, and changes within a thousandth of
it somewhere, where attention turns to another token. Points at equal distances miss that place:
with 64 of them half of the change was missing. So the line is cut into intervals. Values at their
borders, which cost a third of a derivative, say how much changes in each; one derivative in the
middle says what that would be if it were the same all along. The interval where the two differ most
is cut into three, of which the one in the middle has its derivative already::

    |           x           |           x           |     differs here
    |           x           |   x   |   x   |   x   |

At zero itself there is nothing to integrate. What enters a norm there has no direction, so that the
value at zero and that just beside it have nothing in common. The line begins at `START`. From there
on what counts is by how many times the stream has grown: norms see its direction alone, which turns
where it becomes as large as what the blocks add. So an interval whose end is far from its beginning
in this sense is halved in this sense.

In the end an interval stands for its length times the derivative in its middle, and for how much
that bends between the middles of its neighbours: a parabola through the three, integrated. No
weight is negative.

Source, of points where values change: Bhat and Raychowdhury 2023,
https://arxiv.org/abs/2302.11107.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# The baseline: zero, to three places of the stream.
START = 2.0**-10

# Intervals that are halved by their values alone, of eight steps; and how many of these at first.
_FIRST_EIGHTHS = 2
_EQUAL_SHARE = 4
# Of that many steps, one interval is cut before the next ones are chosen.
_STEPS_OF_CUT = 16
# An interval that ends this many times as far from zero as it begins is halved geometrically.
_FAR = 4.0


@dataclass(frozen=True, slots=True)
class _Interval:
    """Between two scales; ``middle`` is where its derivative is taken."""

    low: float
    high: float
    middle: float


class IntegrationPath:
    """Asks for values and slopes, in turns, until it has as many slopes as there are steps.

    A slope is the derivative by the scale. With an odd number left over, there is one less.

    Args:
        num_steps: At least one.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._num_first = max(num_steps * _FIRST_EIGHTHS // 8, 1)
        self._num_together = max(num_steps // _STEPS_OF_CUT, 1)
        self._values: dict[float, float] = {}
        self._slopes: dict[float, float] = {}
        self._intervals: list[_Interval] = []

    @property
    def is_done(self) -> bool:
        """Whether nothing more is to be asked for."""
        return bool(self._slopes) and self._num_steps - len(self._slopes) < 2

    @property
    def change(self) -> float:
        """Of the value, from the beginning to the end."""
        return self._values[1.0] - self._values[START]

    def wanted_values(self) -> list[float]:
        """Scales at which values are to be told next."""
        if not self._values:
            num_equal = max(self._num_first // _EQUAL_SHARE, 1)
            scales: list[float] = np.linspace(START, 1.0, num_equal + 1).tolist()
            return scales
        if len(self._values) <= self._num_first:
            return self._halves()
        if not self._slopes:
            return []
        self._cut()
        borders = {border for each in self._intervals for border in (each.low, each.high)}
        return sorted(borders - self._values.keys())

    def note_values(self, values: Mapping[float, float]) -> None:
        """Answers `wanted_values`."""
        self._values |= values
        if not self._slopes and len(self._values) > self._num_first:
            pairs = itertools.pairwise(sorted(self._values))
            self._intervals = [_Interval(low, high, (low + high) / 2) for low, high in pairs]

    def wanted_slopes(self) -> list[float]:
        """Scales at which derivatives are to be told next; none while values are still missing."""
        return [each.middle for each in self._intervals if each.middle not in self._slopes]

    def note_slope(self, scale: float, slope: float) -> None:
        """Answers one of `wanted_slopes`."""
        self._slopes[scale] = slope

    def weights(self) -> list[tuple[float, float]]:
        """Each scale of a derivative with the length of line that it stands for."""
        middles = np.array([each.middle for each in self._intervals])
        lengths = np.array([each.high - each.low for each in self._intervals])
        weights = lengths.copy()
        if len(middles) > 2:
            # The second derivative in the middle one of three, as shares of theirs.
            before, behind = np.diff(middles)[:-1], np.diff(middles)[1:]
            bend = lengths[1:-1] ** 3 / 24 * 2 / (before * behind * (before + behind))
            weights[:-2] += bend * behind
            weights[1:-1] -= bend * (before + behind)
            weights[2:] += bend * before
        return list(zip(middles.tolist(), weights.tolist(), strict=True))

    def _halves(self) -> list[float]:
        """Middles of intervals: where most of the change is, and the longest of those alike."""
        pairs = list(itertools.pairwise(sorted(self._values)))
        changes = [abs(self._values[high] - self._values[low]) for low, high in pairs]
        total = sum(changes) or 1.0
        amounts = [
            change / total + high - low for change, (low, high) in zip(changes, pairs, strict=True)
        ]
        missing = self._num_first - len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -amounts[i])
        return [_half(*pairs[i]) for i in sorted(order[: min(missing, self._num_together)])]

    def _cut(self) -> None:
        """Cuts the intervals whose slope explains their change least."""
        order = sorted(self._intervals, key=lambda each: -self._difference(each))
        count = min(self._num_together, (self._num_steps - len(self._slopes)) // 2)
        for each in order[:count]:
            third = (each.high - each.low) / 3
            first, second = each.low + third, each.high - third
            place = self._intervals.index(each)
            self._intervals[place : place + 1] = [
                _Interval(each.low, first, each.low + third / 2),
                _Interval(first, second, each.middle),
                _Interval(second, each.high, each.high - third / 2),
            ]

    def _difference(self, interval: _Interval) -> float:
        change = self._values[interval.high] - self._values[interval.low]
        return abs(change - (interval.high - interval.low) * self._slopes[interval.middle])


def _half(low: float, high: float) -> float:
    return math.sqrt(low * high) if high > _FAR * low else (low + high) / 2
