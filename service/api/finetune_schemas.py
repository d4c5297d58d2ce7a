"""What the routes of fine-tune jobs take and give. Each number has a closed range."""

from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from service.adapters import ADAPTER_NAME
from service.api.finetune_rows import ROWS_SCHEMA, read_rows
from service.api.strict_model import StrictModel as _Model, refusal
from service.protocol.training import Row

MAX_STEPS = 1_000_000
MAX_RANK = 64
MAX_BATCH = 256
# As the worker's trainer has them.
MAX_ROW_TOKENS = 512
MAX_VALIDATION_SHARE = 0.5
MAX_METADATA = 16
MAX_METADATA_CHARACTERS = 512
MAX_WAIT_SECONDS = 600
MAX_LISTED = 1000

AdapterName = Annotated[str, StringConstraints(pattern=rf"^{ADAPTER_NAME}$")]
TargetName = Literal[
    "query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"
]
JobStatusName = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
EventName = Literal["status", "step", "eval", "version", "done", "error"]


def _check_validation(value: object) -> object:
    """Rows, or the share of ``data`` that is set apart."""
    if isinstance(value, list):
        return read_rows(value)
    if type(value) not in (int, float) or not 0 <= float(value) <= MAX_VALIDATION_SHARE:  # type: ignore[arg-type]
        raise refusal((), f"should be a list of rows or a share in [0, {MAX_VALIDATION_SHARE}]")
    return float(value)  # type: ignore[arg-type]


def _check_metadata(value: object) -> object:
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise refusal((), f"should be an object of at most {MAX_METADATA} fields")
    for key, item in value.items():
        if not 0 < len(key) <= 64:
            raise refusal((), "should have names of 1 to 64 characters")
        if type(item) not in (str, int, float, bool):
            raise refusal((key,), "should be a string, a number or a boolean")
        if isinstance(item, str) and len(item) > MAX_METADATA_CHARACTERS:
            raise refusal((key,), f"should have at most {MAX_METADATA_CHARACTERS} characters")
        if type(item) is int and abs(item) >= 2**53:
            raise refusal((key,), "should be below 2**53")
    return value


_NOT_DUMPED = PlainSerializer(lambda _: None)
Rows = Annotated[
    tuple[Row, ...], PlainValidator(read_rows), WithJsonSchema(ROWS_SCHEMA), _NOT_DUMPED
]
Validation = Annotated[
    tuple[Row, ...] | float,
    PlainValidator(_check_validation),
    WithJsonSchema(
        {
            "anyOf": [
                ROWS_SCHEMA,
                {"type": "number", "minimum": 0, "maximum": MAX_VALIDATION_SHARE},
            ]
        }
    ),
    _NOT_DUMPED,
]
Metadata = Annotated[
    dict[str, str | int | float | bool],
    PlainValidator(_check_metadata),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_METADATA,
            "propertyNames": {"minLength": 1, "maxLength": 64},
            "additionalProperties": {
                "anyOf": [
                    {"type": "string", "maxLength": MAX_METADATA_CHARACTERS},
                    {"type": "number"},
                    {"type": "boolean"},
                ]
            },
        }
    ),
]


class PublishEvery(_Model):
    every: int = Field(ge=1, le=MAX_STEPS, description="Steps from one version to the next.")


# What is wrong with a value of two forms is said of the form that it has, under the field's name.
def _check_publish(value: object, checked: ValidatorFunctionWrapHandler) -> object:
    if isinstance(value, dict):
        return PublishEvery.model_validate(value)
    try:
        return checked(value)
    except ValidationError as error:
        detail = "should be end, every_step, never or an object with every"
        raise refusal((), detail) from error


def _check_bound(value: object, checked: ValidatorFunctionWrapHandler) -> object:
    try:
        return checked(value)
    except ValidationError as error:
        raise refusal((), "should be init or a finite number") from error


class PromoteRule(_Model):
    """When a version becomes live."""

    metric: Literal["valid_loss"]
    less_than: Annotated[Literal["init"] | float, WrapValidator(_check_bound)] = Field(
        description="`init`: what the metric was before the first step; or a number."
    )


class FinetuneRequest(_Model):
    """A LoRA job."""

    # Rows are msgspec's.
    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True
    )

    adapter: AdapterName = Field(description="Name of the adapter that gets the versions.")
    init: (
        Annotated[str, StringConstraints(pattern=rf"^(base|{ADAPTER_NAME}@[1-9][0-9]{{0,8}})$")]
        | None
    ) = Field(
        None,
        description="Where training begins: null or `base`, or a version such as `tone@7`. What is "
        "left out of `layout`, `rank`, `alpha` and `targets` is then that version's.",
    )
    data: Rows = Field(
        description="Rows to learn from. `text`: all of it is learned; `prompt` and `completion`: "
        "the completion; `messages`: the turns of the assistant; `token_ids`: where `loss_mask` is "
        "1, or all but the first."
    )
    validation: Validation | None = Field(
        None, description="Rows to measure the loss on, or the share of `data` set apart for that."
    )
    layout: Literal["keras", "peft"] = Field(
        "keras",
        description="keras: one B for all heads of a projection, alpha is the rank; peft: one A.",
    )
    rank: int = Field(8, ge=1, le=MAX_RANK, description="Of each pair; /info has the highest.")
    alpha: Annotated[float, Field(gt=0, le=1024)] | None = Field(
        None, description="What is added is multiplied by alpha / rank; null: the rank."
    )
    targets: list[TargetName] = Field(
        default=["query", "value"],
        min_length=1,
        max_length=7,
        description="Projections that are adapted.",
    )
    epochs: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(
        1, description="How often each row is seen; in place of `steps`."
    )
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(
        None, description="Steps of the optimizer; in place of `epochs`."
    )
    batch_size: int = Field(8, ge=1, le=MAX_BATCH, description="Rows of a step.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="At its highest.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="After the warm-up: level, or down to 0 at the last step."
    )
    warmup_steps: int = Field(0, ge=0, le=MAX_STEPS, description="In which the rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="Of AdamW.")
    grad_clip: Annotated[float, Field(gt=0, le=1_000_000)] | None = Field(
        1.0, description="Greatest norm of the gradient; null: as it is."
    )
    max_length: int = Field(
        MAX_ROW_TOKENS,
        ge=2,
        le=MAX_ROW_TOKENS,
        description="Tokens of a row; a longer one is refused.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of the first A and the order of rows.")
    publish: Annotated[
        Literal["end", "every_step", "never"] | PublishEvery, WrapValidator(_check_publish)
    ] = Field(
        "end",
        description="When the job makes a version. never: at the end too, but it cannot become "
        "live by itself.",
    )
    promote: PromoteRule | None = Field(
        None, description="Which versions become live; null: each as it comes."
    )
    metadata: Metadata = Field(default_factory=dict, description="Given back with the job.")
    dry_run: bool = Field(False, description="Only tell what the job would take; nothing is kept.")

    @model_validator(mode="before")
    @classmethod
    def _check_length_of_job(cls, data: Any) -> Any:
        """``steps`` alone takes the place of the default of ``epochs``."""
        if isinstance(data, dict) and data.get("steps") is not None and "epochs" not in data:
            return {**data, "epochs": None}
        return data

    @model_validator(mode="after")
    def _check_fields_together(self) -> "FinetuneRequest":
        if (self.epochs is None) == (self.steps is None):
            raise refusal(("steps",), "should be given or epochs, and not both")
        if len(set(self.targets)) < len(self.targets):
            raise refusal(("targets",), "should name each projection once")
        if self.layout == "keras" and self.alpha not in (None, float(self.rank)):
            raise refusal(("alpha",), f"should be the rank, {self.rank}, or null in layout keras")
        if self.steps is not None and self.warmup_steps > self.steps:
            raise refusal(("warmup_steps",), f"should be at most steps, {self.steps}")
        if self.promote is not None and self.publish == "never":
            raise refusal(("promote",), "should be null if nothing is published")
        if self.promote is not None and not self.validation:
            raise refusal(("promote",), "should be null without validation rows")
        return self

    def init_version(self) -> tuple[str, int] | None:
        """Name and number of the version to go on from."""
        if self.init in (None, "base"):
            return None
        name, _, number = str(self.init).partition("@")
        return name, int(number)


class ResolvedHyperparameters(_Model):
    """How a job trains, with everything that was left out."""

    layout: Literal["keras", "peft"]
    rank: int
    alpha: float
    targets: list[str]
    epochs: int | None
    steps: int | None
    batch_size: int
    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    weight_decay: float
    grad_clip: float | None
    max_length: int
    seed: int


class JobMetrics(_Model):
    loss: float | None = Field(description="Of the last step.")
    valid_loss: float | None = Field(description="As last measured.")
    tokens: int = Field(description="That were learned from so far.")


class JobError(_Model):
    code: str
    detail: str | None


class Job(_Model):
    """A fine-tune job."""

    id: str
    adapter: str
    status: JobStatusName
    base: str
    init: str = Field(description="The model that it goes on from.")
    step: int
    total_steps: int
    version: int | None = Field(description="The newest one that it made.")
    live: bool = Field(description="Whether that one is live now.")
    metrics: JobMetrics
    created: AwareDatetime
    started: AwareDatetime | None
    finished: AwareDatetime | None
    estimated_finish: AwareDatetime | None
    hyperparameters: ResolvedHyperparameters
    publish: Literal["end", "every_step", "never"] | PublishEvery
    promote: PromoteRule | None
    rows: int
    validation: int | float = Field(description="Rows to measure on, or the share set apart.")
    metadata: dict[str, str | int | float | bool]
    data_digest: str
    error: JobError | None


class JobList(_Model):
    """The newest first."""

    jobs: list[Job]
    has_more: bool


class RowTokens(_Model):
    """A row as it would be learned."""

    token_ids: list[int]
    tokens: list[str]
    loss_mask: list[int]


class DryRun(_Model):
    """What a job would take."""

    tokens: int = Field(description="Of all steps.")
    padded_tokens: int = Field(description="With what fills up the shapes, if it trains alone.")
    steps: int
    estimated_s: float = Field(description="If nobody else is served meanwhile.")
    first_rows: list[RowTokens] = Field(description="Up to four.")


class JobEvent(_Model):
    id: int
    event: EventName
    created: AwareDatetime
    data: dict[str, Any]


class JobEvents(_Model):
    """Events of a job in order."""

    events: list[JobEvent]
    has_more: bool = Field(description="Whether there are more behind the last of these by now.")
