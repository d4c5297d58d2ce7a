"""How weights move: AdamW, the course of the learning rate, and the norm of a gradient."""

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from model.training import TrainingPlan

Floats = NDArray[np.float32]
Arrays = dict[str, Floats]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


@runtime_checkable
class Optimizer(Protocol):
    """Moves one array. It keeps ``num_moments`` arrays of the same shape."""

    num_moments: int

    def move(
        self,
        weight: Floats,
        gradient: Floats,
        moments: tuple[Floats, ...],
        *,
        step: int,
        learning_rate: float,
        weight_decay: float,
    ) -> tuple[Floats, tuple[Floats, ...]]:
        """The weight after step ``step``, which counts from 1, and what is kept for the next."""


class AdamW:
    """Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2."""

    num_moments = 2

    def move(
        self,
        weight: Floats,
        gradient: Floats,
        moments: tuple[Floats, ...],
        *,
        step: int,
        learning_rate: float,
        weight_decay: float,
    ) -> tuple[Floats, tuple[Floats, ...]]:
        """See `Optimizer`."""
        f = np.float32
        first = f(_BETA_1) * moments[0] + f(1 - _BETA_1) * gradient
        second: Floats = f(_BETA_2) * moments[1] + f(1 - _BETA_2) * gradient * gradient
        mean = first / f(1 - _BETA_1**step)
        root: Floats = np.sqrt(second / f(1 - _BETA_2**step))
        change: Floats = mean / (root + f(_EPSILON)) + f(weight_decay) * weight
        return weight - f(learning_rate) * change, (first, second)


def learning_rate(plan: TrainingPlan, step: int) -> float:
    """Of a step, which counts from 1.

    It rises in equal parts to the highest at step ``warmup_steps``. From there it stays, or goes
    down a line or half a wave that would reach 0 one step after the last.
    """
    if step <= plan.warmup_steps:
        return plan.learning_rate * step / plan.warmup_steps
    gone = (step - plan.warmup_steps - 1) / max(plan.num_steps - plan.warmup_steps, 1)
    match plan.schedule:
        case "constant":
            return plan.learning_rate
        case "linear":
            return plan.learning_rate * (1.0 - gone)
        case "cosine":
            return plan.learning_rate * 0.5 * (1.0 + math.cos(math.pi * gone))


def norm(arrays: Mapping[str, Floats]) -> float:
    """Of all arrays together."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.sqrt(
            sum(float(np.sum(np.square(array, dtype=np.float64))) for array in arrays.values())
        )


def clip_factor(found: float, most: float | None) -> float:
    """What a gradient of this norm is multiplied by."""
    return 1.0 if most is None or found <= most else most / found
