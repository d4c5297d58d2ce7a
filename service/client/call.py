"""One request as it is sent, and the reading of its answer: all without a socket."""

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlencode

from pydantic import BaseModel, ConfigDict, ValidationError

from service.client.errors import GemmaError, UnexpectedAnswer, error_of_response

JSON = "application/json"
EVENT_STREAM = "text/event-stream"
FILE = "application/octet-stream"
SAFETENSORS = "application/x-safetensors"


@dataclass(frozen=True, slots=True)
class Call:
    """One request.

    Attributes:
        method: GET, POST, PUT, PATCH or DELETE.
        path: Below the address of the service.
        body: JSON or a file; None for no body at all.
        content_type: Of the body.
        accept: Media type of the answer.
        key: Idempotency-Key. What has one is done once, however often it is sent.
        last_event_id: Of a stream that goes on behind this event.
        request_id: What the caller calls it, if anything.
        statuses: Those whose body is the answer; any other is an error.
        error: Makes the exception of any other, from status, headers and body.
    """

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    body: bytes | None = field(default=None, repr=False)
    content_type: str = JSON
    accept: str = JSON
    key: str | None = None
    last_event_id: int | None = None
    request_id: str | None = None
    statuses: frozenset[int] = frozenset({200})
    error: Callable[[int, Mapping[str, str], bytes], GemmaError] = error_of_response

    def headers(self) -> dict[str, str]:
        """Those that differ between calls."""
        told = {"Accept": self.accept}
        if self.body is not None:
            told["Content-Type"] = self.content_type
        if self.key is not None:
            told["Idempotency-Key"] = self.key
        if self.last_event_id is not None:
            told["Last-Event-ID"] = str(self.last_event_id)
        if self.request_id is not None:
            told["X-Request-Id"] = self.request_id
        return told


def new_key() -> str:
    """An Idempotency-Key that nobody has used."""
    return uuid.uuid4().hex


def below(path: str, *names: str | int, **query: object) -> str:
    """The path of ``names`` below ``path``, and what is asked of it; None is left out."""
    parts = [path, *(quote(str(name), safe="") for name in names)]
    told = urlencode({name: value for name, value in query.items() if value is not None})
    return "/".join(parts) + (f"?{told}" if told else "")


def to_json(body: Mapping[str, Any]) -> bytes:
    """As it is. The service judges it: what JSON lacks (NaN, half a surrogate pair) goes out too,
    and comes back as `RequestError`.
    """
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def check_names(fields: Mapping[str, Any], known: type, function: str) -> None:
    """Raises `TypeError` for a keyword that ``known``, a typed dictionary, does not have."""
    unknown = sorted(fields.keys() - known.__annotations__.keys())
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")


class Answer(BaseModel):
    """Base of all answers. A field that is newer than this client is kept, without a type."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


AnswerT = TypeVar("AnswerT", bound=Answer)


def read(
    answer: type[AnswerT], body: bytes | str, tensors: Mapping[str, bytes] | None = None
) -> AnswerT:
    """The answer in ``body``; ``tensors`` are what it names of the file that it came in."""
    try:
        return answer.model_validate_json(body, context=tensors)
    except ValidationError as error:
        # Without its input, which pydantic would show.
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "its beginning"
        detail = f"{answer.__name__} cannot be read at {place}: {first['msg']}."
        raise UnexpectedAnswer(f"{detail} Is this the address of a Gemma service?") from None
