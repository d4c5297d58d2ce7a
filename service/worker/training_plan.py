"""A job as it was asked for, as a plan that a trainer takes, or what is wrong with it.

It is made a piece at a time: whoever makes it can pause between two pieces, so that others come to
their turn however large the job is.
"""

import hashlib
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from model.slots import AdapterForm, EngineInfo, TextCodec
from model.training import TrainingPlan, TrainingRow
from service.protocol.training import (
    FieldError,
    Hyperparameters,
    JobRefused,
    PrepareJob,
    Row,
    RowTokens,
)
from service.worker.training_rows import InvalidRow, RowReader

MAX_STEPS = 1_000_000
MAX_ERRORS = 20
_SHOWN_ROWS = 4
# Of rows that are read without a pause: some milliseconds.
PIECE_TOKENS = 4096


class JobInvalid(Exception):
    """Carries the `JobRefused` of a job that cannot be trained."""

    def __init__(self, refused: JobRefused) -> None:
        super().__init__(refused.code)
        self.refused = refused


@dataclass(frozen=True, slots=True)
class InitialAdapter:
    """The version that a job goes on from."""

    content: bytes
    form: AdapterForm


Making = Generator[None, None, TrainingPlan]


class PlanMaker:
    """Makes plans for one engine.

    Args:
        info: Of the engine.
        codec: Of the engine.
    """

    def __init__(self, info: EngineInfo, codec: TextCodec) -> None:
        self._info = info
        self._codec = codec

    def make(self, command: PrepareJob, initial: InitialAdapter | None) -> Making:
        """The plan of a job, a piece between two values that are taken.

        Raises:
            JobInvalid: Rows, or what they go together with, are not right.
        """
        wanted = command.hyperparameters
        self._check_form(command, initial)
        errors: list[FieldError] = []
        rows = yield from self._read(command.rows, "/data", wanted, errors)
        validation: list[TrainingRow] = []
        if not isinstance(command.validation, float):
            given = command.validation
            validation = yield from self._read(given, "/validation", wanted, errors)
        if errors:
            raise _refused(command, _summary(errors), errors)
        if isinstance(command.validation, float) and command.validation:
            rows, validation = _set_apart(command, rows, command.validation)
        if not rows:
            raise _refused(
                command, "There is no row to learn from.", [FieldError("/data", "Is empty.")]
            )
        form = wanted.form
        return TrainingPlan(
            job=command.job_id,
            rows=tuple(rows),
            validation=tuple(validation),
            num_steps=_num_steps(command, len(rows)),
            layout=form.layout,
            rank=form.rank,
            alpha=form.alpha,
            targets=form.targets,
            batch_size=wanted.batch_size,
            learning_rate=wanted.learning_rate,
            schedule=wanted.schedule,
            warmup_steps=wanted.warmup_steps,
            weight_decay=wanted.weight_decay,
            grad_clip=wanted.grad_clip,
            seed=wanted.seed,
            initial=None if initial is None else initial.content,
        )

    def shown(self, plan: TrainingPlan) -> tuple[RowTokens, ...]:
        """The first rows, with what their tokens say."""
        return tuple(
            RowTokens(
                row.token_ids,
                tuple(map(self._codec.piece, row.token_ids)),
                tuple(map(int, row.is_trained)),
            )
            for row in plan.rows[:_SHOWN_ROWS]
        )

    def _check_form(self, command: PrepareJob, initial: InitialAdapter | None) -> None:
        form = command.hyperparameters.form
        if form.rank > self._info.adapter_max_rank:
            detail = f"Must be at most {self._info.adapter_max_rank}, the highest of this service."
            raise _refused(command, detail, [FieldError("/rank", detail)])
        if initial is None:
            return
        wanted = AdapterForm(form.layout, form.rank, form.alpha, tuple(sorted(form.targets)))
        if initial.form != wanted:
            detail = (
                f"Is of another form: {_told(initial.form)}, and {_told(wanted)} was asked for."
            )
            raise _refused(command, detail, [FieldError("/init", detail)])

    def _read(
        self,
        rows: Sequence[Row],
        pointer: str,
        wanted: Hyperparameters,
        errors: list[FieldError],
    ) -> Generator[None, None, list[TrainingRow]]:
        reader = RowReader(self._info, self._codec, wanted.max_length)
        read: list[TrainingRow] = []
        num_tokens = 0
        for index, row in enumerate(rows):
            if len(errors) >= MAX_ERRORS:
                break
            try:
                read.append(reader.read(row))
                num_tokens += len(read[-1].token_ids)
            except InvalidRow as error:
                errors.append(FieldError(f"{pointer}/{index}{error.pointer}", error.detail))
                # It may have been long.
                num_tokens = PIECE_TOKENS
            if num_tokens >= PIECE_TOKENS:
                num_tokens = 0
                yield
        return read


def _refused(command: PrepareJob, detail: str, errors: Sequence[FieldError]) -> JobInvalid:
    return JobInvalid(JobRefused(command.job_id, "invalid_field", detail, tuple(errors)))


def _summary(errors: Sequence[FieldError]) -> str:
    more = " at least" if len(errors) >= MAX_ERRORS else ""
    return f"Rows cannot be learned from:{more} {len(errors)} of them."


def _told(form: AdapterForm) -> str:
    targets = ", ".join(form.targets)
    return f"{form.layout}, rank {form.rank}, alpha {form.alpha:g}, {targets}"


def _set_apart(
    command: PrepareJob, rows: Sequence[TrainingRow], share: float
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Rows to learn from and rows to measure on, both in their order; the seed says which.

    At least one is measured on, and at least one is left.
    """
    if len(rows) < 2:
        detail = "Of one row nothing can be set apart."
        raise _refused(command, detail, [FieldError("/validation", detail)])
    count = min(max(math.floor(share * len(rows)), 1), len(rows) - 1)

    def lot(index: int) -> bytes:
        drawn = f"validation {command.hyperparameters.seed} {index}"
        return hashlib.sha256(drawn.encode()).digest()

    chosen = set(sorted(range(len(rows)), key=lot)[:count])
    kept = [row for index, row in enumerate(rows) if index not in chosen]
    return kept, [rows[index] for index in sorted(chosen)]


def _num_steps(command: PrepareJob, num_rows: int) -> int:
    wanted = command.hyperparameters
    if wanted.steps is not None:
        return wanted.steps
    assert wanted.epochs is not None, "one of the two is given"
    num_steps = wanted.epochs * math.ceil(num_rows / wanted.batch_size)
    if num_steps > MAX_STEPS:
        detail = f"They are {num_steps} steps; a job has at most {MAX_STEPS}."
        raise _refused(command, detail, [FieldError("/epochs", detail)])
    return num_steps
