"""What the routes of adapters take and give."""

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from service.api.finetune_schemas import ResolvedHyperparameters
from service.api.strict_model import StrictModel as _Model

MAX_VERSION = 999_999_999

VersionNumber = Annotated[int, Field(ge=1, le=MAX_VERSION)]


class VersionMetrics(_Model):
    loss: float | None = Field(description="Of the step that made it.")
    valid_loss: float | None = Field(description="Measured after that step; null: it was not.")


class Version(_Model):
    """One version of an adapter. It never changes."""

    version: int
    digest: str = Field(description="SHA-256 of its file.")
    origin: Literal["job", "upload", "file"]
    job: str | None = Field(description="That made it.")
    step: int | None = Field(description="Of that job.")
    parent: int | None = Field(description="Version of this adapter that it goes on from.")
    init: str | None = Field(description="Version that the job went on from; null: the base.")
    layout: Literal["keras", "peft"] | None
    rank: int | None
    alpha: float | None
    targets: list[str] | None
    metrics: VersionMetrics
    hyperparameters: ResolvedHyperparameters | None
    data_digest: str | None
    preset_digest: str | None
    bytes: int
    created: AwareDatetime
    resident: bool = Field(description="Whether it can be asked for; false: it was let go of.")
    durable: bool = Field(description="Whether it outlasts the worker.")


class Adapter(_Model):
    """An adapter and its versions, the newest first."""

    name: str
    live: int | None = Field(description="Version that the bare name stands for.")
    versions: list[Version]
    has_more: bool = Field(description="Whether there are versions below the last of these.")


class AdapterSummary(_Model):
    name: str
    live: int | None
    newest: int


class AdapterList(_Model):
    adapters: list[AdapterSummary]


class MoveLive(_Model):
    """Which version is live from now on."""

    live: VersionNumber
    if_live: VersionNumber | None = Field(
        None, description="Only if this one is live now; null: only if none is; or left out."
    )
