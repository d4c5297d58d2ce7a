"""POST /score: how likely given texts are.

No status line leaves before everything is known, so whatever goes wrong is a real HTTP status.
"""

import base64
import math
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Request, Response

from service.adapters import ServedModel
from service.api.clients import answer_unless_left, check_accept
from service.api.route import StrictRoute
from service.api.schemas import TopLogprob
from service.api.score_schemas import (
    Attribution,
    AttributionRequest,
    CapturedStream,
    Logits,
    ScoredTarget,
    ScoredToken,
    ScoreInput,
    ScoreRequest,
    ScoreResponse,
    ScoreResult,
    ScoreTimings,
    ScoreUsage,
    Tensor,
    TokenAttribution,
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
from service.protocol import messages as protocol
from service.protocol.messages import (
    Attribute,
    InputAttribution,
    InputScore,
    Score,
    Scored,
    ScoredContext,
    ScoredIds,
    ScoredText,
    TargetScore,
    TokenScore,
)
from service.worker_client import Scoring

router = APIRouter(route_class=StrictRoute)

# Until keys come there is one tenant.
_TENANT = "default"


@router.post(
    "/score",
    response_model=ScoreResponse,
    response_model_exclude_unset=True,
    responses=error_responses(
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
    check_accept(request, "application/json")
    meter = ScoreMeter(state.metrics)
    try:
        model = _model(body, state)
        command = _command(body, state, model)
        if state.view.readiness().reason == "draining":
            raise Draining("The service is stopping and takes no new work.")
        scoring = await state.worker.score(command)
    except ServiceError as error:
        meter.failed(error.code)
        raise
    except BaseException:
        meter.abandoned()
        raise
    with closing(_Measured(scoring, meter)) as measured:
        return await answer_unless_left(request, _answer(measured, body, model))


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


async def _answer(measured: _Measured, body: ScoreRequest, model: ServedModel) -> Response:
    try:
        scored = await measured.scoring.scored()
    except ServiceError as error:
        measured.meter.failed(error.code)
        raise
    response = _response(scored, body, model.name)
    measured.meter.finished(
        response.usage.prompt_tokens,
        scored.timings.queue_seconds,
        has_adapter=model.adapter is not None,
    )
    return Response(
        response.model_dump_json(exclude_unset=True),
        media_type="application/json",
        headers={"X-Model": response.model},
    )


def _model(body: ScoreRequest, state: ServiceState) -> ServedModel:
    """The one that is to score. A name that nothing has is told before there are too many."""
    names: list[str | None] = [*body.models] if body.models else [body.model]
    models = [state.model(name) for name in names]
    if len(models) > 1:
        detail = "should have one model; several are not compared yet"
        raise InvalidField(detail, errors=(FieldError("/models", detail),))
    return models[0]


def _command(body: ScoreRequest, state: ServiceState, model: ServedModel) -> Score:
    limit = state.settings.request_timeout_seconds
    seconds = limit if body.timeout_s is None else min(body.timeout_s, limit)
    return Score(
        request_id=f"sco_{uuid4().hex}",
        tenant=_TENANT,
        deadline=time.monotonic() + seconds,
        adapter=model.adapter,
        inputs=tuple(_input(each) for each in body.inputs),
        tells_tokens=body.tells_tokens or "logits" in body.return_,
        num_top=body.top,
        tells_logits="logits" in body.return_,
        priority=body.priority,
        interventions=tuple(each.command() for each in body.interventions),
        captures=tuple(each.command() for each in body.capture),
        attribution=None if body.attribution is None else _attribute(body.attribution),
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


def _response(scored: Scored, body: ScoreRequest, model: str) -> ScoreResponse:
    results = [
        ScoreResult(
            input_index=index,
            model=model,
            prompt_tokens=found.num_prompt_tokens,
            targets=_targets(found, given, body.return_),
        )
        for index, (found, given) in enumerate(zip(scored.inputs, body.inputs, strict=True))
    ]
    if body.capture:
        for found, result in zip(scored.inputs, results, strict=True):
            result.captures = [_captured(each) for each in found.captures]
    if "logits" in body.return_:
        [found], [result] = scored.inputs, results
        result.logits = _logits(found)
    if body.attribution is not None:
        for found, result in zip(scored.inputs, results, strict=True):
            assert found.attribution is not None, "it was asked for"
            result.attribution = _attribution(found.attribution, body.attribution)
    num_tokens = sum(
        result.prompt_tokens
        + sum(target.num_tokens for target in result.targets if given.context is not None)
        for result, given in zip(results, body.inputs, strict=True)
    )
    return ScoreResponse(
        id=scored.request_id,
        model=model,
        results=results,
        usage=ScoreUsage(prompt_tokens=num_tokens, cached_tokens=0),
        timings=ScoreTimings(
            queue_s=scored.timings.queue_seconds, total_s=scored.timings.total_seconds
        ),
    )


def _targets(found: InputScore, given: ScoreInput, wanted: Sequence[str]) -> list[ScoredTarget]:
    texts: Sequence[str | None] = given.targets or [given.text]
    total = _log_sum([target.logprob for target in found.targets])
    return [
        _target(target, text, total, wanted)
        for target, text in zip(found.targets, texts, strict=True)
    ]


def _target(
    target: TargetScore, text: str | None, total: float, wanted: Sequence[str]
) -> ScoredTarget:
    """With the fields that are wanted; the others stay unset, and so are not sent."""
    told = ScoredTarget(text=text, num_tokens=target.num_tokens, num_bytes=target.num_bytes)
    tells_tokens = "tokens" in wanted or "top" in wanted
    if "logprob" in wanted or tells_tokens:
        told.logprob = target.logprob
    if "loss" in wanted:
        told.loss = -target.logprob / target.num_tokens
    if "prob" in wanted:
        told.prob = math.exp(target.logprob - total)
    if "greedy" in wanted:
        told.greedy = target.is_greedy
    if tells_tokens:
        told.tokens = [_token(token) for token in target.tokens]
    return told


def _logits(found: InputScore) -> Logits:
    """Of the one target; it tells its tokens whenever there are logits."""
    [target] = found.targets
    positions = [token.position - 1 for token in target.tokens]
    shape = [len(positions), len(found.logits) // (4 * len(positions))]
    text = base64.b64encode(found.logits).decode("ascii")
    return Logits(positions=positions, tensor=Tensor(b64=text, dtype="float32", shape=shape))


def _captured(found: protocol.CapturedStream) -> CapturedStream:
    dtype, size = ("float16", 2) if found.is_half else ("float32", 4)
    num_rows = len(found.positions)
    width = len(found.numbers) // (size * num_rows) if num_rows else 0
    text = base64.b64encode(found.numbers).decode("ascii")
    return CapturedStream(
        target_index=found.target_index,
        layer=found.layer,
        positions=list(found.positions),
        tensor=Tensor.model_validate({"b64": text, "dtype": dtype, "shape": [num_rows, width]}),
    )


def _attribution(found: InputAttribution, asked: AttributionRequest) -> Attribution:
    scores, tensor = None, None
    if asked.reduce == "none":
        shape = [found.num_tokens, len(found.tensor) // (4 * found.num_tokens)]
        text = base64.b64encode(found.tensor).decode("ascii")
        tensor = Tensor(b64=text, dtype="float32", shape=shape)
    else:
        scores = [
            TokenAttribution(position=position, id=each.id, token=each.token, score=each.score)
            for position, each in enumerate(found.tokens)
        ]
    return Attribution(
        of=asked.of,
        layer=asked.layer,
        scores=scores,
        tensor=tensor,
        completeness_error=found.completeness_error,
    )


def _log_sum(logprobs: Sequence[float]) -> float:
    most = max(logprobs)
    return most + math.log(sum(math.exp(logprob - most) for logprob in logprobs))


def _token(found: TokenScore) -> ScoredToken:
    return ScoredToken(
        **_fields(found.token),
        top=[TopLogprob(**_fields(token)) for token in found.top],
        position=found.position,
        rank=found.rank,
    )


def _fields(token: protocol.TokenLogprob) -> dict[str, Any]:
    return {**msgspec.structs.asdict(token), "bytes": list(token.bytes)}
