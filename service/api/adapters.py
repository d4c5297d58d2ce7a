"""/adapters: versions with where they come from, files in and out, and which one is live."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from service.adapters import ADAPTER_NAME
from service.api.adapter_schemas import (
    MAX_VERSION,
    Adapter,
    AdapterList,
    AdapterSummary,
    MoveLive,
    Version,
)
from service.api.finetune import TENANT, IdempotencyKey
from service.api.finetune_answers import version_of
from service.api.route import StrictRoute
from service.api.state import State
from service.errors import (
    AdapterBusy,
    AdapterMismatch,
    AdapterNotFound,
    BodyTimeout,
    BodyTooLarge,
    Draining,
    IdempotencyMismatch,
    InternalError,
    InvalidField,
    Loading,
    MalformedJson,
    QueueFull,
    StorageFull,
    UnsupportedMediaType,
    VersionConflict,
    WorkerRestarting,
    error_responses,
)

router = APIRouter()
json_router = APIRouter(route_class=StrictRoute)

_PIECE_BYTES = 64 * 1024
_FILE = "application/octet-stream"
_SUFFIXES = {"keras": "lora.h5", "peft": "safetensors"}

Name = Annotated[str, Path(pattern=rf"^{ADAPTER_NAME}$")]
Number = Annotated[int, Path(ge=1, le=MAX_VERSION)]
Format = Annotated[
    Literal["keras", "peft"],
    Query(
        description="keras: a `.lora.h5` as keras-hub writes it; peft: safetensors, the fields of "
        "`adapter_config.json` in its metadata."
    ),
]


@router.get("/adapters", response_model=AdapterList)
async def adapters(state: State) -> Any:
    """All adapters."""
    found = await state.trained().versions.adapters()
    summaries = [
        AdapterSummary(name=adapter.name, live=adapter.live, newest=newest)
        for adapter, newest in found
    ]
    return AdapterList(adapters=summaries)


@router.get(
    "/adapters/{name}",
    response_model=Adapter,
    responses=error_responses(AdapterNotFound, InvalidField),
)
async def adapter(
    name: Name,
    state: State,
    below: Annotated[
        int, Query(ge=1, le=MAX_VERSION + 1, description="Versions below this one.")
    ] = MAX_VERSION + 1,
    limit: Annotated[int, Query(ge=1, le=1000, description="Versions of a page.")] = 100,
) -> Any:
    """One adapter with its versions, the newest first."""
    return await _adapter(name, state, below, limit)


@router.put(
    "/adapters/{name}",
    status_code=201,
    response_model=Version,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {_FILE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
    responses=error_responses(
        BodyTimeout,
        IdempotencyMismatch,
        BodyTooLarge,
        UnsupportedMediaType,
        InvalidField,
        QueueFull,
        InternalError,
        Loading,
        Draining,
        WorkerRestarting,
        StorageFull,
    ),
)
async def upload(
    name: Name, format: Format, request: Request, state: State, key: IdempotencyKey = None
) -> Any:
    """Makes a version of a file; it is live from then on."""
    if state.view.readiness().reason == "draining":
        raise Draining("The service is stopping and takes no new work.")
    content = await request.body()
    training = state.trained()
    # Of 64 MiB it takes a while.
    digest = await asyncio.to_thread(lambda: hashlib.sha256(content).hexdigest())
    async with training.keys.once(TENANT, key, f"{name} {format} {digest}".encode()) as once:
        if once.answer is None:
            version = await training.versions.upload(name, content, format, once)
        else:
            answered, _, number = once.answer.partition("@")
            version = await training.versions.version(answered, int(number))
    return version_of(version, state.settings.served_name)


@json_router.patch(
    "/adapters/{name}",
    response_model=Adapter,
    responses=error_responses(
        MalformedJson,
        AdapterNotFound,
        BodyTimeout,
        VersionConflict,
        BodyTooLarge,
        UnsupportedMediaType,
        InvalidField,
        Loading,
        WorkerRestarting,
        StorageFull,
        InternalError,
    ),
)
async def move_live(name: Name, body: MoveLive, state: State) -> Any:
    """Moves what the bare name stands for; what runs keeps its version."""
    expected = [body.if_live] if "if_live" in body.model_fields_set else []
    await state.trained().versions.move_live(name, body.live, expected)
    return await _adapter(name, state, MAX_VERSION + 1, 100)


@router.delete(
    "/adapters/{name}",
    status_code=204,
    response_class=Response,
    responses=error_responses(AdapterNotFound, AdapterBusy, InvalidField, StorageFull),
)
async def delete(name: Name, state: State) -> Response:
    """Removes an adapter with all of its versions; what runs with one may end."""
    await state.trained().versions.delete(name, None)
    return Response(status_code=204)


@router.delete(
    "/adapters/{name}/versions/{version}",
    status_code=204,
    response_class=Response,
    responses=error_responses(AdapterNotFound, AdapterBusy, InvalidField, StorageFull),
)
async def delete_version(name: Name, version: Number, state: State) -> Response:
    """Removes one version. If it was live, nothing is live until something becomes so."""
    await state.trained().versions.delete(name, version)
    return Response(status_code=204)


@router.get(
    "/adapters/{name}/versions/{version}",
    response_model=Version,
    responses=error_responses(AdapterNotFound, InvalidField),
)
async def version(name: Name, version: Number, state: State) -> Any:
    """One version with where it comes from."""
    found = await state.trained().versions.version(name, version)
    return version_of(found, state.settings.served_name)


@router.get(
    "/adapters/{name}/versions/{version}/weights",
    response_class=Response,
    responses={
        200: {
            "description": "The file.",
            "content": {_FILE: {"schema": {"type": "string", "format": "binary"}}},
        },
        **error_responses(
            AdapterNotFound,
            AdapterMismatch,
            InvalidField,
            InternalError,
            Loading,
            WorkerRestarting,
            StorageFull,
        ),
    },
)
async def weights(name: Name, version: Number, format: Format, state: State) -> Response:
    """A version as a file that others read."""
    file, num_bytes = await state.trained().versions.download(name, version, format)
    headers = {
        "Content-Length": str(num_bytes),
        "Content-Disposition": f'attachment; filename="{name}-{version}.{_SUFFIXES[format]}"',
        "X-Model": f"{state.settings.served_name}:{name}@{version}",
    }
    return StreamingResponse(_pieces(file), media_type=_FILE, headers=headers)


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    with file:
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield piece


async def _adapter(name: str, state: State, below: int, limit: int) -> Adapter:
    found, versions, has_more = await state.trained().versions.adapter(name, below, limit)
    base = state.settings.served_name
    listed = [version_of(each, base) for each in versions]
    return Adapter(name=name, live=found.live, versions=listed, has_more=has_more)
