"""Routes for operators: is the process alive, does it take work, what does it serve."""

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.api import finetune_schemas, intervention_schemas, schemas, score_schemas
from service.api.schemas import AdapterLimits, Health, Info, Ready, SelfTestResult
from service.api.state import State
from service.errors import Loading, WorkerRestarting, error_responses
from service.protocol.messages import SelfTest
from service.version import VERSION

router = APIRouter()


@router.get("/health", response_model=Health)
async def health() -> Health:
    """200 whenever the process runs; it never asks the worker."""
    return Health()


@router.get(
    "/ready",
    response_model=Ready,
    responses={503: {"model": Ready, "description": "Not ready; `reason` says why."}},
)
async def ready(state: State) -> Response:
    """200 only when work is taken."""
    readiness = state.view.readiness()
    is_ready = readiness.reason is None
    body = Ready(ready=is_ready, reason=readiness.reason, progress=readiness.progress)
    headers = {} if is_ready else {"Retry-After": "1"}
    return Response(
        body.model_dump_json(exclude_none=True),
        status_code=200 if is_ready else 503,
        media_type="application/json",
        headers=headers,
    )


@router.get("/info", response_model=Info, responses=error_responses(Loading, WorkerRestarting))
async def info(state: State) -> Info:
    """What is served, on what, and within which limits."""
    loaded = state.view.info
    if loaded is None:
        raise Loading("The model is still loading; /ready shows how far it is.")
    return Info(
        model=state.settings.served_name,
        preset=loaded.preset,
        preset_digest=loaded.preset_digest,
        family=loaded.family,
        instruct=loaded.is_instruct,
        has_tokenizer=loaded.has_tokenizer,
        parameters=loaded.num_parameters,
        dtype=loaded.dtype,
        quantization=None,
        backend=loaded.backend,
        device=loaded.device,
        kernels=loaded.kernels,
        kernels_reason=loaded.kernels_reason,
        context_tokens=loaded.context_tokens,
        slots=loaded.num_slots,
        vocabulary_size=loaded.vocabulary_size,
        layers=loaded.num_layers,
        hidden_dim=loaded.hidden_dim,
        limits=_limits(state, loaded.context_tokens, loaded.vocabulary_size),
        buckets=dict(loaded.buckets),
        programs=list(loaded.programs),
        self_test=_self_test(loaded.self_test),
        defaults=_defaults(),
        adapters=AdapterLimits(slots=loaded.adapter_slots, max_rank=loaded.adapter_max_rank),
        version=VERSION,
    )


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(state: State) -> Response:
    """Prometheus' text format."""
    state.view.refresh_gauges(state.metrics)
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _limits(state: State, context_tokens: int, vocabulary_size: int) -> dict[str, Any]:
    settings = state.settings
    return {
        "max_tokens": context_tokens,
        "context_tokens": context_tokens,
        "prompts": schemas.MAX_PROMPTS,
        "outputs": schemas.MAX_COMPLETIONS,
        "score_inputs": score_schemas.MAX_INPUTS,
        "score_targets": score_schemas.MAX_TARGETS,
        "score_models": score_schemas.MAX_MODELS,
        "score_top": score_schemas.MAX_TOP,
        "score_logit_positions": score_schemas.MAX_LOGIT_PLACES,
        "intervention_positions": intervention_schemas.MAX_POSITIONS,
        "intervention_scale": intervention_schemas.MAX_SCALE,
        "captures": intervention_schemas.MAX_CAPTURES,
        "capture_bytes": intervention_schemas.MAX_CAPTURE_BYTES,
        "tensor_bytes": intervention_schemas.MAX_TENSOR_BYTES,
        "attribution_tokens": min(score_schemas.MAX_ATTRIBUTION_TOKENS, context_tokens),
        "attribution_steps": score_schemas.MAX_ATTRIBUTION_STEPS,
        "attribution_work_tokens": score_schemas.MAX_ATTRIBUTION_WORK,
        "attribution_bytes": score_schemas.MAX_ATTRIBUTION_BYTES,
        "token_id": vocabulary_size - 1,
        "queue_requests": settings.queue_requests,
        "queue_tokens": settings.queue_tokens,
        "body_bytes": settings.body_bytes,
        "job_rows": settings.job_rows,
        "job_row_tokens": min(finetune_schemas.MAX_ROW_TOKENS, context_tokens),
        "job_steps": settings.job_steps,
        "running_jobs": settings.running_jobs,
        "queued_jobs": settings.queued_jobs,
        "job_body_bytes": settings.job_body_bytes,
        "adapter_body_bytes": settings.adapter_body_bytes,
        "timeout_s": settings.request_timeout_seconds,
        **schemas.field_limits(),
    }


def _self_test(passed: SelfTest | None) -> SelfTestResult | None:
    if passed is None:
        return None
    return SelfTestResult(
        row_counts=list(passed.row_counts),
        chunk_tokens=list(passed.chunk_tokens),
        comparisons=passed.num_comparisons,
    )


def _defaults() -> dict[str, Any]:
    fields = schemas.GenerateRequest.model_fields
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in fields.items()
        if not field.is_required()
    }
