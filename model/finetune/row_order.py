"""Which rows a step takes, and how long a micro-batch makes them: plain functions of a plan."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from model.training import TrainingPlan, TrainingRow

# Tokens of a program. A row has other bits in each, so its own length says which one it meets:
# up to 128 tokens the first, in which several rows have room, and then one that it fills.
MICRO_BATCH_TOKENS = (128, 256, 512)
_SHARED_TOKENS = MICRO_BATCH_TOKENS[0]
# Adapters that a micro-batch may hold.
MAX_ADAPTERS = 8
_ROOMS = (16, 32, 64, 128, 256, 512)


def room_of(row: TrainingRow) -> int:
    """Tokens that a row takes in a micro-batch; from the row alone."""
    return next(room for room in _ROOMS if room >= len(row.token_ids))


def size_of(row: TrainingRow) -> int:
    """Tokens of the program that a row meets; from the row alone."""
    return next(size for size in MICRO_BATCH_TOKENS if size >= room_of(row))


def max_rows(num_tokens: int) -> int:
    """Of a micro-batch of a program."""
    return 1 if num_tokens > _SHARED_TOKENS else num_tokens // _ROOMS[0]


def steps_per_epoch(plan: TrainingPlan) -> int:
    """The last of an epoch may have fewer rows."""
    return -(-len(plan.rows) // plan.batch_size)


def ends_epoch(plan: TrainingPlan, step: int) -> bool:
    """Whether step ``step``, which counts from 1, is the last of an epoch."""
    return step % steps_per_epoch(plan) == 0


def rows_of_step(plan: TrainingPlan, step: int) -> list[int]:
    """Indices of the rows that step ``step`` takes, in order."""
    epoch, number = divmod(step - 1, steps_per_epoch(plan))
    seed = np.random.SeedSequence([plan.seed, 1 + epoch])
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(plan.rows))
    first = number * plan.batch_size
    return [int(index) for index in order[first : first + plan.batch_size]]


def num_measured(plan: TrainingPlan) -> int:
    """How often the validation rows are: before the first step, after each epoch, at the end."""
    return 1 + -(-plan.num_steps // steps_per_epoch(plan))


def num_tokens_of(plan: TrainingPlan) -> int:
    """Of all steps. Whole epochs are not looked at one by one: there may be a million steps."""
    num_epochs, num_more = divmod(plan.num_steps, steps_per_epoch(plan))
    lengths = [len(row.token_ids) for row in plan.rows]
    last = range(plan.num_steps - num_more + 1, plan.num_steps + 1)
    more = sum(lengths[index] for step in last for index in rows_of_step(plan, step))
    return num_epochs * sum(lengths) + more


@dataclass(frozen=True, slots=True)
class PlacedRow:
    """A row in a micro-batch, from token ``offset`` on."""

    row: TrainingRow
    offset: int


def placed(rows: Sequence[TrainingRow]) -> Iterator[PlacedRow]:
    """One behind the other; longest rooms first, so each begins at a multiple of its own."""
    offset = 0
    for row in rows:
        yield PlacedRow(row, offset)
        offset += room_of(row)
