"""One job in training: its adapter, what the optimizer keeps, and the step that is being made.

    rows of the validation   ->  EvalDone       before the first step and after each epoch
    rows of the step         ->  StepDone       when all of them have gone back

Derivatives are added row by row within one room size, and then size by size: an order that no
other job can change.
"""

import math
import time
from dataclasses import dataclass, field

import numpy as np

from model.adapter_bank import Adapter
from model.adapter_file import write_adapter
from model.config import GemmaConfig
from model.finetune.micro_batch import ByHead, Floats
from model.finetune.optimizers import Arrays, Optimizer, clip_factor, learning_rate, norm
from model.finetune.pairs import named, own_gradient, paired
from model.finetune.row_order import ends_epoch, room_of, rows_of_step
from model.lora_adapter import LoraAdapter
from model.training import (
    EvalDone,
    JobDone,
    JobFailed,
    StepDone,
    TrainingEvent,
    TrainingPlan,
    TrainingRow,
)


@dataclass(slots=True, eq=False)
class RowWork:
    """A row that waits or is in a micro-batch; ``number`` is its place in the step."""

    number: int
    row: TrainingRow


@dataclass(slots=True, eq=False)
class Job:
    """See above. ``moments`` has the optimizer's arrays by name of an array of the adapter."""

    plan: TrainingPlan
    config: GemmaConfig
    optimizer: Optimizer
    adapter: LoraAdapter
    moments: dict[str, tuple[Floats, ...]]
    step: int = 0
    is_evaluating: bool = False
    is_alone: bool = False
    tokens_served: int = 0
    rows_shared: int = 0
    began: float = field(default_factory=time.monotonic)
    waiting: list[RowWork] = field(default_factory=list)
    num_rows: int = 0
    losses: dict[int, list[float]] = field(default_factory=dict)
    sums: dict[int, dict[tuple[int, str], ByHead]] = field(default_factory=dict)
    for_programs: Adapter | None = None

    def begin(self) -> list[TrainingEvent]:
        """Goes on from ``step``."""
        self.for_programs = self.adapter.for_bank(self.config)
        is_due = self.step == 0 or self.step == self.plan.num_steps
        if self.plan.validation and (is_due or ends_epoch(self.plan, self.step)):
            self._collect(list(self.plan.validation), is_evaluating=True)
            return []
        return self._begin_step()

    def _begin_step(self) -> list[TrainingEvent]:
        if self.step >= self.plan.num_steps:
            return [JobDone(self.plan.job)]
        rows = [self.plan.rows[index] for index in rows_of_step(self.plan, self.step + 1)]
        self._collect(rows, is_evaluating=False)
        return []

    def _collect(self, rows: list[TrainingRow], *, is_evaluating: bool) -> None:
        self.is_evaluating = is_evaluating
        self.waiting = [RowWork(number, row) for number, row in enumerate(rows)]
        self.num_rows = len(rows)
        self.losses, self.sums = {}, {}

    def again_alone(self) -> None:
        """Begins what it was at anew, and shares with nobody."""
        self.is_alone = True
        if self.is_evaluating:
            self._collect(list(self.plan.validation), is_evaluating=True)
        else:
            self._begin_step()

    def add(self, work: RowWork, layer: int, target: str, by_head: ByHead) -> None:
        """The derivative of one row."""
        sums = self.sums.setdefault(room_of(work.row), {})
        if (found := sums.get((layer, target))) is None:
            sums[layer, target] = by_head[0].copy(), by_head[1].copy()
        else:
            np.add(found[0], by_head[0], out=found[0])
            np.add(found[1], by_head[1], out=found[1])

    @property
    def is_complete(self) -> bool:
        """Whether all rows are back."""
        return len(self.losses) == self.num_rows

    def finish(self) -> list[TrainingEvent]:
        """What follows when all rows are back."""
        losses = [each for number in range(self.num_rows) for each in self.losses[number]]
        loss = math.fsum(losses) / len(losses)
        if not math.isfinite(loss):
            return [self._failure()]
        self.is_alone = False
        if self.is_evaluating:
            evaluated = EvalDone(self.plan.job, self.step, loss)
            return [evaluated, *self._begin_step()]
        return self._move(loss, len(losses))

    def _failure(self) -> JobFailed:
        detail = f"The loss or its gradient is not finite at step {self.step + 1}."
        return JobFailed(self.plan.job, "non_finite_loss", detail)

    def _move(self, loss: float, num_trained: int) -> list[TrainingEvent]:
        gradient = self._gradient(num_trained)
        grad_norm = norm(gradient)
        if not math.isfinite(grad_norm):
            return [self._failure()]
        factor = np.float32(clip_factor(grad_norm, self.plan.grad_clip))
        step, rate = self.step + 1, learning_rate(self.plan, self.step + 1)
        arrays, moments = named(self.adapter.pairs), {}
        with np.errstate(over="ignore", invalid="ignore"):
            for name, array in arrays.items():
                arrays[name], moments[name] = self.optimizer.move(
                    array,
                    gradient[name] * factor,
                    self.moments[name],
                    step=step,
                    learning_rate=rate,
                    weight_decay=self.plan.weight_decay,
                )
        if not all(np.isfinite(array).all() for array in arrays.values()):
            return [self._failure()]
        pairs = paired(arrays, self.adapter.pairs)
        self.adapter, self.moments, self.step = LoraAdapter(self.adapter.form, pairs), moments, step
        now = time.monotonic()
        num_tokens = sum(
            len(self.plan.rows[index].token_ids) for index in rows_of_step(self.plan, step)
        )
        done = StepDone(
            job=self.plan.job,
            step=step,
            loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            num_tokens=num_tokens,
            seconds=now - self.began,
            rows_shared=self.rows_shared,
        )
        self.began, self.rows_shared = now, 0
        return [done, *self.begin()]

    def _gradient(self, num_trained: int) -> Arrays:
        """Of the mean loss, in the adapter's own layout."""
        found = {}
        for place, own in self.adapter.pairs.items():
            rooms = [self.sums[room][place] for room in sorted(self.sums)]
            by_a, by_b = rooms[0]
            for more_a, more_b in rooms[1:]:
                by_a, by_b = by_a + more_a, by_b + more_b
            count = np.float32(num_trained)
            own_a, own_b = own_gradient(self.adapter.form, own, place, (by_a, by_b))
            found[place] = own_a / count, own_b / count
        return named(found)

    def file(self) -> bytes:
        """Of the adapter."""
        return write_adapter(self.adapter)
