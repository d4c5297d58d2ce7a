"""service.errors and service.api.problems: one tree, one body, nothing of the input in it."""

import asyncio
import json
import logging
import random
import re
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException

from service import errors
from service.api import problems
from service.api.route import StrictRoute
from service.api.schemas import GenerateRequest
from service.edge import edge_middleware
from service.errors import (
    FieldError,
    InternalError,
    InvalidField,
    NumericalError,
    QueueFull,
    RequestError,
    ServiceError,
    WorkerRestarting,
)

MARKER = "QZXMARKERZXQ"
JSON = {"Content-Type": "application/json"}


def build_app(raised: Exception | None = None) -> FastAPI:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/generate")
    async def generate(body: GenerateRequest) -> dict[str, int]:
        if raised is not None:
            raise raised
        return {"prompts": len(body.prompts())}

    app = FastAPI(
        middleware=edge_middleware(max_body_bytes=1 << 20, body_timeout_seconds=5),
        redirect_slashes=False,
    )
    app.include_router(router)
    problems.install(app)
    return app


def build_stock_app() -> FastAPI:
    app = FastAPI()

    @app.post("/generate")
    async def generate(body: GenerateRequest) -> GenerateRequest:
        return body

    return app


def post_all(app: FastAPI, bodies: list[bytes]) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return [await client.post("/generate", content=b, headers=JSON) for b in bodies]

    return asyncio.run(run())


def post(app: FastAPI, body: bytes) -> httpx.Response:
    return post_all(app, [body])[0]


def faults(response: httpx.Response) -> list[str]:
    """What keeps a response from being a good answer to hostile input."""
    if response.status_code == 200:
        return []
    found = [f"status {response.status_code}"] if response.status_code >= 500 else []
    if len(response.content) > 2048:
        found.append(f"{len(response.content)} bytes")
    if response.headers["content-type"] != "application/problem+json":
        return [*found, "not a problem"]
    problem = response.json()
    if errors.ERROR_BY_CODE[problem["code"]].status != response.status_code:
        found.append("code and status disagree")
    # The name of an unknown field is in its pointer, and nothing else of the body anywhere.
    for field in problem.get("errors", []):
        field.pop("pointer")
    if MARKER in json.dumps(problem):
        found.append("echo")
    return found


def test_the_drawn_tree_is_the_tree_of_classes():
    drawn: list[tuple[int, str, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"( *)[*x+] (\w+)(.*)", line):
            drawn.append((len(match[1]) // 2, match[2], match[3].strip()))

    def walk(error: type[ServiceError], depth: int) -> list[tuple[int, str, str]]:
        status = str(int(error.status)) if not error.__subclasses__() else ""
        below = [row for child in error.__subclasses__() for row in walk(child, depth + 1)]
        return [(depth, error.__name__, status), *below]

    found = walk(ServiceError, 0)
    assert [(depth, name) for depth, name, _ in drawn] == [(d, name) for d, name, _ in found]
    for (_, name, drawn_fact), (_, _, status) in zip(drawn, found, strict=True):
        assert not status or drawn_fact == status, name


@pytest.mark.parametrize("error", errors.leaves())
def test_each_error_says_all_its_facts(error):
    assert errors.ERROR_BY_CODE[error.code] is error
    assert re.fullmatch(r"[a-z_]+", error.code)
    assert error.title
    assert (error.__doc__ or "").partition("\n")[0].endswith(".")
    if error.status in (429, 503):
        assert error.retryable
        assert error("x").retry_after_seconds >= 1


def test_codes_are_unique():
    assert len(errors.ERROR_BY_CODE) == len(errors.leaves())


def test_a_problem_is_written_as_the_contract_draws_it():
    error = QueueFull("64 requests are waiting.", retry_after_seconds=2)
    assert errors.problem(error, "r-1") == {
        "type": "/problems/queue-full",
        "title": "Queue is full",
        "status": 429,
        "detail": "64 requests are waiting.",
        "code": "queue_full",
        "request_id": "r-1",
        "retry_after_s": 2,
    }


def test_a_problem_lists_fields_only_when_there_are_any():
    field = FieldError("/top_p", "must be in (0, 1]")
    assert errors.problem(InvalidField("x", errors=(field,)), "r")["errors"] == [
        {"pointer": "/top_p", "detail": "must be in (0, 1]"}
    ]
    assert "errors" not in errors.problem(InvalidField("x"), "r")


def test_an_internal_error_never_tells_its_detail():
    assert "secret" not in json.dumps(errors.problem(InternalError("secret"), "r"))


@pytest.mark.parametrize("letter", ["a", "\n", "é", "\U0001f600", "\ud800"])
def test_no_problem_is_longer_than_2_kib_whatever_its_raiser_wrote(letter):
    fields = (FieldError("/" + letter * 50, letter * 1000),) * 1000
    response = problems.problem_response(InvalidField(letter * 10_000, errors=fields), "r" * 64)
    assert len(response.body) <= 2048
    assert json.loads(bytes(response.body))["code"] == "invalid_field"


def test_openapi_lists_each_code_once_under_its_status():
    codes = ["loading", "draining", "worker_restarting"]
    responses = errors.error_responses(QueueFull, *(errors.ERROR_BY_CODE[c] for c in codes))
    assert list(responses) == [429, 503]
    schema = responses[503]["content"]["application/problem+json"]["schema"]
    assert schema["properties"]["code"]["enum"] == codes
    assert "Retry-After" in responses[503]["headers"]


@pytest.mark.parametrize("error", errors.leaves())
def test_an_error_that_a_route_raises_arrives_with_its_own_status(error):
    response = post(build_app(error("Said by the route.")), b'{"prompt": "a"}')
    assert response.status_code == error.status
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["code"] == error.code
    assert body["request_id"] == response.headers["x-request-id"]
    expected = error.default_retry_after_seconds
    assert response.headers.get("retry-after") == (None if expected is None else str(expected))
    assert body.get("retry_after_s") == expected


def test_a_bug_is_a_500_without_detail_and_one_log_line_with_the_request_id(caplog):
    with caplog.at_level(logging.ERROR):
        response = post(build_app(RuntimeError(MARKER)), b'{"prompt": "a"}')
    assert response.status_code == 500
    assert response.json()["code"] == "internal"
    assert MARKER not in response.text
    [record] = [record for record in caplog.records if record.exc_info]
    assert response.headers["x-request-id"] in record.getMessage()
    assert MARKER in str(record.exc_info[1])


@pytest.mark.parametrize(("error", "num_lines"), [(NumericalError, 1), (WorkerRestarting, 0)])
def test_our_own_faults_are_logged_and_passing_ones_are_not(error, num_lines, caplog):
    with caplog.at_level(logging.ERROR):
        post(build_app(error("x")), b'{"prompt": "a"}')
    assert len(caplog.records) == num_lines


@pytest.mark.parametrize(
    ("status", "code"), [(404, "not_found"), (406, "not_acceptable"), (418, "internal")]
)
def test_an_http_exception_gets_the_code_of_its_status(status, code):
    raised = HTTPException(status, MARKER, {"X-Kept": "1"})
    response = post(build_app(raised), b'{"prompt": "a"}')
    assert response.json()["code"] == code
    assert MARKER not in response.text


@pytest.mark.parametrize(
    ("body", "pointer", "detail"),
    [
        ({"prompt": "a", "top_p": 0}, "/top_p", "should be greater than 0"),
        ({"prompt": "a", "n": MARKER}, "/n", "should be a valid integer"),
        ({"prompt": "a", "stop": ["b", 1]}, "/stop/1", "should be a valid string"),
        ({"prompt": [[2], [2, MARKER]]}, "/prompt/1/1", "should be a token id"),
        ({"prompt": "a", "a/b~c": 1}, "/a~1b~0c", "is not a field of this request"),
        ({"prompt": "a", "\n": 1}, "", "is not a field of this request"),
        ({"prompt": "a", "x" * 49: 1}, "", "is not a field of this request"),
        ({"prompt": "a", "max_tokens": 1, "min_tokens": 2}, "/min_tokens", "should be at most"),
        ({"prompt": ["a"] * 9, "n": 8}, "/n", "times the prompts should be at most 64"),
        ({}, "/prompt", "is required"),
        ([], "", "should be a JSON object"),
        (MARKER, "", "should be a JSON object"),
        (None, "", "should be a JSON object"),
    ],
)
def test_an_invalid_field_is_named_by_pointer_and_its_value_is_not_repeated(body, pointer, detail):
    response = post(build_app(), json.dumps(body).encode())
    assert response.status_code == 422
    [field] = response.json()["errors"]
    assert field["pointer"] == pointer
    assert field["detail"].startswith(detail)
    assert MARKER not in response.text


def test_a_type_of_error_that_may_quote_its_input_is_not_quoted():
    quoting = {"loc": ("body", "at"), "type": "date_parsing", "msg": f"bad date {MARKER}"}
    assert problems.invalid_field([quoting]).errors == (FieldError("/at", "is not valid"),)


def test_at_most_ten_fields_are_listed():
    body = {"prompt": "a", **{f"unknown_{index}": 1 for index in range(50)}}
    response = post(build_app(), json.dumps(body).encode())
    assert len(response.json()["errors"]) == 10
    assert response.json()["detail"].startswith("50 fields")


def test_each_request_error_is_the_clients_to_change():
    assert all(400 <= error.status < 500 for error in errors.leaves(RequestError))


SEEDS: list[dict[str, Any]] = [
    {"prompt": MARKER, "max_tokens": 8, "temperature": 0.5, "stop": [MARKER, "\n"]},
    {"prompt": [MARKER, "b"], "n": 2, "seed": 7, "top_k": 4, "top_p": 0.5, "logprobs": 2},
    {"prompt": [[2, 3], [4]], "stop_token_ids": [1], "ignore_eos": True, "stream": False},
    {"prompt": [2, 5, 9], "min_tokens": 1, "unknown": {MARKER: [MARKER]}},
]
HOSTILE_VALUES = [
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-400", "-0.0", "5e-324", "null"),
    *("true", "[]", "{}", '""', "-1", "4294967296", "9" * 400, "9" * 5000, '"\\ud800"'),
    *('"\\u0000"', f'"{MARKER}"', f'["{MARKER}"]', "[[[]]]", "[" * 100_000, '{"a":' * 100_000),
    *('{"a":1,"a":2}', f'{{"{MARKER}":1,"{MARKER}":2}}', '"\\ud83d\\ude00"', "[1,true]", "1.0"),
]


def mutate(draw: random.Random) -> bytes:
    """A JSON body with one to three values, bytes or encodings of it changed."""
    body = json.dumps(draw.choice(SEEDS)).encode()
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(body) + 1)
        match draw.randrange(7):
            case 0 | 1 | 2:
                values = list(re.finditer(rb'(?<=: )("[^"]*"|[\d.]+|true|false|\[[^\]]*\])', body))
                if values:
                    chosen = draw.choice(values)
                    new = draw.choice(HOSTILE_VALUES).encode()
                    body = body[: chosen.start()] + new + body[chosen.end() :]
            case 3:
                body = body[:at] + draw.randbytes(draw.randint(1, 4)) + body[at:]
            case 4:
                body = body[:at] + body[at + draw.randint(1, 8) :]
            case 5:
                body = body[:at] + draw.choice([b"\\ud800", b'"', b"[", b"}", b","]) + body[at:]
            case _:
                change = draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b" ", b"{", b'{"n":1,'])
                body = change + body
    return body


def test_no_mutated_body_gets_a_500_an_echo_or_more_than_2_kib():
    draw = random.Random(2026)
    bodies = [mutate(draw) for _ in range(3000)]
    responses = post_all(build_app(), bodies)
    bad = [(b[:200], faults(r)) for b, r in zip(bodies, responses, strict=True) if faults(r)]
    assert bad == []
    # The fuzz reaches all three layers: the parser, the schema and the handler.
    assert {response.status_code for response in responses} == {200, 400, 422}


def test_the_same_gate_catches_stock_fastapi():
    draw = random.Random(2026)
    responses = post_all(build_stock_app(), [mutate(draw) for _ in range(300)])
    found = {fault for response in responses for fault in faults(response)}
    assert {"status 500", "not a problem"} <= found
    assert any(MARKER in response.text for response in responses if response.is_error)
