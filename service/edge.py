"""What a request passes before any of our handlers: pure ASGI, outermost first.

    RequestId -> UnhandledErrors -> BodyGuard -> routes

``BodyGuard`` takes the whole body off the wire and hands it on in one piece, so that size and
time are bounded in one place and a refusal needs no help from the application. What comes
after the body, a disconnect that is, still reaches the application's ``receive``.
"""

import asyncio
import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from uuid import uuid4

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import problem_response, request_id, unhandled
from service.errors import (
    BodyTimeout,
    BodyTooLarge,
    MalformedJson,
    QueueFull,
    ServiceError,
    UnsupportedMediaType,
)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_DIGITS = re.compile(rb"[0-9]{1,19}")
_LINGER_SECONDS = 1.0
# What a larger body must have in a piece, on average.
_LEAST_CHUNK_BYTES = 1024
_MAX_HELD_BYTES = 256 * 1024 * 1024


def edge_middleware(
    *,
    max_body_bytes: int,
    body_timeout_seconds: float,
    max_body_chunks: int = 4096,
    max_job_bytes: int | None = None,
    max_adapter_bytes: int | None = None,
    max_held_bytes: int = _MAX_HELD_BYTES,
) -> list[Middleware]:
    """The middlewares in their only right order, for ``FastAPI(middleware=...)``.

    Jobs and adapters may be larger than what else is sent; ``max_held_bytes`` of such bodies are
    held at once.
    """
    larger = {}
    if max_job_bytes is not None:
        larger["POST", "/finetune"] = max_job_bytes
    if max_adapter_bytes is not None:
        larger["PUT", "/adapters/"] = max_adapter_bytes
    return [
        Middleware(RequestId),
        Middleware(UnhandledErrors),
        Middleware(
            BodyGuard,
            max_body_bytes=max_body_bytes,
            body_timeout_seconds=body_timeout_seconds,
            max_body_chunks=max_body_chunks,
            larger=larger,
            max_held_bytes=max_held_bytes,
        ),
    ]


class RequestId:
    """Gives every request an id, the client's own if it is a plain one, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        offered = _header(scope, b"x-request-id")
        if offered is None or not _REQUEST_ID.fullmatch(offered):
            offered = uuid4().hex.encode()
        identifier = offered
        scope.setdefault("state", {})["request_id"] = identifier.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [pair for pair in message.get("headers", ()) if pair[0] != b"x-request-id"]
                message = {
                    **message,
                    "headers": [*others, (b"x-request-id", identifier)],
                }
            await send(message)

        await self.app(scope, receive, send_with_id)


class UnhandledErrors:
    """Answers 500 for an exception that nothing else handles, and logs it with the id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception as exception:
            error = unhandled(exception, request_id(scope))
            if has_started:
                # Too late for a status: the server cuts the connection, which is the one sign
                # left that the response is not whole.
                raise
            await problem_response(error, request_id(scope))(scope, receive, send)


class BodyGuard:
    """Bounds the body in bytes, pieces and seconds, and refuses what is not JSON by its header.

    Pieces are counted because a body of one-byte chunks costs far more than its bytes. Of bodies
    beyond the usual size only so many bytes are held at once, from before they are read until their
    answer is sent; one is always taken.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        body_timeout_seconds: float,
        max_body_chunks: int,
        larger: Mapping[tuple[str, str], int] | None = None,
        max_held_bytes: int = _MAX_HELD_BYTES,
    ) -> None:
        self.app = app
        self.larger = larger or {}
        self.max_body_bytes = max_body_bytes
        self.body_timeout_seconds = body_timeout_seconds
        self.max_body_chunks = max_body_chunks
        self.max_held_bytes = max_held_bytes
        self.num_held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error: ServiceError
        with contextlib.ExitStack() as held:
            try:
                max_bytes = self._max_bytes(scope)
                num_bytes = self._check_head(scope, max_bytes)
                held.enter_context(self._holding(num_bytes))
                async with asyncio.timeout(self.body_timeout_seconds):
                    body = await self._read(receive, max_bytes)
            except TimeoutError:
                error = BodyTimeout(f"The body took longer than {self.body_timeout_seconds:g} s.")
            except ServiceError as refusal:
                error = refusal
            else:
                if body is not None:
                    await self.app(scope, _body_then(body, receive), send)
                return
        await _refuse(error, scope, receive, send)

    @contextlib.contextmanager
    def _holding(self, num_bytes: int) -> Iterator[None]:
        """Counts a large body while it is there; raises `QueueFull` if it would be too much."""
        if num_bytes <= self.max_body_bytes:
            num_bytes = 0
        elif self.num_held_bytes and self.num_held_bytes + num_bytes > self.max_held_bytes:
            raise QueueFull("Other large bodies are being taken.")
        self.num_held_bytes += num_bytes
        try:
            yield
        finally:
            self.num_held_bytes -= num_bytes

    def _max_bytes(self, scope: Scope) -> int:
        """Of a body that goes there. A path that ends in a slash stands for all below it."""
        method, path = scope["method"], scope["path"]
        for (known, place), max_bytes in self.larger.items():
            is_there = path.startswith(place) if place.endswith("/") else path == place
            if method == known and is_there:
                return max_bytes
        return self.max_body_bytes

    def _check_head(self, scope: Scope, max_bytes: int) -> int:
        """The bytes of the body, or as many as it may have if it does not say."""
        length = _header(scope, b"content-length")
        is_chunked = _header(scope, b"transfer-encoding") is not None
        if length is not None and is_chunked:
            # Two proxies may disagree on where this body ends: request smuggling.
            raise MalformedJson("Content-Length and Transfer-Encoding exclude each other.")
        if length is not None and not _DIGITS.fullmatch(length):
            raise MalformedJson("Content-Length is not a number of bytes.")
        num_bytes = int(length or 0)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        media_type = _header(scope, b"content-type")
        if media_type is None and num_bytes == 0 and not is_chunked:
            # No body at all: the route says what that means (405, or an empty body).
            return 0
        if scope["method"] in ("POST", "PATCH") and not _is_type(media_type, b"application/json"):
            raise UnsupportedMediaType("Send the body as application/json.")
        if scope["method"] == "PUT" and not _is_type(media_type, b"application/octet-stream"):
            raise UnsupportedMediaType("Send the file as application/octet-stream.")
        return max_bytes if is_chunked else num_bytes

    async def _read(self, receive: Receive, max_bytes: int) -> bytes | None:
        """The whole body, or None if the client left before its end."""
        body = bytearray()
        max_chunks = self.max_body_chunks
        if max_bytes > self.max_body_bytes:
            max_chunks = max(max_chunks, max_bytes // _LEAST_CHUNK_BYTES)
        for _ in range(max_chunks):
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
            if not message.get("more_body", False):
                return bytes(body)
        raise BodyTooLarge(f"The body came in more than {max_chunks} pieces.")


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body has more than {max_bytes} bytes.")


def _header(scope: Scope, name: bytes) -> bytes | None:
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), None)


def _is_type(media_type: bytes | None, wanted: bytes) -> bool:
    return (media_type or b"").partition(b";")[0].strip().lower() == wanted


def _body_then(body: bytes, receive: Receive) -> Receive:
    is_replayed = False

    async def replay() -> Message:
        nonlocal is_replayed
        if is_replayed:
            return await receive()
        is_replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(error: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the problem whole, then discards the rest of the body for a moment, then closes.

    Closing at once would reset the connection under a client that is still sending, and it
    would never see why.
    """

    async def send_and_linger(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        await send({**message, "more_body": True})
        await _discard(receive)
        await send({"type": "http.response.body"})

    response = problem_response(error, request_id(scope), {"Connection": "close"})
    await response(scope, receive, send_and_linger)


async def _discard(receive: Receive) -> None:
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            message = await receive()
            while message["type"] == "http.request" and message.get("more_body", False):
                message = await receive()
    except TimeoutError:
        pass
