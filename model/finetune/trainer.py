"""The trainer of an engine: micro-batches of all jobs' rows, a slice at a time.

The job that was served least, in tokens of micro-batches, is next, and others fill up what room its
rows leave. A job goes on to its next step when all rows of this one are back. If a number is not
finite, the jobs that shared the micro-batch make their step again, each by itself; so who fails is
who is not finite alone.
"""

import logging
import time
from collections.abc import Generator, Sequence

import jax
import numpy as np

from model.adapter_file import read_adapter
from model.config import GemmaConfig
from model.errors import AdapterUnfit, PresetFileInvalid
from model.finetune.checkpoint import read_checkpoint, write_checkpoint
from model.finetune.job import Job, RowWork
from model.finetune.micro_batch import (
    HEAD_PLACES,
    ByHead,
    Losses,
    MicroBatch,
    MicroBatches,
    RunSeconds,
)
from model.finetune.optimizers import AdamW, Optimizer
from model.finetune.pairs import first_adapter, named
from model.finetune.row_order import (
    MAX_ADAPTERS,
    MICRO_BATCH_TOKENS,
    num_measured,
    num_tokens_of,
    room_of,
    rows_of_step,
    size_of,
)
from model.lora_adapter import LoraAdapter, LoraForm
from model.training import (
    MAX_ROW_TOKENS,
    JobDone,
    JobFailed,
    TrainingEstimate,
    TrainingEvent,
    TrainingPlan,
    TrainingRow,
)

# A slice ends with the piece in which this is reached.
_SLICE_SECONDS = 0.02
# How XLA says that an allocation failed.
_NO_ROOM = "RESOURCE_EXHAUSTED"
# Steps that an estimate looks at one by one.
_ESTIMATED_STEPS = 64

Chosen = list[tuple[Job, RowWork]]

_logger = logging.getLogger(__name__)


class SlicedTrainer:
    """A `model.training.Trainer`.

    Args:
        config: Of the model.
        batches: Of the engine.
        max_rank: That a pair may have.
        optimizer: Which moves all jobs' weights.
    """

    def __init__(
        self,
        config: GemmaConfig,
        batches: MicroBatches,
        *,
        max_rank: int,
        optimizer: Optimizer | None = None,
    ) -> None:
        self._config = config
        self._batches = batches
        self._max_rank = max_rank
        self._optimizer = AdamW() if optimizer is None else optimizer
        self._jobs: dict[str, Job] = {}
        self._ended: set[str] = set()
        self._events: list[TrainingEvent] = []
        self._running: Generator[None, None, None] | None = None
        self._chosen: Chosen = []
        self._seconds = dict.fromkeys(MICRO_BATCH_TOKENS, RunSeconds(0.0, 0.0, 0.0))

    @property
    def num_jobs(self) -> int:
        """That have begun and are not done."""
        return len(self._jobs) - len(self._ended)

    def warm_up(self) -> None:
        """Runs every program, and takes the times of which estimates are made."""
        form = LoraForm("keras", 1, 1.0, ("query",))
        adapter = first_adapter(self._config, form, 0).for_bank(self._config)
        for size in MICRO_BATCH_TOKENS:
            self._seconds[size] = self._batches.warm_up(size, adapter)

    def estimate(self, plan: TrainingPlan) -> TrainingEstimate:
        """From steps at the beginning, each by itself."""
        seen, padded, seconds = 0, 0, 0.0
        for step in range(1, min(plan.num_steps, _ESTIMATED_STEPS) + 1):
            rows = [plan.rows[index] for index in rows_of_step(plan, step)]
            seen += sum(len(row.token_ids) for row in rows)
            padded += sum(size for size, _ in _micro_batches(rows))
            seconds += self._seconds_of(rows, goes_back=True)
        num_tokens = num_tokens_of(plan)
        scale = num_tokens / max(seen, 1)
        measuring = self._seconds_of(plan.validation, goes_back=False) * num_measured(plan)
        return TrainingEstimate(num_tokens, round(padded * scale), seconds * scale + measuring)

    def _seconds_of(self, rows: Sequence[TrainingRow], *, goes_back: bool) -> float:
        """Of rows that share with nobody."""
        seconds = 0.0
        for size, num_trained in _micro_batches(rows):
            own = self._seconds[size]
            seconds += own.forward + -(-num_trained // HEAD_PLACES) * own.head
            if goes_back:
                seconds += own.backward
        return seconds

    def begin(self, plan: TrainingPlan, checkpoint: bytes | None = None) -> int:
        """Takes a job in; see `model.training.Trainer`."""
        form = LoraForm(plan.layout, plan.rank, float(plan.alpha), tuple(sorted(plan.targets)))
        self._check(plan)
        step = 0
        if checkpoint is not None:
            count = self._optimizer.num_moments
            adapter, moments, step = read_checkpoint(checkpoint, self._config, count)
        else:
            if plan.initial is None:
                adapter = first_adapter(self._config, form, plan.seed)
            else:
                adapter = self._read(plan.initial)
            moments = {
                name: (np.zeros_like(array),) * self._optimizer.num_moments
                for name, array in named(adapter.pairs).items()
            }
        if adapter.form != form:
            raise AdapterUnfit(f"The adapter is {adapter.form}, the job trains {form}.")
        job = Job(plan, self._config, self._optimizer, adapter, moments, step)
        # Nobody who comes later is served first for long.
        job.tokens_served = min((each.tokens_served for each in self._live()), default=0)
        self._jobs[plan.job] = job
        self._note(job, job.begin())
        return step

    def _check(self, plan: TrainingPlan) -> None:
        if plan.rank > self._max_rank:
            raise AdapterUnfit(
                f"An adapter of rank {plan.rank} needs --adapter-max-rank {plan.rank}; it is "
                f"{self._max_rank}."
            )
        longest = max(len(row.token_ids) for row in (*plan.rows, *plan.validation))
        if longest > MAX_ROW_TOKENS:
            raise AdapterUnfit(
                f"A row of {longest} tokens cannot be trained on; the longest has {MAX_ROW_TOKENS}."
            )

    def _read(self, content: bytes) -> LoraAdapter:
        try:
            return read_adapter(content, self._config)
        except PresetFileInvalid as error:
            raise AdapterUnfit(str(error)) from error

    def advance(self) -> Sequence[TrainingEvent]:
        """One slice; nothing if no job has work."""
        began = time.monotonic()
        while not self._events and time.monotonic() - began < _SLICE_SECONDS:
            if self._running is None:
                self._chosen = self._choose()
                if not self._chosen:
                    break
                self._running = self._run(self._chosen)
            try:
                next(self._running)
            except StopIteration:
                self._running = None
            except Exception as error:
                self._fail_chosen(error)
        events, self._events = self._events, []
        return events

    def adapter(self, job: str) -> bytes:
        """File of what the last whole step left."""
        return self._jobs[job].file()

    def checkpoint(self, job: str) -> bytes:
        """All that is needed to go on after the last whole step."""
        found = self._jobs[job]
        return write_checkpoint(found.adapter, found.moments, found.step)

    def drop(self, job: str) -> None:
        """Lets go of a job."""
        self._jobs.pop(job, None)
        self._ended.discard(job)
        if self._running is not None and not any(self._is_live(each) for each, _ in self._chosen):
            self._running.close()
            self._running = None

    def _live(self) -> list[Job]:
        return [job for name, job in self._jobs.items() if name not in self._ended]

    def _is_live(self, job: Job) -> bool:
        return self._jobs.get(job.plan.job) is job and job.plan.job not in self._ended

    def _note(self, job: Job, events: list[TrainingEvent]) -> None:
        self._events += events
        if events and isinstance(events[-1], JobDone | JobFailed):
            self._ended.add(job.plan.job)

    def _fail_chosen(self, error: Exception) -> None:
        """Whoever was in the micro-batch; nothing of anybody else was touched."""
        self._running = None
        for job in _jobs_of(self._chosen):
            if self._is_live(job):
                self._note(job, [_failure(job, error)])

    def _choose(self) -> Chosen:
        """Rows of the next micro-batch, the longest rooms first; they are no longer waiting."""
        jobs = sorted(
            (job for job in self._live() if job.waiting), key=lambda job: job.tokens_served
        )
        if not jobs:
            return []
        first = jobs[0]
        jobs = [
            job
            for job in jobs
            if job is first
            or (job.is_evaluating == first.is_evaluating and not (first.is_alone or job.is_alone))
        ][:MAX_ADAPTERS]
        chosen: Chosen = []
        size = room = size_of(first.waiting[0].row)
        is_open = True
        while is_open:
            is_open = False
            for job in jobs:
                works = (each for each in job.waiting if size_of(each.row) == size)
                work = next((each for each in works if room_of(each.row) <= room), None)
                if work is not None:
                    job.waiting.remove(work)
                    chosen.append((job, work))
                    room -= room_of(work.row)
                    job.tokens_served += room_of(work.row)
                    is_open = True
        # Stable: rows of one job and room stay in their order.
        return sorted(chosen, key=lambda each: -room_of(each[1].row))

    def _run(self, chosen: Chosen) -> Generator[None, None, None]:
        jobs = _jobs_of(chosen)
        adapters = [job.for_programs for job in jobs]
        assert all(adapter is not None for adapter in adapters), "a job that has begun"
        batch = MicroBatch(
            [work.row for _, work in chosen],
            [adapter for adapter in adapters if adapter is not None],
            [next(i for i, each in enumerate(jobs) if each is job) for job, _ in chosen],
            wants_gradient=not jobs[0].is_evaluating,
        )
        is_finite = True

        def take(layer: int, row: int, target: str, by_head: ByHead) -> None:
            nonlocal is_finite
            is_finite = is_finite and all(np.isfinite(each).all() for each in by_head)
            job, work = chosen[row]
            job.add(work, layer, target, by_head)

        losses: Losses = yield from self._batches.run(batch, take)
        is_finite = is_finite and all(np.isfinite(each).all() for each in losses)
        if not is_finite and len(jobs) > 1:
            for job in jobs:
                job.again_alone()
            return
        for (job, work), of_row in zip(chosen, losses, strict=True):
            job.losses[work.number] = of_row
            job.rows_shared += sum(other is not job for other, _ in chosen)
        if not is_finite:
            [job] = jobs
            if self._is_live(job):
                detail = f"The loss or its gradient is not finite at step {job.step + 1}."
                self._note(job, [JobFailed(job.plan.job, "non_finite_loss", detail)])
            return
        for job in jobs:
            if job.is_complete and self._is_live(job):
                yield
                self._note(job, job.finish())


def _failure(job: Job, error: Exception) -> JobFailed:
    is_of_device = isinstance(error, jax.errors.JaxRuntimeError) and _NO_ROOM in str(error)
    if isinstance(error, MemoryError) or is_of_device:
        _logger.warning("job %s: %s", job.plan.job, error)
        detail = f"There was not enough memory for step {job.step + 1}."
        return JobFailed(job.plan.job, "out_of_memory", detail)
    _logger.error("job %s failed", job.plan.job, exc_info=error)
    detail = f"Step {job.step + 1} failed. The log has the details."
    return JobFailed(job.plan.job, "internal", detail)


def _jobs_of(chosen: Chosen) -> list[Job]:
    jobs: list[Job] = []
    for job, _ in chosen:
        if not any(job is each for each in jobs):
            jobs.append(job)
    return jobs


def _micro_batches(rows: Sequence[TrainingRow]) -> list[tuple[int, int]]:
    """Size and trained tokens of each micro-batch of a step, if nobody shares them."""
    found = []
    for size in MICRO_BATCH_TOKENS:
        own = [row for row in rows if size_of(row) == size]
        # In rooms that are powers of two none is left over.
        count = -(-sum(map(room_of, own)) // size)
        num_trained = sum(sum(row.is_trained) for row in own)
        found += [(size, -(-num_trained // count)) for _ in range(count)]
    return found
