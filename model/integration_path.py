"""Where integrated gradients look along the line from zero to the residual stream.

Along this line a log-probability lies still for long stretches, and changes within a thousandth of
it somewhere, where attention turns to another token. Points at equal distances miss that place:
with 64 of them half of the change was missing. A value costs a quarter of a derivative, so values
look first, and derivatives are spent on what they found:

1. Values at equal distances, and then between those where the slope changes most, until a curve
   through those that are known foretells the next ones::

       |       |       |       |   |   |||||   |       |       |

2. The line is cut into as many intervals as there are steps. Each holds the same share of a sum: of
   how much the value goes up and down, of the length, and of the length in powers. Where the stream
   is still small, the value may rest while tokens take over from each other; norms see the
   direction alone, so what counts there is by how many times the stream has grown.
3. An interval stands for its length times one derivative. It is taken where the slope of the curve
   through the values is what the interval changes by, divided by its length. There is such a place
   in each (mean value theorem). Half of all intervals bend one way there and half the other, but
   the middles of as many are off by 4 % of the change.
4. The slope that the derivative has there tells what the interval is taken to change by, and the
   values what it does. While the two differ by more than 0.8 % of the whole change, summed over all
   intervals without sign, the worst of them are halved and derivatives taken anew::

       | · | · |·|·|  ·  |       ->       | · | · |·|·| · | · |

   So the error of completeness is below one percent unless derivatives run out. Those at inner
   layers, where a hundred nats go up and down for ten that are left, need two or three a step.

At zero itself there is nothing to integrate. What enters a norm there has no direction, so that the
value at zero and that just beside it have nothing in common. The line begins at `START`.

Sources: Sundararajan, Taly and Yan 2017, https://arxiv.org/abs/1703.01365; of points where values
change: Bhat and Raychowdhury 2023, https://arxiv.org/abs/2302.11107; of the curve: Akima 1970,
https://doi.org/10.1145/321607.321609.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.interpolate import Akima1DInterpolator

# The baseline: zero, to three places of the stream.
START = 2.0**-10

# Values for each derivative: at least so many, and more up to so many while one of the last round
# was further from what was foretold than this share of the change, or than rounding explains.
_LEAST_A_STEP = 3
_MOST_A_STEP = 16
_FORETOLD = 5e-5
_ROUNDING = 2e-5
# Of a round, for each step, and at least; the first has equal distances.
_ROUND_A_STEP = 0.25
_LEAST_TOGETHER = 8
# An interval that ends this many times as far from zero as it begins is halved geometrically.
_FAR = 4.0
# Derivatives for each step, at most. Intervals are halved while what they are taken to change by is
# wrong by this share of the whole change together.
_MOST_DERIVATIVES_A_STEP = 3
_UNEXPLAINED = 0.008
# What length counts against all ups and downs: where values go, and where derivatives do.
_LENGTH_OF_VALUES = 0.3
_LENGTH_OF_STEPS = 0.3
_POWERS_OF_STEPS = 0.3
# Points at which the curve is looked at between two values, and within a step.
_FINE = 9
_TRIED = 33
# Slopes of a straight line differ by rounding.
_SAME_SLOPE = 1e-6

Numbers = Float64[np.ndarray, " numbers"]


@dataclass(frozen=True, slots=True)
class Step:
    """An interval of the line.

    Attributes:
        low: Where it begins.
        high: Where it ends.
        scale: Between them: where the derivative is taken that stands for it.
    """

    low: float
    high: float
    scale: float

    @property
    def length(self) -> float:
        """Of the line."""
        return self.high - self.low


class IntegrationPath:
    """Asks for values, in rounds, and then for derivatives, until they tell what values do.

    Args:
        num_steps: At least one.

    Attributes:
        steps: All of the line, in order, as far as they are known.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._num_least = _LEAST_A_STEP * num_steps
        self._num_most = _MOST_A_STEP * num_steps
        self._num_together = max(math.ceil(_ROUND_A_STEP * num_steps), _LEAST_TOGETHER)
        self._values: dict[float, float] = {}
        # Of the last round: how far a value was from what the others foretold, at most.
        self._surprise = math.inf
        self._num_taken = 0
        self._slopes: dict[float, float] = {}
        self.steps: list[Step] = []

    @property
    def change(self) -> float:
        """Of the value, from the beginning to the end."""
        return self._values[1.0] - self._values[START]

    def wanted_values(self) -> list[float]:
        """Scales at which values are to be told next; none if there are enough."""
        count = len(self._values)
        if not count:
            scales: list[float] = np.linspace(START, 1.0, self._num_together + 1).tolist()
            return scales
        is_foretold = self._surprise <= max(_FORETOLD * abs(self.change), _ROUNDING)
        wanted = self._num_least if is_foretold else self._num_most
        return self._between(min(wanted - count, self._num_together)) if count < wanted else []

    def note_values(self, values: Mapping[float, float]) -> None:
        """Answers `wanted_values`."""
        if self._values:
            scales = np.array(list(values))
            foretold = Akima1DInterpolator(*self._known())(scales)
            self._surprise = float(np.abs(foretold - list(values.values())).max())
        self._values |= values

    def wanted_slopes(self) -> list[float]:
        """Scales at which the derivative is to be taken next; none if `steps` are as they stay.

        To be asked when no values are wanted any more. Where it was taken before, it counts no
        longer unless one of the steps has it.
        """
        scales, values = self._known()
        curve = Akima1DInterpolator(scales, values)
        halved = self._worst(curve)
        if self.steps:
            intervals = [half for step in halved for half in _halves(step)]
        else:
            intervals = [*itertools.pairwise(_equal_shares(scales, values, self._num_steps))]
        added = [Step(low, high, _mean_slope_at(curve, low, high)) for low, high in intervals]
        kept = [step for step in self.steps if step not in halved]
        self.steps = sorted([*kept, *added], key=lambda step: step.low)
        self._num_taken += len(added)
        return [step.scale for step in added]

    def note_slopes(self, slopes: Mapping[float, float]) -> None:
        """Answers `wanted_slopes`."""
        self._slopes |= slopes

    def _worst(self, curve: Akima1DInterpolator) -> list[Step]:
        """Steps that are to be halved: those whose slope tells least what they change by."""
        errors = {
            step: abs(
                step.length * self._slopes[step.scale] - float(curve(step.high) - curve(step.low))
            )
            for step in self.steps
        }
        room = (_MOST_DERIVATIVES_A_STEP * self._num_steps - self._num_taken) // 2
        left, allowed = sum(errors.values()), _UNEXPLAINED * abs(self.change)
        halved: list[Step] = []
        most = min(room, self._num_together)
        for step in sorted(errors, key=errors.__getitem__, reverse=True)[:most]:
            if left <= allowed:
                break
            halved.append(step)
            left -= errors[step]
        return halved

    def _known(self) -> tuple[Numbers, Numbers]:
        scales = np.array(sorted(self._values))
        return scales, np.array([self._values[scale] for scale in scales.tolist()])

    def _between(self, count: int) -> list[float]:
        """Middles of the ``count`` intervals about which the values say least."""
        scales, values = self._known()
        lengths, changes = np.diff(scales), np.diff(values)
        turns = np.abs(np.diff(changes / lengths))
        bends = np.maximum(np.append(turns, 0.0), np.append(0.0, turns)) * lengths
        unknown = _shares(bends) + _LENGTH_OF_VALUES * (lengths + _shares(np.abs(changes)))
        chosen = np.sort(np.argsort(-unknown, kind="stable")[:count])
        return [_half(float(scales[i]), float(scales[i + 1])) for i in chosen]


def _equal_shares(scales: Numbers, values: Numbers, count: int) -> list[float]:
    """Borders of ``count`` intervals that hold as much each."""
    fine = np.unique([_points(low, high) for low, high in itertools.pairwise(scales.tolist())])
    amounts = (
        _shares(np.abs(np.diff(np.interp(fine, scales, values))))
        + _LENGTH_OF_STEPS * np.diff(fine)
        + _POWERS_OF_STEPS * np.diff(np.log(fine)) / -math.log(START)
    )
    before = np.append(0.0, np.cumsum(amounts))
    inner = np.interp(np.linspace(0.0, before[-1], count + 1)[1:-1], before, fine)
    return [START, *inner.tolist(), 1.0]


def _halves(step: Step) -> list[tuple[float, float]]:
    middle = _half(step.low, step.high)
    return [(step.low, middle), (middle, step.high)]


def _points(low: float, high: float) -> Numbers:
    """From one to the other, both exactly."""
    points = np.geomspace(low, high, _FINE)
    points[0], points[-1] = low, high
    return points


def _mean_slope_at(curve: Akima1DInterpolator, low: float, high: float) -> float:
    """Where the curve rises as from one end to the other, and of such places the middlemost."""
    tried = low + (high - low) * (np.arange(_TRIED) + 0.5) / _TRIED
    slopes = curve(tried, nu=1)
    beyond = slopes - (curve(high) - curve(low)) / (high - low)
    places = tried[np.abs(beyond) <= _SAME_SLOPE * np.abs(slopes).max()].tolist()
    for (before, first), (behind, second) in itertools.pairwise(
        zip(tried.tolist(), beyond.tolist(), strict=True)
    ):
        if first * second < 0:
            places.append(before + (behind - before) * first / (first - second))
    if not places:
        return float(tried[np.argmin(np.abs(beyond))])
    return float(min(places, key=lambda place: abs(place - (low + high) / 2)))


def _shares(amounts: Numbers) -> Numbers:
    shares: Numbers = amounts / (amounts.sum() or 1.0)
    return shares


def _half(low: float, high: float) -> float:
    return math.sqrt(low * high) if high > _FAR * low else (low + high) / 2
