"""Where integrated gradients look along the line from zero to the residual stream.

Along this line a log-probability lies still for long stretches and changes within a hundredth of it
somewhere, where attention turns to another token. Points at equal distances miss that place: with
64 of them half of the change was missing. So values of the log-probability, which cost a third of
a derivative, say where it changes, and the derivatives are taken there::

    scale       START .................................... 1
    value        |        |        |    |  | | | |  |     |      intervals, halved where it changes
    derivative      x   x     x   x    x x |x x|x x| x x x       Gauss's points, as dense as these

At zero itself there is nothing to integrate. What enters a norm there has no direction, so that the
value at zero and that just beside it have nothing in common. The line begins at `START`.

Source, of points where values change: Bhat and Raychowdhury 2023,
https://arxiv.org/abs/2302.11107.
"""

import itertools
from collections.abc import Mapping

import numpy as np

# The baseline: zero, to three places of the stream.
START = 2.0**-10

# Derivatives in each interval.
_POINTS = 2
# Intervals that are halved before the next ones are chosen.
_HALVED_TOGETHER = 4
# Values are looked at first at a quarter of the places that there will be.
_FIRST_SHARE = 4


def first_scales(num_steps: int) -> list[float]:
    """Where the value is looked at first, both ends among them."""
    num_intervals = max(num_steps // _FIRST_SHARE, 1)
    scales: list[float] = np.linspace(START, 1.0, num_intervals + 1).tolist()
    return scales


def next_scales(values: Mapping[float, float], num_steps: int) -> list[float]:
    """Where to look next, in the middle of intervals; none if there are as many as steps."""
    scales = sorted(values)
    amounts = _amounts(values)
    missing = num_steps - len(amounts)
    order = sorted(range(len(amounts)), key=lambda i: -amounts[i])
    chosen = sorted(order[: min(missing, _HALVED_TOGETHER)])
    return [(scales[i] + scales[i + 1]) / 2 for i in chosen]


def derivative_points(values: Mapping[float, float], num_steps: int) -> list[tuple[float, float]]:
    """Scale and weight of each derivative; the weights add up to the length of the line.

    The intervals for them hold as much as each other; an odd one out has one point.
    """
    ends = np.concatenate([[0.0], np.cumsum(_amounts(values))])
    pairs = num_steps / _POINTS
    borders = np.minimum(np.arange(np.ceil(pairs) + 1), pairs) / pairs * ends[-1]
    points: list[tuple[float, float]] = []
    for low, high in itertools.pairwise(np.interp(borders, ends, sorted(values))):
        places, weights = np.polynomial.legendre.leggauss(min(_POINTS, num_steps - len(points)))
        half = (high - low) / 2
        points += [
            (low + half + half * place, half * weight)
            for place, weight in zip(places.tolist(), weights.tolist(), strict=True)
        ]
    return points


def _amounts(values: Mapping[float, float]) -> list[float]:
    """Of each interval: its share of the change, and its length."""
    pairs = list(itertools.pairwise(sorted(values)))
    changes = [abs(values[high] - values[low]) for low, high in pairs]
    total = sum(changes) or 1.0
    return [change / total + high - low for change, (low, high) in zip(changes, pairs, strict=True)]
