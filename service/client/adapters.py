"""/adapters: adapters with their versions, where each comes from, and their files in and out."""

from typing import Literal, TypeAlias, TypedDict

from pydantic import AwareDatetime

from service.client.call import FILE, Answer, Call, below, check_names, new_key, to_json
from service.client.jobs import Hyperparameters, Layout

# keras: a `.lora.h5` file; peft: safetensors with the fields of `adapter_config.json` inside.
FileFormat: TypeAlias = Literal["keras", "peft"]


class PromoteFields(TypedDict, total=False):
    """Only if this version is live now; None: only if none is; left out: whatever is."""

    if_live: int | None


class VersionMetrics(Answer):
    """Losses at the step that made it; None: not measured there."""

    loss: float | None
    valid_loss: float | None


class Version(Answer):
    """One version of an adapter. It never changes.

    Attributes:
        digest: SHA-256 of its file.
        job: That made it, at ``step``.
        parent: Version of this adapter that it goes on from.
        init: Version that the job went on from; None: the base.
        resident: Whether it can be asked for; False: it was let go of.
        durable: Whether it outlasts the worker.
    """

    version: int
    digest: str
    origin: Literal["job", "upload", "file"]
    job: str | None
    step: int | None
    parent: int | None
    init: str | None
    layout: Layout | None
    rank: int | None
    alpha: float | None
    targets: list[str] | None
    metrics: VersionMetrics
    hyperparameters: Hyperparameters | None
    data_digest: str | None
    preset_digest: str | None
    bytes: int
    created: AwareDatetime
    resident: bool
    durable: bool


class Adapter(Answer):
    """An adapter and its versions, the newest first.

    Attributes:
        live: Version that the bare name stands for.
        has_more: Whether there are versions below the last of these.
    """

    name: str
    live: int | None
    versions: list[Version]
    has_more: bool


class AdapterSummary(Answer):
    """An adapter: which version is live, and which is the newest."""

    name: str
    live: int | None
    newest: int


class AdapterList(Answer):
    """All adapters."""

    adapters: list[AdapterSummary]


_ADAPTERS = "/adapters"
LIST = Call("GET", _ADAPTERS)


def adapter_call(name: str, versions_below: int | None, limit: int | None) -> Call:
    """An adapter with at most ``limit`` versions of lower numbers than ``versions_below``."""
    return Call("GET", below(_ADAPTERS, name, below=versions_below, limit=limit))


def version_call(name: str, version: int) -> Call:
    return Call("GET", _version(name, version))


def promote_call(name: str, version: int, fields: PromoteFields) -> Call:
    check_names(fields, PromoteFields, "promote")
    return Call("PATCH", below(_ADAPTERS, name), to_json({"live": version, **fields}))


def delete_call(name: str, version: int | None) -> Call:
    """Deletes one version, or all of an adapter."""
    path = below(_ADAPTERS, name) if version is None else _version(name, version)
    return Call("DELETE", path, statuses=frozenset({204}))


def upload_call(name: str, content: bytes, file_format: FileFormat) -> Call:
    return Call(
        "PUT",
        below(_ADAPTERS, name, format=file_format),
        content,
        content_type=FILE,
        statuses=frozenset({201}),
        key=new_key(),
    )


def download_call(name: str, version: int, file_format: FileFormat) -> Call:
    path = f"{_version(name, version)}/weights"
    return Call("GET", below(path, format=file_format), accept=FILE)


def _version(name: str, version: int) -> str:
    return below(_ADAPTERS, name, "versions", version)
