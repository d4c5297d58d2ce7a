"""Jobs that train, a slice at a time: what the loop does when it is their turn.

A job that is started looks for a checkpoint and goes on from it::

    prepared -> start -> looking -> training -> ended
                                    |      ^
                                    v      |
                                     paused          its checkpoint cannot be written

A checkpoint is taken between two steps, when enough time has passed since the last one, and written
by another thread while the job goes on. If there is no room for it, the job leaves the trainer;
what it was is kept here until it can be written, and goes back into the trainer then.

When the service stops, all jobs are halted: they leave the trainer, what each is at is written, and
the next worker goes on from there.

Whatever else ends a job, it is said once, and only when nothing of it is being written any more: so
its folder may be removed then.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.errors import ModelError
from model.training import (
    EvalDone,
    JobDone,
    JobFailed,
    StepDone,
    Trainer,
    TrainingEstimate,
    TrainingEvent as Trained,
    TrainingPlan,
)
from service.protocol.training import (
    JobEnd,
    JobEnded,
    JobEval,
    JobPaused,
    JobsHalted,
    JobStep,
    JobVersion,
    StartJob,
    TrainingEvent,
)
from service.worker.adapter_store import AdapterStore
from service.worker.checkpoints import is_full
from service.worker.file_work import CheckpointRead, CheckpointWritten, FileResult, FileWork
from service.worker.work_done import WorkDone

log = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A job that may be started."""

    plan: TrainingPlan
    estimate: TrainingEstimate


@dataclass(slots=True, eq=False)
class _Job:
    """A job that was started and has not ended.

    Attributes:
        prepared: What it does.
        folder: For its checkpoints.
        publish_every: Steps from one version to the next; 0: only the last one.
        step: That is done.
        is_training: Whether the trainer has it.
        checked_at: When its last checkpoint was taken, in monotonic seconds.
        checked_step: Of that one, or of the one that it went on from.
        is_writing: Whether that is being written.
        held: What it was when it was paused.
        retry_at: When that is written again.
        end: How it ends as soon as nothing is being written.
    """

    prepared: PreparedJob
    folder: Path
    publish_every: int
    step: int = 0
    is_training: bool = False
    checked_at: float = 0.0
    checked_step: int = 0
    is_writing: bool = False
    held: bytes | None = None
    retry_at: float = 0.0
    end: JobEnded | None = None

    @property
    def plan(self) -> TrainingPlan:
        return self.prepared.plan

    @property
    def publishes_now(self) -> bool:
        """Whether the step that is done makes a version. The last one does when it is evaluated."""
        is_between = 0 < self.step < self.plan.num_steps
        return is_between and self.publish_every > 0 and self.step % self.publish_every == 0


class TrainingDesk:
    """All jobs of one worker.

    Args:
        trainer: Does the work; None: there are no jobs.
        store: Takes versions.
        work: Counts tokens.
        files: Writes and reads checkpoints.
        checkpoint_seconds: Of work that a crash may cost a job, beside the step it is at.
        retry_seconds: From one attempt to write to the next.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        trainer: Trainer | None,
        store: AdapterStore,
        work: WorkDone,
        files: FileWork,
        *,
        checkpoint_seconds: float,
        retry_seconds: float = _RETRY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainer = trainer
        self._store = store
        self._work = work
        self._files = files
        self._checkpoint_seconds = checkpoint_seconds
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._prepared: dict[str, PreparedJob] = {}
        self._jobs: dict[str, _Job] = {}
        self._seconds = 0.0
        self._is_halted = False
        # Who waits until everything is written.
        self._halting: str | None = None

    @property
    def has_work(self) -> bool:
        """Whether a slice would do anything."""
        return any(job.is_training for job in self._jobs.values())

    @property
    def seconds(self) -> float:
        """That jobs trained since the worker started."""
        return self._seconds

    def add(self, prepared: PreparedJob) -> None:
        """A job may be started from now on."""
        self._prepared[prepared.plan.job] = prepared

    def start(self, command: StartJob) -> Sequence[TrainingEvent]:
        """Begins a job; one that goes on already just does."""
        if command.job_id in self._jobs:
            return []
        prepared = self._prepared.pop(command.job_id, None)
        if prepared is None:
            detail = "The job was not prepared."
            return [JobEnded(command.job_id, "failed", 0, "internal", detail)]
        job = _Job(prepared, Path(command.folder), command.publish_every)
        self._jobs[command.job_id] = job
        self._files.read(job, job.folder, command.last_step)
        return []

    def cancel(self, job_id: str) -> Sequence[TrainingEvent]:
        """Ends a job, or forgets one that is prepared."""
        self._prepared.pop(job_id, None)
        if job := self._jobs.get(job_id):
            return self._end(job, "cancelled", "cancelled", "The job was cancelled.")
        return []

    def halt(self, request_id: str) -> Sequence[TrainingEvent]:
        """Nothing trains from now on; the answer comes when what was done lasts."""
        self._is_halted, self._halting = True, request_id
        for job in self._jobs.values():
            if job.is_training and job.step > job.checked_step:
                job.held = self._checkpoint(job)
            self._leave(job)
            if job.held is not None and not job.is_writing:
                self._write(job, job.held)
        return self._say_halted()

    def take(self, result: FileResult) -> Sequence[TrainingEvent]:
        """Goes on with what came of reading or writing."""
        job: _Job = result.job
        if job is not self._jobs.get(job.plan.job):
            return []
        if isinstance(result, CheckpointRead):
            return self._begin(job, result)
        return self._written(job, result)

    def retry(self) -> None:
        """Tries to write again what could not be written, if enough time has passed."""
        now = self._clock()
        for job in self._jobs.values():
            if job.held is not None and not job.is_writing and job.retry_at <= now:
                self._write(job, job.held)

    def step(self, until: float) -> Sequence[TrainingEvent]:
        """Slices, at least one, up to about ``until`` (monotonic seconds)."""
        assert self._trainer is not None, "a job trains"
        events: list[TrainingEvent] = []
        longest, began = 0.0, self._clock()
        while self.has_work:
            for event in self._advance(self._trainer):
                events += self._taken(event)
            now = self._clock()
            self._seconds += now - began
            longest = max(longest, now - began)
            began = now
            if now + longest > until:
                break
        return events

    def _advance(self, trainer: Trainer) -> Sequence[Trained]:
        """One slice. Whatever it raises it would raise again, here and in a new process, if the
        jobs stayed; so they end, and others are served.
        """
        try:
            return trainer.advance()
        except Exception:
            log.exception("a slice of training failed")
            detail = "Training failed. The log has the details."
            jobs = [job for job in self._jobs.values() if job.is_training]
            return [JobFailed(job.plan.job, "internal", detail) for job in jobs]

    def _begin(self, job: _Job, found: CheckpointRead) -> Sequence[TrainingEvent]:
        """The folder was looked into."""
        if self._is_halted:
            return []
        if found.error is not None:
            return self._fail_storage(job, found.error)
        return self._enter(job, found.content)

    def _enter(self, job: _Job, content: bytes | None) -> Sequence[TrainingEvent]:
        """Gives a job to the trainer."""
        assert self._trainer is not None, "it was prepared"
        try:
            job.step = self._trainer.begin(job.plan, content)
        except ModelError as error:
            code = "internal" if content is None else "storage_error"
            return self._end(job, "failed", code, str(error))
        except Exception:
            log.exception("job %s cannot begin", job.plan.job)
            detail = "Training could not begin. The log has the details."
            return self._end(job, "failed", "internal", detail)
        job.is_training = True
        job.checked_at, job.checked_step = self._clock(), job.step
        # Its version may not have been heard of, and was in memory only.
        return [self._publish(job, is_last=False)] if job.publishes_now else []

    def _taken(self, event: Trained) -> Sequence[TrainingEvent]:
        job = self._jobs[event.job]
        match event:
            case StepDone():
                return self._stepped(job, event)
            case EvalDone():
                return [JobEval(event.job, event.step, event.valid_loss)]
            case JobDone():
                version = self._publish(job, is_last=True)
                return [version, *self._end(job, "succeeded")]
            case JobFailed():
                return self._end(job, "failed", event.code, event.detail)

    def _stepped(self, job: _Job, done: StepDone) -> Sequence[TrainingEvent]:
        job.step = done.step
        self._work.note_training(done.num_tokens, _padding(job, done.step))
        events: list[TrainingEvent] = [
            JobStep(
                job_id=done.job,
                step=done.step,
                loss=done.loss,
                learning_rate=done.learning_rate,
                grad_norm=done.grad_norm,
                num_tokens=done.num_tokens,
                tokens_per_second=done.num_tokens / done.seconds if done.seconds > 0 else 0.0,
                rows_shared=done.rows_shared,
                num_rows=_num_rows(job, done.step),
            )
        ]
        if job.publishes_now:
            events.append(self._publish(job, is_last=False))
        is_due = self._clock() - job.checked_at >= self._checkpoint_seconds
        if is_due and not job.is_writing:
            self._write(job, self._checkpoint(job))
        return events

    def _publish(self, job: _Job, *, is_last: bool) -> JobVersion:
        """Makes a version of what the last step left, which may be asked for at once."""
        assert self._trainer is not None, "a job trains"
        content = self._trainer.adapter(job.plan.job)
        digest = self._store.add_content(content)
        return JobVersion(job.plan.job, job.step, digest, len(content), is_last)

    def _checkpoint(self, job: _Job) -> bytes:
        assert self._trainer is not None, "a job trains"
        return self._trainer.checkpoint(job.plan.job)

    def _write(self, job: _Job, content: bytes) -> None:
        job.is_writing = True
        job.checked_at, job.checked_step = self._clock(), job.step
        self._files.write(job, job.folder, job.step, content)

    def _written(self, job: _Job, result: CheckpointWritten) -> Sequence[TrainingEvent]:
        job.is_writing = False
        if job.end is not None:
            return [*self._say_end(job), *self._say_halted()]
        if self._is_halted:
            return self._written_last(job, result)
        if result.error is None:
            if job.held is None:
                return []
            content, job.held = job.held, None
            return self._enter(job, content)
        if not is_full(result.error):
            return self._fail_storage(job, result.error)
        job.retry_at = self._clock() + self._retry_seconds
        if job.held is not None:
            return []
        job.held = self._checkpoint(job)
        self._leave(job)
        log.error("job %s cannot write its checkpoint: %s", job.plan.job, result.error)
        detail = f"There is no room for its checkpoint: {result.error.strerror}."
        return [JobPaused(job.plan.job, detail)]

    def _written_last(self, job: _Job, result: CheckpointWritten) -> Sequence[TrainingEvent]:
        """While it is halted; what was being written then may be of a step before."""
        if result.error is not None:
            log.error("job %s cannot write its checkpoint: %s", job.plan.job, result.error)
        if job.held is not None and job.checked_step < job.step:
            self._write(job, job.held)
        else:
            job.held = None
        return self._say_halted()

    def _say_halted(self) -> Sequence[TrainingEvent]:
        if self._halting is None or any(job.is_writing for job in self._jobs.values()):
            return []
        request_id, self._halting = self._halting, None
        return [JobsHalted(request_id)]

    def _fail_storage(self, job: _Job, error: OSError) -> Sequence[TrainingEvent]:
        log.error("checkpoints of job %s cannot be used: %s", job.plan.job, error)
        detail = f"Its checkpoints cannot be written or read: {error.strerror}."
        return self._end(job, "failed", "storage_error", detail)

    def _leave(self, job: _Job) -> None:
        """The trainer lets go of a job."""
        if job.is_training:
            assert self._trainer is not None, "a job trains"
            self._trainer.drop(job.plan.job)
            job.is_training = False

    def _end(
        self, job: _Job, end: JobEnd, code: str | None = None, detail: str | None = None
    ) -> Sequence[TrainingEvent]:
        """It is over; said now, or when nothing is being written any more."""
        self._leave(job)
        job.end = job.end or JobEnded(job.plan.job, end, job.step, code, detail)
        return [] if job.is_writing else self._say_end(job)

    def _say_end(self, job: _Job) -> Sequence[TrainingEvent]:
        assert job.end is not None, "it is over"
        del self._jobs[job.plan.job]
        return [job.end]


def _num_rows(job: _Job, step: int) -> int:
    """Of one step: a batch, or what is left of an epoch."""
    plan = job.plan
    num_steps_of_epoch = -(-len(plan.rows) // plan.batch_size)
    first = (step - 1) % num_steps_of_epoch * plan.batch_size
    return min(plan.batch_size, len(plan.rows) - first)


def _padding(job: _Job, step: int) -> int:
    """What filled up the shapes of one step: the plan's, if no other job shared them, spread evenly
    over its steps.
    """
    estimate, num_steps = job.prepared.estimate, job.plan.num_steps
    total = estimate.num_padded_tokens - estimate.num_tokens
    return total * step // num_steps - total * (step - 1) // num_steps
