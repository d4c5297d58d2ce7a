"""What is served, whether it takes work, and the end of a request from outside."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from service.client.call import Answer, Call, read
from service.client.errors import (
    GemmaError,
    Problem,
    UnexpectedAnswer,
    error_of_problem,
    error_of_response,
    retry_after_seconds,
)


class Health(Answer):
    """The process is alive; says nothing about the worker."""

    status: str


class Ready(Answer):
    """Whether work is taken; ``reason`` says why not, ``progress`` how far a start is, 0 to 1."""

    ready: bool
    reason: str | None = None
    progress: float | None = None


class SelfTestResult(Answer):
    """That answers do not depend on company, as tried on the machine of the service."""

    passed: bool
    row_counts: list[int]
    chunk_tokens: list[int]
    comparisons: int


class AdapterLimits(Answer):
    """How many adapters are in memory at once, and of which rank they may be."""

    slots: int
    max_rank: int


class Info(Answer):
    """What is served, on what, within which limits and with which defaults."""

    model: str
    preset: str
    preset_digest: str
    family: str
    instruct: bool | None
    has_tokenizer: bool
    parameters: int
    dtype: str
    quantization: str | None
    backend: str
    device: str
    kernels: str
    kernels_reason: str | None
    context_tokens: int
    slots: int
    vocabulary_size: int
    layers: int
    hidden_dim: int
    limits: dict[str, Any]
    buckets: dict[str, Any]
    programs: list[str]
    self_test: SelfTestResult | None
    adapters: AdapterLimits
    defaults: dict[str, Any]
    version: str


HEALTH = Call("GET", "/health")
INFO = Call("GET", "/info")
# That it is not ready is an answer too.
READY = Call("GET", "/ready", statuses=frozenset({200, 503}))


def cancel_call(request_id: str) -> Call:
    """Ends a running request; its own answer has what there was."""
    path = f"/requests/{quote(request_id, safe='')}"
    return Call("DELETE", path, statuses=frozenset({204}))


def _not_ready(status: int, headers: Mapping[str, str], body: bytes) -> GemmaError:
    """`Unavailable`, for which the transports send again."""
    try:
        ready = read(Ready, body)
    except UnexpectedAnswer:
        return error_of_response(status, headers, body)
    progress = "" if ready.progress is None else f", {ready.progress:.0%} of the start is done"
    problem = Problem(
        status=status,
        code=ready.reason,
        detail=f"The service is not ready: {ready.reason}{progress}.",
        retry_after_s=retry_after_seconds(headers),
    )
    return error_of_problem(problem)


READY_AT_LAST = Call("GET", "/ready", error=_not_ready)
