"""The trainer of an engine in a bare loop: plans of a bench, and how long they take."""

import random
import time
from collections.abc import Sequence

from bench.run_options import PRESET
from model.engine import GemmaEngine, load
from model.finetune.trainer import SlicedTrainer
from model.progress import no_progress
from model.slots import EngineOptions
from model.training import StepDone, TrainingPlan, TrainingRow
from service.settings import Settings

RANK = 8
TARGETS = ("query", "value")
# Of each row; a completion of some words.
NUM_TRAINED = 4


def bench_engine() -> GemmaEngine:
    """With the settings of the service, so that its compiled programs are found."""
    s = Settings(preset=PRESET)
    return load(
        EngineOptions(
            s.preset,
            s.slots,
            s.context_tokens,
            s.cache_dir,
            s.prefix_cache_bytes,
            s.kernels,
            s.adapter_slots,
            s.adapter_max_rank,
        ),
        no_progress,
    )


def rows(count: int, num_tokens: int, seed: str) -> list[list[int]]:
    """Token ids of rows of one length."""
    draw = random.Random(seed)
    return [
        [2, *(draw.randrange(1000, 200_000) for _ in range(num_tokens - 1))] for _ in range(count)
    ]


def plan(job: str, texts: Sequence[Sequence[int]], batch_size: int, num_steps: int) -> TrainingPlan:
    """A job on the query and value of every layer."""
    return TrainingPlan(
        job=job,
        rows=tuple(
            TrainingRow(tuple(ids), tuple(i >= len(ids) - NUM_TRAINED for i in range(len(ids))))
            for ids in texts
        ),
        validation=(),
        num_steps=num_steps,
        layout="peft",
        rank=RANK,
        alpha=float(RANK),
        targets=TARGETS,
        batch_size=batch_size,
        learning_rate=2e-4,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        grad_clip=1.0,
        seed=0,
    )


def seconds_of(trainer: SlicedTrainer, plans: Sequence[TrainingPlan]) -> tuple[float, list[float]]:
    """Until all are done, and those of each step."""
    began = time.perf_counter()
    steps = []
    for each in plans:
        trainer.begin(each)
    while trainer.num_jobs:
        steps += [event.seconds for event in trainer.advance() if isinstance(event, StepDone)]
    seconds = time.perf_counter() - began
    for each in plans:
        trainer.drop(each.job)
    return seconds, steps
