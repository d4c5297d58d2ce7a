"""Small jobs for the trainer of an engine, and how they are run."""

from collections.abc import Callable

import numpy as np

from model.training import JobDone, Trainer, TrainingEvent, TrainingPlan, TrainingRow


def rows_of(count: int, length: int, seed: int = 0) -> tuple[TrainingRow, ...]:
    """Rows of about this length, of which the last two thirds are learned."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        size = length - number % 5
        ids = tuple(int(i) for i in draw.integers(12, 500, size))
        rows.append(TrainingRow((2, *ids[1:]), tuple(i > size // 3 for i in range(size))))
    return tuple(rows)


def plan_of(job: str, **changes) -> TrainingPlan:
    """Four steps of three rows that share a micro-batch, but for the changes."""
    fields = {
        "rows": rows_of(6, 14),
        "validation": (),
        "num_steps": 4,
        "layout": "keras",
        "rank": 4,
        "targets": ("query", "value"),
        "batch_size": 3,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "grad_clip": 1.0,
        "seed": 1,
        **changes,
    }
    return TrainingPlan(job=job, **{"alpha": float(fields["rank"]), **fields})


def events_of(
    trainer: Trainer, *plans: TrainingPlan, between: Callable[[], object] = lambda: None
) -> tuple[list[TrainingEvent], dict[str, bytes]]:
    """Trains all until each is done or has failed: what was told, and the files they end with."""
    for plan in plans:
        trainer.begin(plan)
    events: list[TrainingEvent] = []
    while trainer.num_jobs:
        events += trainer.advance()
        between()
    files = {plan.job: trainer.adapter(plan.job) for plan in plans}
    for plan in plans:
        trainer.drop(plan.job)
    return events, files


def trained(
    trainer: Trainer, *plans: TrainingPlan, between: Callable[[], object] = lambda: None
) -> dict[str, bytes]:
    """Files of the adapters of jobs that are all done."""
    events, files = events_of(trainer, *plans, between=between)
    assert {event.job for event in events if isinstance(event, JobDone)} == set(files)
    return files
