"""/finetune: fine-tune jobs, and the events of one as a list or as server-sent events.

A job is answered with 202 once its record is durable; what is wrong with it is known before.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from service.api import sse
from service.api.clients import answer_unless_left
from service.api.finetune_answers import dry_run_of, event_of, job_of
from service.api.finetune_schemas import (
    MAX_LISTED,
    MAX_WAIT_SECONDS,
    DryRun,
    FinetuneRequest,
    Job,
    JobEvents,
    JobList,
)
from service.api.route import StrictRoute
from service.api.state import ServiceState, State
from service.errors import (
    AdapterMismatch,
    AdapterNotFound,
    BodyTimeout,
    BodyTooLarge,
    Draining,
    FieldError,
    IdempotencyMismatch,
    InternalError,
    InvalidField,
    JobLimit,
    JobNotFound,
    Loading,
    MalformedJson,
    NotAcceptable,
    QueueFull,
    ServiceError,
    StorageFull,
    UnsupportedMediaType,
    WorkerRestarting,
    error_responses,
)
from service.jobs.jobs import JobRequest
from service.jobs.records import JobRecord, Promotion, StoredEvent
from service.protocol.training import Form, Hyperparameters

router = APIRouter(route_class=StrictRoute)

# Until keys come there is one tenant.
TENANT = "default"
_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*([0-9]{1,6})\s*(?=$|[,;])")
_EVENTS_AT_ONCE = 256

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same key with the same body gets the first request's answer.",
    ),
]


@router.post(
    "/finetune",
    status_code=202,
    response_model=Job,
    responses={
        200: {
            "model": DryRun | Job,
            "description": "With `dry_run`, what the job would take; with `Prefer: wait=30`, the "
            "job, which ended in time.",
        },
        202: {
            "headers": {"Location": {"schema": {"type": "string"}}},
            "description": "The job, which lasts from now on.",
        },
        **error_responses(
            MalformedJson,
            AdapterNotFound,
            BodyTimeout,
            AdapterMismatch,
            IdempotencyMismatch,
            BodyTooLarge,
            UnsupportedMediaType,
            InvalidField,
            QueueFull,
            JobLimit,
            InternalError,
            Loading,
            Draining,
            WorkerRestarting,
            StorageFull,
        ),
    },
)
async def create(
    body: FinetuneRequest,
    request: Request,
    state: State,
    key: IdempotencyKey = None,
    prefer: Annotated[
        str | None,
        Header(max_length=255, description="`wait=30`: answer when the job ends, or after that."),
    ] = None,
) -> Any:
    """Starts a LoRA job."""
    training = state.trained()
    content = _canonical(await request.json())
    try:
        return await answer_unless_left(request, _created(body, content, state, key, prefer))
    except ServiceError as error:
        training.meter.refused(error.code)
        raise


async def _created(
    body: FinetuneRequest, content: bytes, state: ServiceState, key: str | None, prefer: str | None
) -> Response:
    training = state.trained()
    if body.dry_run:
        command, prepared = await training.jobs.prepare(await _asked(body, content, state))
        training.jobs.forget(command.job_id)
        return _json(dry_run_of(prepared), 200)
    async with training.keys.once(TENANT, key, content) as once:
        if once.answer is None:
            record = await training.jobs.create(await _asked(body, content, state), once)
        else:
            record = await training.jobs.job(once.answer, TENANT)
    headers = {"Location": f"/finetune/{record.id}"}
    if (wait := _seconds_to_wait(prefer)) is not None:
        record = await training.jobs.ended(record.id, TENANT, wait)
        headers["Preference-Applied"] = f"wait={wait}"
    is_over = wait is not None and record.has_ended
    return _json(await _job(record, state), 200 if is_over else 202, headers)


@router.get(
    "/finetune",
    response_model=JobList,
    responses=error_responses(JobNotFound, InvalidField),
)
async def jobs(
    state: State,
    after: Annotated[
        str | None, Query(max_length=64, description="Id of the last job of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Jobs of a page.")] = 20,
) -> Any:
    """All jobs, the newest first."""
    records, has_more = await state.trained().jobs.jobs(TENANT, after, limit)
    return JobList(jobs=[await _job(record, state) for record in records], has_more=has_more)


@router.get("/finetune/{id}", response_model=Job, responses=error_responses(JobNotFound))
async def job(id: str, state: State) -> Any:
    """How far a job is."""
    return await _job(await state.trained().jobs.job(id, TENANT), state)


@router.post(
    "/finetune/{id}/cancel",
    response_model=Job,
    responses=error_responses(JobNotFound, StorageFull),
)
async def cancel(id: str, state: State) -> Any:
    """Ends a job; one that has ended stays as it is. Versions that it made stay too."""
    return await _job(await state.trained().jobs.cancel(id, TENANT), state)


@router.get(
    "/finetune/{id}/events",
    response_model=JobEvents,
    responses={
        200: {
            "description": "As `text/event-stream`: events as they come, to the end of the job.",
            "content": {sse.MEDIA_TYPE: {"schema": {"type": "string"}}},
        },
        **error_responses(JobNotFound, NotAcceptable, InvalidField),
    },
)
async def events(
    id: str,
    request: Request,
    state: State,
    after: Annotated[
        int | None, Query(ge=0, lt=2**53, description="Id of the last event that is known.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED, description="Of a list.")] = MAX_LISTED,
    last_event_id: Annotated[
        str | None,
        Header(pattern="^[0-9]{0,15}$", description="The same, as a browser sends it."),
    ] = None,
) -> Any:
    """All events of a job: a list, or a stream that ends with the job."""
    training = state.trained()
    await training.jobs.job(id, TENANT)
    first = after if after is not None else int(last_event_id or 0)
    if _wants_stream(request):
        frames = _frames(state, id, first)
        return StreamingResponse(frames, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)
    found = await training.jobs.events(id, first, limit + 1)
    listed = [event_of(event) for event in found[:limit]]
    return JobEvents(events=listed, has_more=len(found) > limit)


async def _frames(state: ServiceState, job_id: str, after: int) -> AsyncIterator[bytes]:
    jobs = state.trained().jobs
    while True:
        try:
            async with asyncio.timeout(state.settings.ping_seconds):
                found, has_ended = await jobs.next_events(job_id, after, _EVENTS_AT_ONCE)
        except TimeoutError:
            yield sse.PING
            continue
        for event in found:
            after = event.number
            yield _frame(event)
        if has_ended and len(found) < _EVENTS_AT_ONCE:
            return


def _frame(event: StoredEvent) -> bytes:
    return sse.frame(event.kind, json.loads(event.data), event.number)


def _wants_stream(request: Request) -> bool:
    """By ``Accept``: JSON unless the stream is named, and no media type of which we have none."""
    accept = request.headers.get("accept", "*/*")
    ranges = {part.split(";")[0].strip().lower() for part in accept.split(",")}
    if sse.MEDIA_TYPE in ranges:
        return True
    if ranges & {"application/json", "application/*", "*/*"}:
        return False
    if "text/*" in ranges:
        return True
    raise NotAcceptable("Events are application/json or text/event-stream; Accept allows neither.")


def _seconds_to_wait(prefer: str | None) -> int | None:
    """RFC 7240: a preference that is not understood is none."""
    found = None if prefer is None else _WAIT.search(prefer)
    return None if found is None else min(int(found[1]), MAX_WAIT_SECONDS)


async def _asked(body: FinetuneRequest, content: bytes, state: ServiceState) -> JobRequest:
    """The job of a body, within what this service and its model allow."""
    _check_limits(body, state)
    validation = body.validation if body.validation is not None else 0.0
    return JobRequest(
        tenant=TENANT,
        adapter=body.adapter,
        hyperparameters=await _hyperparameters(body, state),
        rows=body.data,
        validation=validation,
        init=body.init_version(),
        publish=_publish_every(body),
        is_promoted=body.publish != "never",
        promotion=_promotion(body),
        metadata=body.metadata,
        data_digest=_data_digest(content),
    )


def _check_limits(body: FinetuneRequest, state: ServiceState) -> None:
    """What depends on settings and on the loaded model."""
    readiness = state.view.readiness()
    if readiness.reason == "draining":
        raise Draining("The service is stopping and takes no new work.")
    info = state.view.info
    if info is None:
        raise Loading("The model is still loading; /ready shows how far it is.")
    settings = state.settings
    num_rows = len(body.data)
    if isinstance(body.validation, tuple):
        num_rows += len(body.validation)
    wrong = []
    if not info.adapter_slots:
        wrong.append(("/adapter", "this service has no room for adapters: see --adapter-slots"))
    elif body.rank > info.adapter_max_rank:
        wrong.append(("/rank", f"should be at most {info.adapter_max_rank}"))
    if num_rows > settings.job_rows:
        wrong.append(("/data", f"should have at most {settings.job_rows} rows"))
    if body.steps is not None and body.steps > settings.job_steps:
        wrong.append(("/steps", f"should be at most {settings.job_steps}"))
    if "max_length" in body.model_fields_set and body.max_length > info.context_tokens:
        wrong.append(("/max_length", f"should be at most {info.context_tokens}, the context"))
    if wrong:
        errors = tuple(FieldError(pointer, detail) for pointer, detail in wrong)
        raise InvalidField("The job is beyond a limit of this service.", errors=errors)


async def _hyperparameters(body: FinetuneRequest, state: ServiceState) -> Hyperparameters:
    info = state.view.info
    assert info is not None, "checked before"
    given = body.model_fields_set
    layout, rank, alpha = body.layout, body.rank, body.alpha
    targets: tuple[str, ...] = tuple(body.targets)
    if (init := body.init_version()) is not None:
        form = (await state.trained().versions.present(*init)).form
        if form is not None:
            layout = body.layout if "layout" in given else form.layout
            rank = body.rank if "rank" in given else form.rank
            targets = targets if "targets" in given else form.targets
            alpha = form.alpha if alpha is None and rank == form.rank else alpha
    return Hyperparameters(
        form=Form(layout, rank, float(rank if alpha is None else alpha), targets),
        epochs=body.epochs,
        steps=body.steps,
        batch_size=body.batch_size,
        learning_rate=body.learning_rate,
        schedule=body.schedule,
        warmup_steps=body.warmup_steps,
        weight_decay=body.weight_decay,
        grad_clip=body.grad_clip,
        max_length=min(body.max_length, info.context_tokens),
        seed=body.seed,
    )


def _publish_every(body: FinetuneRequest) -> int | None:
    match body.publish:
        case "every_step":
            return 1
        case "end" | "never":
            return None
        case _ as publish:
            return publish.every


def _promotion(body: FinetuneRequest) -> Promotion | None:
    if body.promote is None:
        return None
    bound = body.promote.less_than
    return Promotion(None if bound == "init" else float(bound))


def _canonical(content: Any) -> bytes:
    """The same bytes for the same JSON, however it was written."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _data_digest(content: bytes) -> str:
    sent = msgspec.json.decode(content)
    rows = _canonical([sent["data"], sent.get("validation")])
    return f"sha256:{hashlib.sha256(rows).hexdigest()}"


async def _job(record: JobRecord, state: ServiceState) -> Job:
    return job_of(record, state.settings.served_name, state.adapters)


def _json(answer: Job | DryRun, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(answer.model_dump_json(), status, headers, "application/json")
