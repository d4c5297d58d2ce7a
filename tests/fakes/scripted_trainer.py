"""A worker's answers about jobs and versions, in this process and from a script of a few numbers.

The loss of step n is 10 - n, the validation loss after it 20 - n. What step n of a job leaves is a
file that holds the job's seed, its first row and n, so that its digest depends on nothing else.
"""

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path

from service.protocol.messages import AdapterSource
from service.protocol.training import (
    AdapterExported,
    AdapterFailed,
    AdapterImported,
    AdapterSaved,
    AddAdapter,
    CancelJob,
    ExportAdapter,
    FieldError,
    ForgetAdapter,
    Form,
    ImportAdapter,
    JobEnded,
    JobEval,
    JobPrepared,
    JobRefused,
    JobStep,
    JobVersion,
    PrepareJob,
    RowTokens,
    SaveAdapter,
    StartJob,
    TextRow,
    TrainingCommand,
    TrainingEvent,
)

NUM_TOKENS = 7
NUM_ROWS = 3
FORM = Form("peft", 4, 8.0, ("query",))


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class ScriptedTrainer:
    """Answers commands as they are sent; a job makes a step each time `step` is called.

    Args:
        deliver: Takes its events.
    """

    def __init__(self, deliver: Callable[[TrainingEvent], None]) -> None:
        self.deliver = deliver
        self.commands: list[TrainingCommand] = []
        self.jobs: dict[str, PrepareJob] = {}
        self.started: dict[str, StartJob] = {}
        self.steps: dict[str, int] = {}
        self.memory: dict[str, bytes] = {}
        self.disk: dict[str, str] = {}
        # Set to refuse to save.
        self.save_failure: str | None = None

    def send(self, command: TrainingCommand) -> None:
        self.commands.append(command)
        asyncio.get_running_loop().call_soon(self._take, command)

    def _take(self, command: TrainingCommand) -> None:
        match command:
            case PrepareJob():
                self.deliver(self._prepared(command))
            case StartJob(job_id=job_id):
                self.started[job_id] = command
                self.steps[job_id] = 0
                if self.jobs[job_id].validation:
                    self.deliver(JobEval(job_id, 0, 20.0))
            case CancelJob(job_id=job_id):
                if self.started.pop(job_id, None) is not None:
                    self.deliver(JobEnded(job_id, "cancelled", self.steps[job_id]))
                self.jobs.pop(job_id, None)
            case SaveAdapter(request_id=request_id, digest=digest, folder=folder):
                if self.save_failure is not None:
                    self.deliver(AdapterFailed(request_id, self.save_failure, "no room"))
                    return
                path = Path(folder) / "adapter"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(self.memory[digest])
                self.disk[digest] = str(path)
                self.deliver(AdapterSaved(request_id, AdapterSource(digest, str(path))))
            case ForgetAdapter(digest=digest):
                self.memory.pop(digest, None)
                self.disk.pop(digest, None)
            case AddAdapter(source=source):
                self.disk[source.digest] = source.path
            case ImportAdapter(request_id=request_id, path=path):
                self.deliver(self._imported(request_id, Path(path).read_bytes()))
            case ExportAdapter(request_id=request_id, digest=digest, path=path):
                content = self.memory.get(digest) or Path(self.disk[digest]).read_bytes()
                Path(path).write_bytes(content)
                self.deliver(AdapterExported(request_id, len(content)))

    def _prepared(self, command: PrepareJob) -> TrainingEvent:
        self.jobs[command.job_id] = command
        if TextRow("") in command.rows:
            pointer = f"/data/{command.rows.index(TextRow(''))}"
            error = FieldError(pointer, "has no token to learn")
            return JobRefused(command.job_id, "invalid_field", "A row is not right.", (error,))
        num_steps = self.num_steps(command)
        row = RowTokens((0, 1), ("a", "b"), (0, 1))
        return JobPrepared(command.job_id, num_steps, 100, 128, 2.5, (row,))

    @staticmethod
    def num_steps(command: PrepareJob) -> int:
        told = command.hyperparameters
        per_epoch = -(-len(command.rows) // told.batch_size)
        return told.steps or per_epoch * (told.epochs or 0)

    def _imported(self, request_id: str, content: bytes) -> TrainingEvent:
        if content.startswith(b"bad"):
            return AdapterFailed(request_id, "invalid_field", "The file is no adapter.")
        self.memory[digest_of(content)] = content
        return AdapterImported(request_id, digest_of(content), FORM, len(content))

    def step(self, job_id: str, num_steps: int = 1) -> None:
        """The job makes some steps, and what follows from them."""
        command = self.jobs[job_id]
        last = self.num_steps(command)
        every = self.started[job_id].publish_every
        for _ in range(num_steps):
            self.steps[job_id] += 1
            step = self.steps[job_id]
            told = JobStep(job_id, step, 10.0 - step, 1e-3, 0.5, NUM_TOKENS, 70.0, 0, NUM_ROWS)
            self.deliver(told)
            is_last = step == last
            if command.validation and is_last:
                self.deliver(JobEval(job_id, step, 20.0 - step))
            if step % every == 0 or is_last:
                content = f"{command.hyperparameters.seed} {command.rows[0]} {step}".encode()
                self.memory[digest_of(content)] = content
                size = len(content)
                self.deliver(JobVersion(job_id, step, digest_of(content), size, is_last))
            if is_last:
                del self.started[job_id]
                self.deliver(JobEnded(job_id, "succeeded", step))
