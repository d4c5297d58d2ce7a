"""POST /score: how likely given texts are.

No status line leaves before everything is known, so whatever goes wrong is a real HTTP status.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from service.adapters import ServedModel
from service.api import safetensors
from service.api.clients import answer_unless_left, chosen_media_type
from service.api.problems import request_id
from service.api.route import StrictRoute
from service.api.safetensors import Base64Tensors, NamedTensors
from service.api.score_answers import score_response
from service.api.score_schemas import (
    AttributionRequest,
    ScoreInput,
    ScoreRequest,
    ScoreResponse,
)
from service.api.state import ServiceState, State
from service.errors import (
    AdapterMismatch,
    BodyTimeout,
    BodyTooLarge,
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    FieldError,
    InternalError,
    InvalidField,
    Loading,
    MalformedJson,
    ModelNotFound,
    NotAcceptable,
    NumericalError,
    QueueFull,
    RequestCancelled,
    ServiceError,
    UnsupportedMediaType,
    WorkerRestarting,
    error_responses,
)
from service.observability import ScoreMeter
from service.protocol.messages import (
    Attribute,
    Score,
    ScoredContext,
    ScoredIds,
    ScoredText,
)
from service.worker_client import Scoring

router = APIRouter(route_class=StrictRoute)

# Until keys come there is one tenant.
_TENANT = "default"
_JSON = "application/json"
_AS_FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The scores. A safetensors file has the JSON answer as `answer` in its "
        "metadata, and the numbers of each tensor under the `name` that stands there in place of "
        "`b64`. Ask for it with `Accept` where an answer has more than a MiB.",
        "content": {safetensors.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "/score",
    response_model=ScoreResponse,
    response_model_exclude_unset=True,
    responses=_AS_FILE
    | error_responses(
        AdapterMismatch,
        MalformedJson,
        ModelNotFound,
        NotAcceptable,
        BodyTimeout,
        RequestCancelled,
        BodyTooLarge,
        UnsupportedMediaType,
        InvalidField,
        ContextLengthExceeded,
        QueueFull,
        NumericalError,
        InternalError,
        Loading,
        Draining,
        WorkerRestarting,
        DeadlineExceeded,
    ),
)
async def score(body: ScoreRequest, request: Request, state: State) -> Response:
    """Scores targets behind a context, whole texts, or token ids."""
    media_type = chosen_media_type(request, _JSON, safetensors.MEDIA_TYPE)
    meter = ScoreMeter(state.metrics)
    try:
        models = _models(body, state)
        command = _command(body, state, models)
        if state.view.readiness().reason == "draining":
            raise Draining("The service is stopping and takes no new work.")
        scoring = await state.worker.score(command, request_id(request.scope))
    except ServiceError as error:
        meter.failed(error.code)
        raise
    except BaseException:
        meter.abandoned()
        raise
    with closing(_Measured(scoring, meter)) as measured:
        return await answer_unless_left(request, _answer(measured, body, models, media_type))


class _Measured:
    """A request that runs, and is measured however it ends."""

    def __init__(self, scoring: Scoring, meter: ScoreMeter) -> None:
        self.scoring = scoring
        self.meter = meter

    def close(self) -> None:
        """Ends the request if it is still running: the client has left."""
        if self.scoring.is_running:
            self.meter.abandoned()
        self.scoring.close()


async def _answer(
    measured: _Measured, body: ScoreRequest, models: Sequence[ServedModel], media_type: str
) -> Response:
    try:
        scored = await measured.scoring.scored()
    except ServiceError as error:
        measured.meter.failed(error.code)
        raise
    named = NamedTensors()
    is_file = media_type == safetensors.MEDIA_TYPE
    form = named if is_file else Base64Tensors()
    response = score_response(scored, body, [model.name for model in models], form)
    measured.meter.finished(
        response.usage.prompt_tokens,
        scored.timings.queue_seconds,
        has_adapter=any(model.adapter is not None for model in models),
    )
    text = response.model_dump_json(exclude_unset=True)
    return Response(
        named.file({"answer": text}) if is_file else text,
        media_type=media_type,
        headers={"X-Model": response.model},
    )


def _models(body: ScoreRequest, state: ServiceState) -> list[ServedModel]:
    """Those that are to score, the first of which the others are compared with."""
    names: list[str | None] = [*body.models] if body.models else [body.model]
    models = [state.model(name) for name in names]
    for place, model in enumerate(models):
        if model in models[:place]:
            # The live version of an adapter, and that version by its number.
            detail = "should be another version than those before it"
            raise InvalidField(detail, errors=(FieldError(f"/models/{place}", detail),))
    return models


def _command(body: ScoreRequest, state: ServiceState, models: Sequence[ServedModel]) -> Score:
    limit = state.settings.request_timeout_seconds
    seconds = limit if body.timeout_s is None else min(body.timeout_s, limit)
    return Score(
        request_id=f"sco_{uuid4().hex}",
        tenant=_TENANT,
        deadline=time.monotonic() + seconds,
        adapter=models[0].adapter,
        inputs=tuple(_input(each) for each in body.inputs),
        tells_tokens=body.tells_tokens or "logits" in body.return_,
        num_top=body.top,
        tells_logits="logits" in body.return_,
        priority=body.priority,
        interventions=tuple(each.command() for each in body.interventions),
        captures=tuple(each.command() for each in body.capture),
        attribution=None if body.attribution is None else _attribute(body.attribution),
        compared=tuple(model.adapter for model in models[1:]),
    )


def _attribute(asked: AttributionRequest) -> Attribute:
    target = asked.target if asked.of == "target_logprob" else None
    return Attribute(asked.layer, target, asked.num_steps, asked.reduce)


def _input(given: ScoreInput) -> ScoredText | ScoredContext | ScoredIds:
    if given.text is not None:
        return ScoredText(given.text)
    if given.context is not None:
        assert given.targets is not None, "checked with the schema"
        return ScoredContext(given.context, tuple(given.targets))
    assert given.token_ids is not None, "checked with the schema"
    return ScoredIds(
        tuple(given.token_ids),
        None if given.target_ids is None else tuple(given.target_ids),
        None if given.target_mask is None else tuple(map(bool, given.target_mask)),
    )
