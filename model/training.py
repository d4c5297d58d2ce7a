"""What a trainer does, in plain Python: the interface between training turns and a model.

A trainer belongs to an engine and shares its weights. It holds any number of jobs, whose rows share
micro-batches, and does a *slice* of the work each time it is asked: never more than about one
decode step takes. What a job ends with depends on its own plan only, to the last bit: not on other
jobs, not on who is served meanwhile, and not on how often it was interrupted and resumed.

    begin(plan)                 or begin(plan, checkpoint)
    advance(), advance(), ...   events come from some of them
    adapter(job)                after a `StepDone`: the weights it left, as the bytes of a file
    checkpoint(job)             the same, with all that is needed to go on
    drop(job)                   after its `JobDone` or `JobFailed`, or at any time before

Only the standard library is imported here, so that a fake trainer is a few lines of integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

Schedule = Literal["constant", "linear", "cosine"]
Layout = Literal["keras", "peft"]

# Tokens that a row may have at most.
MAX_ROW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One text.

    Attributes:
        token_ids: All of it, ``<bos>`` and end included; at most `MAX_ROW_TOKENS`.
        is_trained: Which of them are to be predicted; never the first.
    """

    token_ids: tuple[int, ...]
    is_trained: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """All that decides what a job makes.

    Rows are taken in an order drawn anew for each epoch from (seed, epoch); a step takes
    ``batch_size`` of them, and what is left at the end of an epoch makes a smaller step. The loss
    of a step is the mean over its trained tokens.

    Attributes:
        job: Names it.
        rows: To learn from; each has a trained token.
        validation: To measure on, at the end of each epoch and of the job.
        num_steps: Of the optimizer.
        layout: Which heads share what (`model.lora_adapter`).
        rank: Of every pair.
        alpha: What is added is multiplied by alpha / rank.
        targets: Projections that are adapted.
        batch_size: Rows of a step.
        learning_rate: At its highest.
        schedule: How it goes on after the warm-up: level, or down to 0, which it would
            reach one step after the last.
        warmup_steps: In which it rises from 0.
        weight_decay: Of AdamW, multiplied by the learning rate.
        grad_clip: Greatest norm of the gradient of all pairs together; None: as it is.
        seed: Of the first A, and of the order of rows.
        initial: File of the adapter to go on from, as `Trainer.adapter` gives it; None: B is zero.
    """

    job: str
    rows: tuple[TrainingRow, ...]
    validation: tuple[TrainingRow, ...]
    num_steps: int
    layout: Layout
    rank: int
    alpha: float
    targets: tuple[str, ...]
    batch_size: int
    learning_rate: float
    schedule: Schedule
    warmup_steps: int
    weight_decay: float
    grad_clip: float | None
    seed: int
    initial: bytes | None = None


@dataclass(frozen=True, slots=True)
class TrainingEstimate:
    """What a plan will take.

    Attributes:
        num_tokens: Of all steps, as they are.
        num_padded_tokens: With what fills up the shapes, if no other job shares them.
        seconds: If nobody else is served.
    """

    num_tokens: int
    num_padded_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepDone:
    """The optimizer made a step; ``step`` counts from 1.

    Attributes:
        job: Whose.
        step: That is done.
        loss: Before it, the mean over its trained tokens.
        learning_rate: That it used.
        grad_norm: Before it was clipped.
        num_tokens: Of its rows.
        seconds: Since the step before, or since the job began.
        rows_shared: Rows of other jobs that stood in its micro-batches.
    """

    job: str
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    seconds: float
    rows_shared: int


@dataclass(frozen=True, slots=True)
class EvalDone:
    """The loss of the validation rows after a step; 0 is before the first one.

    It comes before the first step, at the end of each epoch, and after the last step.
    """

    job: str
    step: int
    valid_loss: float


@dataclass(frozen=True, slots=True)
class JobDone:
    """All steps are done, and the last `EvalDone` has come."""

    job: str


@dataclass(frozen=True, slots=True)
class JobFailed:
    """It cannot go on; what the step before left can still be read.

    ``internal`` is a bug, whose traceback the log has.
    """

    job: str
    code: Literal["non_finite_loss", "out_of_memory", "internal"]
    detail: str


TrainingEvent = StepDone | EvalDone | JobDone | JobFailed


@runtime_checkable
class Trainer(Protocol):
    """Trains adapters. The thread that calls its engine calls it."""

    @property
    def num_jobs(self) -> int:
        """That have begun and are not done."""

    def estimate(self, plan: TrainingPlan) -> TrainingEstimate:
        """What a plan will take. Any thread may ask."""

    def begin(self, plan: TrainingPlan, checkpoint: bytes | None = None) -> int:
        """Takes a job in; returns the number of steps that are done.

        Raises:
            AdapterUnfit: The initial adapter or the checkpoint is of another form or model.
        """

    def advance(self) -> Sequence[TrainingEvent]:
        """One slice; nothing if no job has work."""

    def adapter(self, job: str) -> bytes:
        """File of what the last whole step left; the same bytes whenever it is asked."""

    def checkpoint(self, job: str) -> bytes:
        """All that is needed to go on after the last whole step."""

    def drop(self, job: str) -> None:
        """Lets go of a job."""
