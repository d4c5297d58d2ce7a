"""service.edge: what stops a request before a route sees it, in process and over a socket."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from starlette.responses import StreamingResponse

from service.api import problems
from service.api.route import StrictRoute
from service.api.schemas import GenerateRequest
from service.edge import BodyGuard, edge_middleware

MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_SECONDS = 0.5
GOOD = b'{"prompt": "a"}'
JSON = {"Content-Type": "application/json"}


def build_app() -> FastAPI:
    """The whole edge around one POST, one GET and one stream that breaks half-way."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/generate")
    async def generate(body: GenerateRequest, request: Request) -> dict[str, Any]:
        # A client that hangs up while we work is seen here, after the body.
        if body.max_tokens == 1:
            message = await request.receive()
            request.app.state.seen_after_body.append(message["type"])
        return {"prompt": body.prompt, "request_id": request.state.request_id}

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/broken")
    async def broken() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"begun"
            raise RuntimeError("half-way")

        return StreamingResponse(pieces())

    edge = edge_middleware(
        max_body_bytes=MAX_BODY_BYTES,
        body_timeout_seconds=BODY_TIMEOUT_SECONDS,
        max_body_chunks=64,
    )
    app = FastAPI(middleware=edge, redirect_slashes=False)
    app.state.seen_after_body = []
    app.include_router(router)
    problems.install(app)
    return app


def send(method: str, path: str, **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(build_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def assert_problem(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.content) <= 2048
    problem = response.json()
    assert problem["status"] == status
    assert problem["code"] == code
    assert problem["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed_json"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "malformed_json"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "malformed_json"),
        (b'{"prompt": "a", "no_such": NaN}', 400, "malformed_json"),
        (b'{"prompt": "\\ud800"}', 400, "malformed_json"),
        (b'{"prompt": "a", "stream": "\\ud800"}', 400, "malformed_json"),
        (b'{"prompt": "a", "prompt": "b"}', 400, "malformed_json"),
        (b'\xef\xbb\xbf{"prompt": "a"}', 400, "malformed_json"),
        ('{"prompt": "a"}'.encode("utf-16"), 400, "malformed_json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "malformed_json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}", 422, "invalid_field"),
        (b"[" * 100_000, 400, "malformed_json"),
        (b'{"prompt": "' + b"x" * 50_000_000 + b'"}', 413, "body_too_large"),
    ],
)
def test_a_hostile_body_gets_its_own_small_problem(body, status, code):
    assert_problem(send("POST", "/generate", content=body, headers=JSON), status, code)


@pytest.mark.parametrize("extra_bytes", [0, 1])
def test_a_body_may_have_exactly_the_limit_of_bytes(extra_bytes):
    padding = b" " * (MAX_BODY_BYTES - len(GOOD) + extra_bytes)
    response = send("POST", "/generate", content=GOOD + padding, headers=JSON)
    assert response.status_code == (413 if extra_bytes else 200)


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON ; charset=utf-8", 200),
        ("text/plain", 415),
        ("application/jsonx", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=application/json", 415),
        (None, 415),
    ],
)
def test_a_posted_body_must_be_declared_as_json(content_type, status):
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = send("POST", "/generate", content=GOOD, headers=headers)
    assert response.status_code == status
    if status == 415:
        assert_problem(response, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", "/generate", "POST"), ("POST", "/health", "GET"), ("FOOBAR123", "/health", "GET")],
)
def test_a_wrong_method_is_405_and_told_the_right_one(method, path, allow):
    response = send(method, path)
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allow


@pytest.mark.parametrize("path", ["/no-such", "/generate/", "/generate%00", "//health"])
def test_an_unknown_path_is_404(path):
    assert_problem(
        send("POST", f"http://service{path}", content=GOOD, headers=JSON), 404, "not_found"
    )


@pytest.mark.parametrize("offered", ["a", "A-b_c.9", "x" * 64])
def test_a_plain_request_id_is_kept_and_sent_back(offered):
    response = send("POST", "/generate", content=GOOD, headers={**JSON, "X-Request-Id": offered})
    assert response.headers["x-request-id"] == offered
    assert response.json()["request_id"] == offered


@pytest.mark.parametrize("offered", ["", "x" * 65, "a b", "a\tb", "a/b", "\u00e9".encode(), None])
def test_any_other_request_id_is_replaced(offered):
    headers = {} if offered is None else {"X-Request-Id": offered}
    response = send("GET", "/health", headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    assert response.headers.get_list("x-request-id") == [response.headers["x-request-id"]]


@pytest.mark.parametrize("length", [b"-1", b"+5", b"1_0", b"", b"9" * 20, b"\xb2"])
def test_a_content_length_that_is_no_number_is_refused_before_reading(length):
    async def run() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def never(*_: object) -> Any:
            raise AssertionError("called for a refused request")

        async def nothing_more() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def collect(message: Any) -> None:
            sent.append(message)

        guard = BodyGuard(never, max_body_bytes=9, body_timeout_seconds=1, max_body_chunks=9)
        headers = [(b"content-length", length), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        await guard(scope, nothing_more, collect)
        return sent

    assert asyncio.run(run())[0]["status"] == 400


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FastAPI, int]]:
    """The app in a real uvicorn with the h11 parser, and its port."""
    app = build_app()
    config = uvicorn.Config(app, port=0, http="h11", log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield app, listener.getsockname()[1]
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def connection(server: tuple[FastAPI, int], head: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server[1]), timeout=5) as client:
        client.sendall(f"{head}\r\nHost: service\r\nContent-Type: application/json\r\n".encode())
        yield client


def answer(client: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and JSON of what comes until the server closes."""
    received = b""
    while piece := client.recv(65536):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


POST = "POST /generate HTTP/1.1"


def test_a_body_that_stops_coming_is_408_when_its_time_is_over(server):
    with connection(server, POST) as client:
        start = time.perf_counter()
        client.sendall(b"Content-Length: 15\r\n\r\n" + GOOD[:5])
        status, problem = answer(client)
    assert (status, problem["code"]) == (408, "body_timeout")
    assert BODY_TIMEOUT_SECONDS <= time.perf_counter() - start < BODY_TIMEOUT_SECONDS + 2


def test_a_body_that_trickles_is_408_although_it_never_pauses(server):
    with connection(server, POST) as client:
        client.sendall(b"Content-Length: 100000\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(30):
                client.sendall(b" ")
                time.sleep(0.03)
        status, problem = answer(client)
    assert (status, problem["code"]) == (408, "body_timeout")


def test_a_long_content_length_is_413_before_any_byte_of_the_body(server):
    with connection(server, POST) as client:
        client.sendall(b"Content-Length: 200000000\r\n\r\n")
        status, problem = answer(client)
    assert (status, problem["code"]) == (413, "body_too_large")


def test_a_client_that_sends_everything_before_it_reads_still_gets_its_413(server):
    body = b" " * (16 << 20)
    with connection(server, POST) as client:
        client.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status, problem = answer(client)
    assert (status, problem["code"]) == (413, "body_too_large")


def test_a_chunked_body_is_counted_as_it_comes(server):
    def chunks() -> Iterator[bytes]:
        for _ in range(24):
            yield b" " * 65536

    url = f"http://127.0.0.1:{server[1]}/generate"
    assert_problem(httpx.post(url, content=chunks(), headers=JSON), 413, "body_too_large")


def test_a_chunked_body_within_the_limit_is_read(server):
    url = f"http://127.0.0.1:{server[1]}/generate"
    assert httpx.post(url, content=iter([GOOD[:4], GOOD[4:]]), headers=JSON).json()["prompt"] == "a"


def test_a_body_in_too_many_pieces_is_413():
    async def pieces() -> AsyncIterator[bytes]:
        for byte in GOOD + b" " * 64:
            yield bytes([byte])

    assert_problem(send("POST", "/generate", content=pieces(), headers=JSON), 413, "body_too_large")


def test_a_body_with_two_framings_is_400_and_the_connection_closes(server):
    with connection(server, POST) as client:
        framing = b"Content-Length: 15\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(framing + b"f\r\n" + GOOD + b"\r\n0\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
        status, problem = answer(client)
    assert (status, problem["code"]) == (400, "malformed_json")


def test_a_disconnect_after_the_body_reaches_the_route(server):
    body = b'{"prompt": "a", "max_tokens": 1}'
    with connection(server, POST) as client:
        client.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.2)
        assert server[0].state.seen_after_body == []
    deadline = time.perf_counter() + 5
    while not server[0].state.seen_after_body and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert server[0].state.seen_after_body == ["http.disconnect"]


def test_a_client_that_leaves_in_mid_body_reaches_no_route_and_breaks_nothing(server):
    with connection(server, POST) as client:
        client.sendall(b"Content-Length: 15\r\n\r\n" + GOOD[:5])
    assert httpx.get(f"http://127.0.0.1:{server[1]}/health").json() == {"status": "ok"}


def test_a_response_that_breaks_after_its_start_is_cut_and_not_ended(server):
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://127.0.0.1:{server[1]}/broken")
    with pytest.raises(RuntimeError, match="half-way"):
        send("GET", "/broken")


def test_a_good_connection_is_kept_for_the_next_request(server):
    with httpx.Client(base_url=f"http://127.0.0.1:{server[1]}") as client:
        for _ in range(3):
            response = client.post("/generate", content=GOOD, headers=JSON)
            assert "connection" not in response.headers
            assert response.status_code == 200
