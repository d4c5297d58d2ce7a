"""/finetune: what a job is asked to do, and how far it says it is."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, TypedDict

from pydantic import AwareDatetime, Field

from service.client.call import Answer, Call, below, check_names, new_key, to_json
from service.client.errors import GemmaError, error_of_response
from service.client.training_data import TrainingData, TrainingRows, located

Layout: TypeAlias = Literal["keras", "peft"]
Target: TypeAlias = Literal[
    "query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"
]
Schedule: TypeAlias = Literal["constant", "linear", "cosine"]
JobStatus: TypeAlias = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
Metadata: TypeAlias = Mapping[str, str | int | float | bool]


class PublishEvery(TypedDict):
    """A version each so many steps."""

    every: int


class PromoteRule(TypedDict):
    """A version becomes live if its ``valid_loss`` is less than a number, or than at the start."""

    metric: Literal["valid_loss"]
    less_than: Literal["init"] | float


class FinetuneFields(TypedDict, total=False):
    """What may be said beside the rows and the adapter; ranges and defaults are the service's."""

    init: str | None
    validation: TrainingData | float | None
    layout: Layout
    rank: int
    alpha: float | None
    targets: Sequence[Target]
    epochs: int | None
    steps: int | None
    batch_size: int
    learning_rate: float
    schedule: Schedule
    warmup_steps: int
    weight_decay: float
    grad_clip: float | None
    max_length: int
    seed: int
    publish: Literal["end", "every_step", "never"] | PublishEvery
    promote: PromoteRule | None
    metadata: Metadata


class Hyperparameters(Answer):
    """How a job trains, with everything that was left out."""

    layout: Layout
    rank: int
    alpha: float
    targets: list[str]
    epochs: int | None
    steps: int | None
    batch_size: int
    learning_rate: float
    schedule: Schedule
    warmup_steps: int
    weight_decay: float
    grad_clip: float | None
    max_length: int
    seed: int


class JobMetrics(Answer):
    """Losses as last measured, and how many tokens were learned from so far."""

    loss: float | None
    valid_loss: float | None
    tokens: int


class JobError(Answer):
    """Why a job failed."""

    code: str
    detail: str | None


class JobState(Answer):
    """A fine-tune job as the service last told it.

    Attributes:
        init: The model that it goes on from.
        version: The newest one that it made.
        live: Whether that one is live.
        rows: How many it learns from.
        validation: Rows that the loss is measured on, or the share set apart for that.
    """

    id: str
    adapter: str
    status: JobStatus
    base: str
    init: str
    step: int
    total_steps: int
    version: int | None
    live: bool
    metrics: JobMetrics
    created: AwareDatetime
    started: AwareDatetime | None
    finished: AwareDatetime | None
    estimated_finish: AwareDatetime | None
    hyperparameters: Hyperparameters
    publish: str | dict[str, Any]
    promote: dict[str, Any] | None
    rows: int
    validation: int | float
    metadata: dict[str, str | int | float | bool]
    data_digest: str
    error: JobError | None

    @property
    def has_ended(self) -> bool:
        """Nothing more happens to it."""
        return self.status in ("succeeded", "failed", "cancelled")


class JobList(Answer):
    """A page of jobs, the newest first."""

    jobs: list[JobState]
    has_more: bool


class RowTokens(Answer):
    """A row as it would be learned: 1 in ``loss_mask`` where it is."""

    token_ids: list[int]
    tokens: list[str]
    loss_mask: list[int]


class DryRun(Answer):
    """What a job would take.

    Attributes:
        tokens: Of all steps.
        padded_tokens: With what fills up the shapes, if it trains alone.
        estimated_s: Seconds, if nobody else is served meanwhile.
        first_rows: Up to four.
    """

    tokens: int
    padded_tokens: int
    steps: int
    estimated_s: float
    first_rows: list[RowTokens]


class StoredEvent(Answer):
    """An event of a list; `service.client.job_events` gives it a type."""

    id: int
    event: str
    created: AwareDatetime
    data: dict[str, Any] = Field(repr=False)


class StoredEvents(Answer):
    """A page of events, the oldest first."""

    events: list[StoredEvent]
    has_more: bool


_JOBS = "/finetune"


def finetune_call(data: TrainingData, adapter: str, fields: FinetuneFields) -> Call:
    """A job; it lasts once this is answered.

    Raises:
        DataUnreadable: A file of rows is none.
    """
    return _start("finetune", data, adapter, fields)


def dry_run_call(data: TrainingData, adapter: str, fields: FinetuneFields) -> Call:
    """What that job would take."""
    return _start("dry_run", data, adapter, fields)


def _start(function: str, data: TrainingData, adapter: str, fields: FinetuneFields) -> Call:
    check_names(fields, FinetuneFields, function)
    rows = {"data": TrainingRows.of(data)}
    validation = fields.get("validation")
    if validation is not None and not isinstance(validation, (int, float)):
        rows["validation"] = TrainingRows.of(validation)
    sent = {name: of_rows.rows for name, of_rows in rows.items()}
    is_dry = {"dry_run": True} if function == "dry_run" else {}
    return Call(
        "POST",
        _JOBS,
        to_json({**fields, "adapter": adapter, **sent, **is_dry}),
        statuses=frozenset({200, 202}),
        error=partial(_error_of_start, rows),
        key=None if is_dry else new_key(),
    )


def _error_of_start(
    rows: Mapping[str, TrainingRows], status: int, headers: Mapping[str, str], body: bytes
) -> GemmaError:
    """One that names the line of a file where the service names the row."""
    return located(error_of_response(status, headers, body), rows)


def jobs_call(limit: int, after: str | None) -> Call:
    return Call("GET", below(_JOBS, limit=limit, after=after))


def job_call(job_id: str) -> Call:
    return Call("GET", below(_JOBS, job_id))


def cancel_job_call(job_id: str) -> Call:
    return Call("POST", below(_JOBS, job_id, "cancel"))


def stored_events_call(job_id: str, after: int) -> Call:
    """Those behind number ``after`` that there are by now."""
    return Call("GET", below(_JOBS, job_id, "events", after=after))
