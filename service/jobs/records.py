"""What is stored about jobs and versions: frozen, and stored as msgpack.

A field that is added later needs a default, so that what was stored before can still be read.
"""

from typing import Literal

import msgspec

from service.protocol.training import Form, Hyperparameters

JobStatus = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
EventKind = Literal["status", "step", "eval", "version", "done", "error"]
# memory: the worker has it until it ends; disk: it lasts; gone: it was let go of.
VersionPlace = Literal["memory", "disk", "gone"]
Origin = Literal["job", "upload", "file"]

ENDED: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})


class Promotion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version becomes live if its validation loss is below this; None: below the first one."""

    less_than: float | None


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One job.

    Attributes:
        id: Names it.
        tenant: Whose it is.
        adapter: Name of the adapter that it makes versions of.
        status: See `service.jobs.states`.
        init: Name of the version that it goes on from, without the base's; None: the base.
        init_digest: Of that version.
        preset_digest: Of the model that it trains beside.
        hyperparameters: How it trains.
        num_rows: To learn from and to measure on, as they were sent.
        num_validation_rows: Of these, or the share that is set apart.
        publish: Steps from one version to the next; None: at the end only.
        is_promoted: Whether versions may become live.
        promotion: On which condition; None: always.
        metadata: Of the client.
        data_digest: Of the rows.
        num_steps: Of the optimizer.
        seconds: That it was expected to take alone.
        created: Seconds since 1970, as all times here.
        started: When it first ran.
        finished: When it ended.
        updated: When its last step was done.
        step: How many are done.
        loss: Of the last step.
        num_tokens: Of all steps.
        eval_step: Of the last measurement; -1: none.
        valid_loss: Then.
        initial_valid_loss: Before the first step.
        version: Newest one that it made.
        error_code: Why it failed.
        error_detail: The same for people.
    """

    id: str
    tenant: str
    adapter: str
    status: JobStatus
    init: str | None
    init_digest: str | None
    preset_digest: str
    hyperparameters: Hyperparameters
    num_rows: int
    num_validation_rows: int | float
    publish: int | None
    is_promoted: bool
    promotion: Promotion | None
    metadata: dict[str, str | int | float | bool]
    data_digest: str
    num_steps: int
    seconds: float
    created: float
    started: float | None = None
    finished: float | None = None
    updated: float | None = None
    step: int = 0
    loss: float | None = None
    num_tokens: int = 0
    eval_step: int = -1
    valid_loss: float | None = None
    initial_valid_loss: float | None = None
    version: int | None = None
    error_code: str | None = None
    error_detail: str | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


class VersionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One version of an adapter, and where it comes from.

    Attributes:
        adapter: Its name.
        number: Counts from 1; never used twice for one name.
        digest: Of its file, which names it everywhere else.
        origin: A job, an upload, or a file that the command line named.
        place: Where it is.
        path: Of its file, once it is on disk: in the data folder, or wherever the file was named.
        num_bytes: Of the file.
        preset_digest: Of the model that it belongs to; None: that was not known.
        form: What it is made of; None: only the worker knows.
        job: That made it.
        step: Of that job.
        is_last: Whether it is what the job ended with.
        parent: Version of the same adapter that it goes on from.
        init: Version that the job went on from, with its name.
        loss: Of the step that made it.
        valid_loss: Measured after that step.
        data_digest: Of the job's rows.
        hyperparameters: Of the job.
        created: When.
    """

    adapter: str
    number: int
    digest: str
    origin: Origin
    place: VersionPlace
    created: float
    num_bytes: int
    preset_digest: str | None
    path: str | None = None
    form: Form | None = None
    job: str | None = None
    step: int | None = None
    is_last: bool = False
    parent: int | None = None
    init: str | None = None
    loss: float | None = None
    valid_loss: float | None = None
    data_digest: str | None = None
    hyperparameters: Hyperparameters | None = None

    @property
    def name(self) -> str:
        return f"{self.adapter}@{self.number}"


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter: a name for versions.

    Attributes:
        name: Of the adapter.
        next_number: Of its next version.
        live: Version that its bare name stands for.
        lasting_live: The last one that was live and on disk: what is left if a worker dies.
        lost_live: The one that was live when a worker died with it; live again if it comes back.
    """

    name: str
    next_number: int = 1
    live: int | None = None
    lasting_live: int | None = None
    lost_live: int | None = None


class StoredEvent(msgspec.Struct, frozen=True):
    """One event of a job; ``data`` is JSON."""

    number: int
    kind: EventKind
    data: bytes
    created: float
