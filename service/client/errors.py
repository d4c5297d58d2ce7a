"""Everything that can go wrong, by what a caller would do about it.

* GemmaError
  x ServiceError              the service said no, and why: see ``code``
    + RequestError            4xx: change the request
      - NotFound              404: no such model, request or route
      - Conflict              409: somebody else was there first
      - InvalidField          422: ``errors`` has a pointer for each wrong field
    + Unavailable             429, 503: send the same again after ``retry_after_s``
    + ServiceFailed           5xx: the request was fine, and the service failed it
  x JobFailed                 a fine-tune job that was waited for has failed
  x DataUnreadable            the file with the rows of a job: says which line
  x ConnectionFailed          nobody answers there; nothing was sent
  x ConnectionLost            broken off before the answer was whole
  x TimedOut                  no answer within ``timeout_s`` of the client
  x UnexpectedAnswer          not what this service would say; another program's address?

The family follows from the HTTP status, so a code that is newer than this client has one too. No
message holds anything that was sent.
"""

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from pydantic import BaseModel, ConfigDict, ValidationError


class FieldError(BaseModel):
    """One field that is wrong: where (RFC 6901, from the body's root) and why."""

    model_config = ConfigDict(frozen=True)

    pointer: str
    detail: str


class Problem(BaseModel):
    """The RFC 9457 object in which the service tells an error."""

    model_config = ConfigDict(frozen=True)

    status: int
    detail: str
    code: str | None = None
    request_id: str | None = None
    retry_after_s: float | None = None
    errors: tuple[FieldError, ...] = ()


class GemmaError(Exception):
    """Base of everything that the client raises."""


class ServiceError(GemmaError):
    """The service answered with an error.

    Attributes:
        status: HTTP status.
        code: What to switch on; it never changes. None if something between answered.
        detail: For people: the number that broke the rule and what to do about it.
        errors: The wrong fields of the body.
        request_id: Stands in the service's log.
        retry_after_s: Seconds after which the same request may succeed, if that is known.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.status = problem.status
        self.code = problem.code
        self.detail = problem.detail
        self.errors = problem.errors
        self.request_id = problem.request_id
        self.retry_after_s = problem.retry_after_s

    def __str__(self) -> str:
        fields = "; ".join(f"{field.pointer}: {field.detail}" for field in self.errors)
        known = {"HTTP": self.status, "code": self.code, "request": self.request_id}
        marks = ", ".join(f"{name} {value}" for name, value in known.items() if value)
        return " ".join(part for part in (self.detail, fields, f"({marks})") if part)


class RequestError(ServiceError):
    """The request cannot succeed as written."""


class NotFound(RequestError):
    """There is no such model, request or route."""


class Conflict(RequestError):
    """Somebody else was there first, with a cancel for example."""


class InvalidField(RequestError):
    """A field is missing, unknown or out of range, or the prompt does not fit; see ``errors``."""


class Unavailable(ServiceError):
    """The request is fine and cannot be taken now; the client's own retries are used up."""


class ServiceFailed(ServiceError):
    """The request was fine, and the service failed it."""


class JobFailed(GemmaError):
    """A fine-tune job ended without what was asked of it; versions that it made before stay.

    Attributes:
        job_id: Which job.
        code: What to switch on, such as ``non_finite_loss``.
        detail: For people.
    """

    def __init__(self, job_id: str, code: str, detail: str | None) -> None:
        super().__init__(job_id, code, detail)
        self.job_id = job_id
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        told = self.code if self.detail is None else f"{self.detail} ({self.code})"
        return f"Job {self.job_id} failed: {told}"


class DataUnreadable(GemmaError):
    """The rows of a job cannot be sent as they are; says which line of which file."""


class ConnectionFailed(GemmaError):
    """Nobody answers at the address; nothing was sent."""


class ConnectionLost(GemmaError):
    """The connection broke before the answer was whole.

    Attributes:
        num_tokens: How many had come of a stream, of all outputs together.
    """

    def __init__(self, detail: str, num_tokens: int = 0) -> None:
        super().__init__(detail)
        self.num_tokens = num_tokens


class TimedOut(GemmaError):
    """No answer came within the client's ``timeout_s``."""


class UnexpectedAnswer(GemmaError):
    """What came is not an answer of this service."""


_FAMILIES: dict[int, type[ServiceError]] = {
    404: NotFound,
    409: Conflict,
    422: InvalidField,
    429: Unavailable,
    503: Unavailable,
}


def error_of_problem(problem: Problem) -> ServiceError:
    """The exception for it, of the family of its status."""
    other = RequestError if 400 <= problem.status < 500 else ServiceFailed
    return _FAMILIES.get(problem.status, other)(problem)


def error_of_response(status: int, headers: Mapping[str, str], body: bytes) -> GemmaError:
    """The exception for a response that is no answer; not all are our service's own."""
    if status < 400:
        return UnexpectedAnswer(f"HTTP {status}: no answer of this service; check the address.")
    try:
        told = Problem.model_validate_json(body)
    except ValidationError:
        detail = "No problem object came with it, so something in between may have answered."
        told = Problem(status=status, detail=detail)
    seconds = retry_after_seconds(headers) if told.retry_after_s is None else told.retry_after_s
    return error_of_problem(told.model_copy(update={"status": status, "retry_after_s": seconds}))


def error_of_event(data: str) -> GemmaError:
    """The exception for the data of an ``error`` event."""
    try:
        return error_of_problem(Problem.model_validate_json(data))
    except ValidationError:
        return UnexpectedAnswer("The stream ended with an error that is no problem object.")


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds that ``Retry-After`` asks for; a date counts from the response's own ``Date``."""
    told = headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]{1,9}", told):
        return float(told)
    try:
        until, since = (parsedate_to_datetime(text) for text in (told, headers["Date"]))
        return max(0.0, (until - since).total_seconds())
    except (KeyError, TypeError, ValueError):
        return None
