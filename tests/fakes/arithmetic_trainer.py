"""Training in integers: an adapter is a number, and a step changes it by the tokens it learns.

After a step of a job, its number is

    (31 × number + seed + step + sum of the trained tokens of the step's rows) modulo 997

So it depends on every row, on their order and on the number of steps, and a step that was made
twice or left out shows. The loss of a step is the number before it, divided by 997.

A slice is one row of every job that has one, so jobs share their slices; it takes
``ARITHMETIC_SLICE_SECONDS``. The file of an adapter is JSON with its form and its number. That of
another library is a line: the layout and the number.
"""

import hashlib
import itertools
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from model.errors import AdapterUnfit
from model.slots import AdapterForm
from model.training import (
    EvalDone,
    JobDone,
    JobFailed,
    StepDone,
    TrainingEstimate,
    TrainingEvent,
    TrainingPlan,
    TrainingRow,
)

MODULUS = 997
# Tokens that make a step fail, as a real one might.
LOSS_NOT_FINITE = 911
OUT_OF_MEMORY = 912
# One that makes the slice raise, and one with which no job begins.
RAISE = 913
RAISE_AT_BEGIN = 914
# Rows of a training step are filled up to so many tokens.
PADDED_TOKENS = 8


def learned(row: TrainingRow) -> int:
    """What a row adds."""
    return sum(id_ for id_, is_ in zip(row.token_ids, row.is_trained, strict=True) if is_)


def order(plan: TrainingPlan, epoch: int) -> list[int]:
    """Of the rows in an epoch."""
    indexes = list(range(len(plan.rows)))
    random.Random(f"{plan.seed} {epoch}").shuffle(indexes)
    return indexes


def batches(plan: TrainingPlan) -> Iterator[tuple[list[TrainingRow], bool]]:
    """Rows of each step, and whether the step is the last one of its epoch."""
    done = 0
    for epoch in range(plan.num_steps):
        indexes = order(plan, epoch)
        for first in range(0, len(indexes), plan.batch_size):
            if done == plan.num_steps:
                return
            done += 1
            chosen = indexes[first : first + plan.batch_size]
            yield [plan.rows[index] for index in chosen], first + plan.batch_size >= len(indexes)


def number_after(plan: TrainingPlan, num_steps: int | None = None) -> int:
    """What a job ends with, worked out without a trainer."""
    number = 0 if plan.initial is None else _opened(plan.initial)["number"]
    for step, (rows, _) in enumerate(batches(plan), start=1):
        if step > (plan.num_steps if num_steps is None else num_steps):
            break
        number = (31 * number + plan.seed + step + sum(map(learned, rows))) % MODULUS
    return number


def adapter_bytes(form: AdapterForm, number: int) -> bytes:
    return json.dumps({**asdict(form), "number": number}).encode()


def form_of(plan: TrainingPlan) -> AdapterForm:
    return AdapterForm(plan.layout, plan.rank, plan.alpha, tuple(sorted(plan.targets)))


def _opened(content: bytes) -> dict:
    try:
        return {**json.loads(content)}
    except (ValueError, TypeError) as error:
        raise AdapterUnfit("The adapter file is none.") from error


def _digest(plan: TrainingPlan) -> str:
    return hashlib.sha256(repr(plan).encode()).hexdigest()


@dataclass
class _Running:
    plan: TrainingPlan
    number: int
    step: int = 0
    row: int = 0
    added: int = 0
    shared: int = 0
    began: float = field(default_factory=time.monotonic)
    was_evaluated: bool = False
    batches: Iterator[tuple[list[TrainingRow], bool]] = field(default_factory=lambda: iter(()))
    # Of the step that goes on.
    rows: list[TrainingRow] = field(default_factory=list)
    is_end: bool = False


class ArithmeticTrainer:
    """See the module."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Running] = {}
        self._slice_seconds = float(os.environ.get("ARITHMETIC_SLICE_SECONDS", "0"))
        self.num_slices = 0

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def estimate(self, plan: TrainingPlan) -> TrainingEstimate:
        rows = [row for batch, _ in batches(plan) for row in batch]
        num_tokens = sum(len(row.token_ids) for row in rows)
        padded = sum(-(-len(row.token_ids) // PADDED_TOKENS) * PADDED_TOKENS for row in rows)
        return TrainingEstimate(num_tokens, padded, len(rows) * self._slice_seconds)

    def begin(self, plan: TrainingPlan, checkpoint: bytes | None = None) -> int:
        assert plan.job not in self._jobs, "it has begun"
        if any(RAISE_AT_BEGIN in row.token_ids for row in plan.rows):
            raise RuntimeError("beginning failed")
        job = _Running(plan, 0)
        if plan.initial is not None:
            job.number = _opened(plan.initial)["number"]
        if checkpoint is not None:
            kept = json.loads(checkpoint)
            if kept["plan"] != _digest(plan):
                raise AdapterUnfit("The checkpoint is of another job.")
            job.number, job.step = kept["number"], kept["step"]
            # What followed this step may not have been heard of.
            done = [is_end for _, is_end in itertools.islice(batches(plan), job.step)]
            job.was_evaluated = not (job.step == plan.num_steps or done[-1])
        job.batches = itertools.islice(batches(plan), job.step, None)
        self._jobs[plan.job] = job
        return job.step

    def advance(self) -> Sequence[TrainingEvent]:
        self.num_slices += 1
        events: list[TrainingEvent] = []
        running = list(self._jobs.values())
        time.sleep(self._slice_seconds if running else 0.0)
        for job in running:
            job.shared += len(running) - 1
            events += self._advanced(job)
        return events

    def adapter(self, job: str) -> bytes:
        running = self._jobs[job]
        return adapter_bytes(form_of(running.plan), running.number)

    def checkpoint(self, job: str) -> bytes:
        running = self._jobs[job]
        kept = {"plan": _digest(running.plan), "step": running.step, "number": running.number}
        return json.dumps(kept).encode()

    def drop(self, job: str) -> None:
        self._jobs.pop(job, None)

    def _advanced(self, job: _Running) -> list[TrainingEvent]:
        plan = job.plan
        if not job.was_evaluated:
            job.was_evaluated = True
            return self._evaluated(job)
        if job.step == plan.num_steps:
            return [JobDone(plan.job)]
        if job.row == 0:
            job.rows, job.is_end = next(job.batches)
        rows = job.rows
        row = rows[job.row]
        if LOSS_NOT_FINITE in row.token_ids:
            return [JobFailed(plan.job, "non_finite_loss", f"At step {job.step + 1}.")]
        if OUT_OF_MEMORY in row.token_ids:
            return [JobFailed(plan.job, "out_of_memory", f"At step {job.step + 1}.")]
        if RAISE in row.token_ids:
            raise RuntimeError("the slice failed")
        job.added += learned(row)
        job.row += 1
        if job.row < len(rows):
            return []
        now = time.monotonic()
        loss, job.step = job.number / MODULUS, job.step + 1
        job.number = (31 * job.number + plan.seed + job.step + job.added) % MODULUS
        num_tokens = sum(len(each.token_ids) for each in rows)
        done = StepDone(
            *(plan.job, job.step, loss, plan.learning_rate, 1.0, num_tokens),
            *(now - job.began, job.shared),
        )
        job.row = job.added = job.shared = 0
        job.began = now
        is_last = job.step == plan.num_steps
        return [done, *(self._evaluated(job) if job.is_end or is_last else [])]

    def _evaluated(self, job: _Running) -> list[TrainingEvent]:
        if not job.plan.validation:
            return []
        loss = (job.number + sum(map(learned, job.plan.validation))) % MODULUS / MODULUS
        return [EvalDone(job.plan.job, job.step, loss)]


class ArithmeticAdapters:
    """What the engine has for files of adapters."""

    def open_adapter(self, content: bytes) -> int:
        number = _opened(content)["number"]
        assert isinstance(number, int)
        return number

    def adapter_form(self, content: bytes) -> AdapterForm:
        form = _opened(content)
        del form["number"]
        return replace(AdapterForm(**form), targets=tuple(form["targets"]))

    def import_adapter(self, path: Path, format: str) -> bytes:
        words = path.read_text().split()
        if len(words) == 1:
            words = ["keras", *words]
        if len(words) != 2 or words[0] != format or not words[1].isdecimal():
            raise AdapterUnfit(f"{path.name} is no {format} file.")
        form = AdapterForm(words[0], 8, 8.0, ("query", "value"))
        return adapter_bytes(form, int(words[1]))

    def import_named_adapter(self, path: Path, digest: str) -> bytes:
        content = path.read_bytes()
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
            raise AdapterUnfit(f"{path} has changed since it was named.")
        if content.startswith(b"{"):
            return content
        layout, *number = content.decode().split()
        return self.import_adapter(path, layout if number else "keras")

    def export_adapter(self, content: bytes, path: Path, format: str) -> None:
        if format != self.adapter_form(content).layout:
            raise AdapterUnfit("An adapter of this rank is not written in the other layout.")
        path.write_text(f"{format} {self.open_adapter(content)}\n")
