"""What crosses the wall between the two processes about adapters and jobs that train them.

The life of a job::

    PrepareJob -> JobRefused                                     nothing is kept
    PrepareJob -> JobPrepared                                    rows are tokens now
    StartJob   -> (JobStep | JobEval | JobVersion)*, JobEnded

Between `JobPrepared` and `StartJob` the API process makes the record durable; a job that is not
started is forgotten by `CancelJob`. After a restart both commands are sent again and the worker
goes on from its last checkpoint, to the same bits. What it had told and the API process had not
made durable is told again: it goes on from a step that is remembered, never from a later one, so
that steps, measurements and versions may be told twice.

A version is named by the digest of its file's bytes. It can be asked for from its `JobVersion` on,
out of memory; `SaveAdapter` makes it last, `ForgetAdapter` lets go of it.

Each of the commands that carry a ``request_id`` is answered by exactly one event with it.
"""

from typing import Literal

import msgspec

from service.protocol.messages import AdapterSource, Message

Layout = Literal["keras", "peft"]
Schedule = Literal["constant", "linear", "cosine"]
JobEnd = Literal["succeeded", "failed", "cancelled"]


class Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an adapter is made of; see `model.lora_adapter.LoraForm`."""

    layout: Layout
    rank: int
    alpha: float
    targets: tuple[str, ...]


class Hyperparameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a job trains. Just one of ``epochs`` and ``steps`` is given."""

    form: Form
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


class TextRow(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A text, of which everything is learned."""

    text: str


class PromptRow(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A prompt and what should follow it; only that is learned."""

    prompt: str
    completion: str


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


class ChatRow(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A conversation; the turns of the assistant are learned."""

    messages: tuple[ChatMessage, ...]


class IdsRow(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Ids as they are; without a mask all but the first are learned."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...] | None = None


Row = TextRow | PromptRow | ChatRow | IdsRow


# --- commands ---------------------------------------------------------------------------------


class PrepareJob(Message, frozen=True):
    """Makes tokens of rows and checks them.

    Attributes:
        job_id: Names it.
        tenant: Whose it is.
        hyperparameters: How it trains.
        rows: To learn from.
        validation: To measure on: rows, or the share of ``rows`` that is set apart for that.
        init: Digest of the version to go on from; None: the base.
    """

    job_id: str
    tenant: str
    hyperparameters: Hyperparameters
    rows: tuple[Row, ...]
    validation: tuple[Row, ...] | float
    init: str | None = None


class StartJob(Message, frozen=True):
    """Lets a prepared job train.

    Attributes:
        job_id: Which.
        folder: For its checkpoints; if one is there, the job goes on from it.
        publish_every: Steps from one version to the next; the last step makes one too. 0: none.
        last_step: That is remembered; a checkpoint of a later one is passed over.
    """

    job_id: str
    folder: str
    publish_every: int
    last_step: int


class CancelJob(Message, frozen=True):
    """Ends a job, or forgets one that was only prepared; one that has ended already stays so."""

    job_id: str


class HaltJobs(Message, frozen=True):
    """Ends training in this worker, and makes what was done last; no job ends by it."""

    request_id: str


class SaveAdapter(Message, frozen=True):
    """Makes a version last in a folder of its own, complete or not at all."""

    request_id: str
    digest: str
    folder: str


class ForgetAdapter(Message, frozen=True):
    """Lets go of a version once nobody runs with it; it cannot be asked for from now on."""

    digest: str


class AddAdapter(Message, frozen=True):
    """Tells where a version lies, so that requests may name it."""

    source: AdapterSource


class ImportAdapter(Message, frozen=True):
    """Makes a version of a file that somebody sent."""

    request_id: str
    path: str
    format: Layout


class ExportAdapter(Message, frozen=True):
    """Writes a version as a file that others read."""

    request_id: str
    digest: str
    path: str
    format: Layout


TrainingCommand = (
    PrepareJob
    | StartJob
    | CancelJob
    | HaltJobs
    | SaveAdapter
    | ForgetAdapter
    | AddAdapter
    | ImportAdapter
    | ExportAdapter
)


# --- events -----------------------------------------------------------------------------------


class RowTokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row as it will be learned."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    loss_mask: tuple[int, ...]


class JobPrepared(Message, frozen=True):
    """The rows are right.

    Attributes:
        job_id: Whose.
        num_steps: Of the optimizer.
        num_tokens: Of all steps, as they are.
        num_padded_tokens: With what fills up the shapes, if no other job shares them.
        seconds: What it will take if nobody else is served.
        first_rows: Up to four.
    """

    job_id: str
    num_steps: int
    num_tokens: int
    num_padded_tokens: int
    seconds: float
    first_rows: tuple[RowTokens, ...]


class FieldError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is wrong where, as a JSON pointer into the request: ``/data/3/completion``."""

    pointer: str
    detail: str


class JobRefused(Message, frozen=True):
    """The rows, or the version to go on from, are not right; ``code`` is of the error table."""

    job_id: str
    code: str
    detail: str
    errors: tuple[FieldError, ...] = ()


class JobStep(Message, frozen=True):
    """A step is done; see `model.training.StepDone`. ``num_rows`` are the job's own."""

    job_id: str
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    tokens_per_second: float
    rows_shared: int
    num_rows: int


class JobEval(Message, frozen=True):
    """The loss of the validation rows after a step; 0 is before the first one."""

    job_id: str
    step: int
    valid_loss: float


class JobVersion(Message, frozen=True):
    """What a step left can be asked for from now on."""

    job_id: str
    step: int
    digest: str
    num_bytes: int
    is_last: bool


class JobPaused(Message, frozen=True):
    """It cannot write its checkpoint, and tries again by itself; a `JobStep` says that it could."""

    job_id: str
    detail: str


class JobEnded(Message, frozen=True):
    """Its last event. ``code`` and ``detail`` tell why it failed."""

    job_id: str
    end: JobEnd
    step: int
    code: str | None = None
    detail: str | None = None


class JobsHalted(Message, frozen=True):
    """Nothing trains any more, and every checkpoint is written for which there is room."""

    request_id: str


class AdapterSaved(Message, frozen=True):
    """The version lies in its folder, whole."""

    request_id: str
    source: AdapterSource


class AdapterImported(Message, frozen=True):
    """The file was right; its version can be asked for, and saved."""

    request_id: str
    digest: str
    form: Form
    num_bytes: int


class AdapterExported(Message, frozen=True):
    """The file is written."""

    request_id: str
    num_bytes: int


class AdapterFailed(Message, frozen=True):
    """Nothing was done; ``code`` is of the error table."""

    request_id: str
    code: str
    detail: str


TrainingEvent = (
    JobPrepared
    | JobRefused
    | JobStep
    | JobEval
    | JobVersion
    | JobPaused
    | JobEnded
    | JobsHalted
    | AdapterSaved
    | AdapterImported
    | AdapterExported
    | AdapterFailed
)
