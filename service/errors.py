"""Everything that can go wrong, as a caller sees it.

* ServiceError
  x RequestError              change the request
    + MalformedJson           400
    + NotFound                404
    + RequestNotFound         404
    + ModelNotFound           404
    + JobNotFound             404
    + AdapterNotFound         404
    + MethodNotAllowed        405
    + NotAcceptable           406
    + BodyTimeout             408
    + RequestCancelled        409
    + VersionConflict         409
    + AdapterBusy             409
    + AdapterMismatch         409
    + IdempotencyMismatch     409
    + BodyTooLarge            413
    + UnsupportedMediaType    415
    + InvalidField            422
    + ContextLengthExceeded   422
  x CapacityError             send the same request later
    + QueueFull               429
    + JobLimit                429
    + Loading                 503
    + Draining                503
  x WorkerError               the request was fine, and we failed it
    + WorkerRestarting        503
    + DeadlineExceeded        504
    + StorageFull             507
    + NumericalError          500
    + InternalError           500
"""

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

PROBLEM_MEDIA_TYPE = "application/problem+json"
MAX_FIELD_ERRORS = 10
MAX_DETAIL_CHARACTERS = 280


@dataclass(frozen=True, slots=True)
class FieldError:
    """One field that is wrong: where (RFC 6901, from the body's root) and why."""

    pointer: str
    detail: str


class ServiceError(Exception):
    """Base of every error that reaches a caller.

    A subclass is a set of facts: the HTTP ``status``, the stable ``code`` that a client may
    switch on, a ``title`` that never varies, and whether the same request may succeed later.
    One that promises Retry-After also says after how many seconds, unless its raiser knows
    better. The detail names the number that broke the rule and what to do about it, and never
    repeats what the client sent.
    """

    status: ClassVar[HTTPStatus]
    code: ClassVar[str]
    title: ClassVar[str]
    retryable: ClassVar[bool] = False
    default_retry_after_seconds: ClassVar[int | None] = None

    def __init__(
        self,
        detail: str,
        *,
        errors: tuple[FieldError, ...] = (),
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors
        if retry_after_seconds is None:
            retry_after_seconds = self.default_retry_after_seconds
        self.retry_after_seconds = retry_after_seconds


class RequestError(ServiceError):
    """The request cannot succeed as written."""


class MalformedJson(RequestError):
    """The body is not strict JSON, or its end on the wire is ambiguous."""

    status = HTTPStatus.BAD_REQUEST
    code = "malformed_json"
    title = "Body is not strict JSON"


class NotFound(RequestError):
    """No route has this path."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"
    title = "Not found"


class RequestNotFound(RequestError):
    """No request with that id is running here."""

    status = HTTPStatus.NOT_FOUND
    code = "request_not_found"
    title = "Request not found"


class ModelNotFound(RequestError):
    """No model of that name is served here."""

    status = HTTPStatus.NOT_FOUND
    code = "model_not_found"
    title = "Model not found"


class JobNotFound(RequestError):
    """No job has that id."""

    status = HTTPStatus.NOT_FOUND
    code = "job_not_found"
    title = "Job not found"


class AdapterNotFound(RequestError):
    """There is no such adapter, or it has no such version."""

    status = HTTPStatus.NOT_FOUND
    code = "adapter_not_found"
    title = "Adapter not found"


class MethodNotAllowed(RequestError):
    """The path exists, but not for this method."""

    status = HTTPStatus.METHOD_NOT_ALLOWED
    code = "method_not_allowed"
    title = "Method not allowed"


class NotAcceptable(RequestError):
    """``Accept`` leaves no media type that this route can send."""

    status = HTTPStatus.NOT_ACCEPTABLE
    code = "not_acceptable"
    title = "Not acceptable"


class BodyTimeout(RequestError):
    """The body did not arrive in time."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "body_timeout"
    title = "Body did not arrive in time"
    retryable = True


class RequestCancelled(RequestError):
    """Somebody cancelled it before there was anything to answer with."""

    status = HTTPStatus.CONFLICT
    code = "request_cancelled"
    title = "Request was cancelled"


class VersionConflict(RequestError):
    """Another version is live than the request expects."""

    status = HTTPStatus.CONFLICT
    code = "version_conflict"
    title = "Another version is live"


class AdapterBusy(RequestError):
    """A job still needs the adapter or the version."""

    status = HTTPStatus.CONFLICT
    code = "adapter_busy"
    title = "Adapter is in use"


class AdapterMismatch(RequestError):
    """The version was made for another model."""

    status = HTTPStatus.CONFLICT
    code = "adapter_mismatch"
    title = "Adapter is of another model"


class IdempotencyMismatch(RequestError):
    """Another request came with the same idempotency key."""

    status = HTTPStatus.CONFLICT
    code = "idempotency_mismatch"
    title = "Idempotency key was used before"


class BodyTooLarge(RequestError):
    """The body has more bytes, or comes in more pieces, than are taken."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "body_too_large"
    title = "Body is too large"


class UnsupportedMediaType(RequestError):
    """The body is declared as something other than JSON."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "unsupported_media_type"
    title = "Unsupported media type"


class InvalidField(RequestError):
    """A field is missing, unknown, of the wrong type or out of range."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid_field"
    title = "Invalid field"


class ContextLengthExceeded(RequestError):
    """Prompt plus ``max_tokens`` does not fit the context window."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "context_length_exceeded"
    title = "Context length exceeded"


class CapacityError(ServiceError):
    """The request is fine; it cannot be taken now."""

    retryable = True


class QueueFull(CapacityError):
    """As many requests or tokens are waiting, or large bodies arriving, as may be held."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "queue_full"
    title = "Queue is full"
    default_retry_after_seconds = 1


class JobLimit(CapacityError):
    """As many jobs run and wait as may."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "job_limit"
    title = "Too many jobs"
    default_retry_after_seconds = 10


class Loading(CapacityError):
    """The model is still being loaded or compiled."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "loading"
    title = "Model is loading"
    default_retry_after_seconds = 5


class Draining(CapacityError):
    """This replica finishes what it has and takes nothing new."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "draining"
    title = "Server is draining"
    default_retry_after_seconds = 5


class WorkerError(ServiceError):
    """The request was fine and we failed it."""


class WorkerRestarting(WorkerError):
    """The worker process died while it held this request, or is not back yet."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "worker_restarting"
    title = "Worker is restarting"
    retryable = True
    default_retry_after_seconds = 2


class DeadlineExceeded(WorkerError):
    """The request's time ran out before anything was produced."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    code = "deadline_exceeded"
    title = "Deadline exceeded"
    retryable = True


class StorageFull(WorkerError):
    """There is no room on the disk for what must last."""

    status = HTTPStatus.INSUFFICIENT_STORAGE
    code = "storage_full"
    title = "Storage is full"
    retryable = True


class NumericalError(WorkerError):
    """The model gave NaN or infinite logits for this request."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "numerical"
    title = "Numerical failure"


class InternalError(WorkerError):
    """A bug. The log line with this request id holds the traceback."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal"
    title = "Internal error"


def leaves(root: type[ServiceError] = ServiceError) -> list[type[ServiceError]]:
    """Every concrete error, in the order of the tree above."""
    children = root.__subclasses__()
    return [leaf for child in children for leaf in leaves(child)] if children else [root]


ERROR_BY_CODE: dict[str, type[ServiceError]] = {error.code: error for error in leaves()}


def problem(error: ServiceError, request_id: str) -> dict[str, Any]:
    """The RFC 9457 object of an error, the only form in which one leaves the process.

    An ``InternalError`` loses its detail here, so no raiser can leak through one.
    """
    detail = error.detail
    if isinstance(error, InternalError):
        detail = "A bug on our side. Quote the request id when you report it."
    body: dict[str, Any] = {
        "type": "/problems/" + error.code.replace("_", "-"),
        "title": error.title,
        "status": int(error.status),
        "detail": detail[:MAX_DETAIL_CHARACTERS],
        "code": error.code,
        "request_id": request_id,
    }
    if error.retry_after_seconds is not None:
        body["retry_after_s"] = error.retry_after_seconds
    if error.errors:
        body["errors"] = [
            {"pointer": field.pointer, "detail": field.detail[:MAX_DETAIL_CHARACTERS]}
            for field in error.errors[:MAX_FIELD_ERRORS]
        ]
    return body


def error_responses(*errors: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """The ``responses=`` of a route that may raise ``errors``, so OpenAPI lists each code."""
    by_status: dict[int, list[type[ServiceError]]] = {}
    for error in errors:
        by_status.setdefault(int(error.status), []).append(error)
    return {
        status: {
            "description": " ".join(f"`{error.code}`: {_summary(error)}" for error in same),
            "content": {PROBLEM_MEDIA_TYPE: {"schema": _problem_schema(status, same)}},
            **({"headers": _RETRY_AFTER} if any(_promises_retry(e) for e in same) else {}),
        }
        for status, same in sorted(by_status.items())
    }


_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds to wait before the same request.",
        "schema": {"type": "integer", "minimum": 1},
    }
}


def _promises_retry(error: type[ServiceError]) -> bool:
    return error.default_retry_after_seconds is not None


def _summary(error: type[ServiceError]) -> str:
    return (error.__doc__ or "").partition("\n")[0].replace("``", "`")


def _problem_schema(status: int, errors: Sequence[type[ServiceError]]) -> dict[str, Any]:
    string = {"type": "string"}
    return {
        "type": "object",
        "title": "Problem",
        "required": ["type", "title", "status", "detail", "code", "request_id"],
        "properties": {
            "type": {"type": "string", "format": "uri-reference"},
            "title": string,
            "status": {"type": "integer", "const": status},
            "detail": string,
            "code": {"type": "string", "enum": [error.code for error in errors]},
            "request_id": string,
            "retry_after_s": {"type": "integer", "minimum": 1},
            "errors": {
                "type": "array",
                "maxItems": MAX_FIELD_ERRORS,
                "items": {
                    "type": "object",
                    "required": ["pointer", "detail"],
                    "properties": {"pointer": string, "detail": string},
                },
            },
        },
    }
