"""Whatever a handler raises, as one ``application/problem+json`` response.

``problem_response`` is the only place that builds one: the middlewares of ``service.edge``
call it too. None of it repeats the request, save the names of fields inside pointers.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from service.errors import (
    MAX_FIELD_ERRORS,
    PROBLEM_MEDIA_TYPE,
    BodyTooLarge,
    FieldError,
    InternalError,
    InvalidField,
    MalformedJson,
    MethodNotAllowed,
    NotAcceptable,
    NotFound,
    ServiceError,
    UnsupportedMediaType,
    problem,
)

logger = logging.getLogger(__name__)

MAX_PROBLEM_BYTES = 2048
MAX_FIELD_NAME_CHARACTERS = 48

# Types whose message is a constant, or one with numbers from the schema. The others may quote
# what they met (a date, a tag of a union, a URL), so their message is not passed on.
_MESSAGE_IS_SAFE = frozenset(
    {
        "bool_type",
        "finite_number",
        "float_type",
        "greater_than",
        "greater_than_equal",
        "int_from_float",
        "int_type",
        "less_than",
        "less_than_equal",
        "list_type",
        "literal_error",
        "none_required",
        "string_too_long",
        "string_too_short",
        "string_type",
        "string_unicode",
        "too_long",
        "too_short",
    }
)
# What our own validators raise; see service.api.schemas.
OWN_ERROR_TYPE = "invalid_field"

_ERROR_BY_STATUS: dict[int, tuple[type[ServiceError], str]] = {
    400: (MalformedJson, "The request could not be read."),
    404: (NotFound, "Nothing is served under this path."),
    405: (
        MethodNotAllowed,
        "This path does not take this method; Allow lists those it takes.",
    ),
    406: (NotAcceptable, "Accept leaves no media type that this route can send."),
    413: (BodyTooLarge, "The body is larger than this route takes."),
    415: (UnsupportedMediaType, "Send the body as application/json."),
}


def install(app: FastAPI) -> None:
    """Makes every error that a route raises a problem.

    Not for ``Exception``: Starlette sends that handler's response from outside all of the
    middlewares, so without its request id, and raises again afterwards.
    ``service.edge.UnhandledErrors`` does it in its place.
    """
    app.add_exception_handler(ServiceError, _from_service_error)
    app.add_exception_handler(RequestValidationError, _from_validation_error)
    app.add_exception_handler(HTTPException, _from_http_exception)


def request_id(scope: Scope) -> str:
    """The id that ``service.edge.RequestId`` gave the request; empty without it."""
    identifier: str = scope.get("state", {}).get("request_id", "")
    return identifier


def problem_response(
    error: ServiceError, request_id: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The response for an error, of at most ``MAX_PROBLEM_BYTES``."""
    content = problem(error, request_id)
    body = _encode(content)
    while len(body) > MAX_PROBLEM_BYTES and content.get("errors"):
        content["errors"].pop()
        body = _encode(content)
    headers = dict(headers or {})
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    return Response(body, int(error.status), headers, PROBLEM_MEDIA_TYPE)


def unhandled(exception: Exception, request_id: str) -> InternalError:
    """Logs a bug, with its traceback, and gives what the caller may know of it."""
    logger.error(
        "request %s met a bug",
        request_id,
        exc_info=exception,
        extra={"request_id": request_id},
    )
    return InternalError("An exception that nothing handles.")


def _encode(content: dict[str, Any]) -> bytes:
    # No surrogate should come this far; were one to, this response must still be sent.
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


async def _from_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError), f"installed for ServiceError, got {type(error)}"
    identifier = request_id(request.scope)
    if error.status >= 500 and not error.retryable:
        logger.error(
            "request %s failed: %s",
            identifier,
            error.code,
            exc_info=error,
            extra={"request_id": identifier},
        )
    return problem_response(error, identifier)


async def _from_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), f"installed for another, got {type(error)}"
    return problem_response(invalid_field(error.errors()), request_id(request.scope))


async def _from_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), f"installed for HTTPException, got {type(error)}"
    identifier = request_id(request.scope)
    known = _ERROR_BY_STATUS.get(error.status_code)
    if known is None:
        return problem_response(unhandled(error, identifier), identifier)
    error_class, detail = known
    return problem_response(error_class(detail), identifier, error.headers)


def invalid_field(errors: Sequence[Mapping[str, Any]]) -> InvalidField:
    """The error for pydantic's list of errors, whose locations begin with where they are."""
    fields = tuple(
        FieldError(pointer(error["loc"][1:]), _detail(error)) for error in errors[:MAX_FIELD_ERRORS]
    )
    count = "One field is" if len(errors) == 1 else f"{len(errors)} fields are"
    return InvalidField(f"{count} not as the contract has them; see errors.", errors=fields)


def pointer(location: Sequence[str | int]) -> str:
    """The RFC 6901 pointer of a place in the body.

    It stops in front of a name that no contract would hold, so that a client cannot have us
    repeat a long or unprintable one.
    """
    parts: list[str] = []
    for part in map(str, location):
        if len(part) > MAX_FIELD_NAME_CHARACTERS or not (part.isascii() and part.isprintable()):
            break
        parts.append("/" + part.replace("~", "~0").replace("/", "~1"))
    return "".join(parts)


def _detail(error: Mapping[str, Any]) -> str:
    kind, message = error["type"], str(error["msg"])
    if kind == "extra_forbidden":
        return "is not a field of this request"
    if kind == "missing":
        return "is required"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "should be a JSON object"
    if kind == OWN_ERROR_TYPE or kind in _MESSAGE_IS_SAFE:
        return message.replace("Input should", "should")
    return "is not valid"
