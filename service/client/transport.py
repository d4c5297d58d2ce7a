"""Calls over HTTP, in two ways: one that blocks, and one for asyncio.

    open: send, read the headers; refused? wait, send again  ->  a response whose body is unread
    send: open, then the whole body
    pieces: the body of an opened one as it comes
    follow: the events of a job, over as many connections as it takes
    save: open, then the whole body into a file

This file is all that knows httpx, and httpx's exceptions end here.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import aclosing, closing, contextmanager
from pathlib import Path

import httpx

from service.client.call import Call
from service.client.errors import (
    ConnectionFailed,
    ConnectionLost,
    GemmaError,
    TimedOut,
    Unavailable,
    UnexpectedAnswer,
)
from service.client.files import new_file
from service.client.job_events import JobEvent, JobEventReader
from service.client.retries import Attempts, RetryRules

# As many connections as there are requests: how many are too many is for the service to say.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)
# A host that is down may not answer at all; then there is time left to try again.
_CONNECT_SECONDS = 10.0
# Three pings of the service that did not come: the connection is gone, and nobody has said so.
_SILENCE_SECONDS = 30.0
# What leaves the stored events of a job to be asked for again.
_BREAKS = (ConnectionLost, TimedOut, Unavailable)


class Transport:
    """Blocks while it waits.

    ``timeout_s`` of the rules is for the whole answer. Of a stream it is for its beginning and then
    for each silence: one that goes on may last.
    """

    def __init__(
        self,
        url: str,
        rules: RetryRules,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.rules = rules
        self._clock = clock
        self._sleep = sleep
        self._http = httpx.Client(base_url=_checked(url), limits=_LIMITS)

    def send(self, call: Call, rules: RetryRules | None = None) -> bytes:
        """The body of the answer."""
        attempts = Attempts(rules or self.rules, self._clock(), _also(call))
        while True:
            try:
                response = self._attempt(call, attempts.seconds_left(self._clock()))
                return b"".join(self.pieces(response))
            except GemmaError as error:
                seconds = attempts.seconds_until_next(error, self._clock())
            self._sleep(seconds)

    def open(self, call: Call, rules: RetryRules | None = None) -> httpx.Response:
        """The answer before its body, after as many attempts as it takes. To be closed."""
        attempts = Attempts(rules or self.rules, self._clock())
        while True:
            try:
                return self._attempt(call, attempts.seconds_left(self._clock()))
            except GemmaError as error:
                seconds = attempts.seconds_until_next(error, self._clock())
            self._sleep(seconds)

    def follow(self, reader: JobEventReader) -> Generator[JobEvent]:
        """The events of a job to its last one."""
        attempts = self._attempts_to_follow()
        while not reader.is_over:
            error: GemmaError = ConnectionLost("The events of a job ended before it did.")
            try:
                response = self._attempt(reader.call(), self._silence())
                with closing(self.pieces(response)) as pieces:
                    for piece in pieces:
                        attempts = self._attempts_to_follow()
                        yield from reader.feed(piece)
            except GemmaError as broken:
                error = broken
            if not reader.is_over:
                self._sleep(attempts.seconds_until_next(error, self._clock()))

    def save(self, call: Call, path: Path) -> None:
        """Writes the answer to ``path`` as it comes; a file that is there stays until it is whole.

        Raises:
            OSError: It cannot be written.
        """
        with new_file(path) as file, closing(self.pieces(self.open(call))) as pieces:
            for piece in pieces:
                file.write(piece)

    def pieces(self, response: httpx.Response) -> Generator[bytes]:
        """Its body; closes it at the end."""
        try:
            with _own_errors(response.url):
                yield from response.iter_bytes()
        finally:
            response.close()

    def close(self) -> None:
        """Closes all connections."""
        self._http.close()

    def _attempt(self, call: Call, seconds: float) -> httpx.Response:
        request = _request(self._http, call, seconds)
        with _own_errors(request.url):
            response = self._http.send(request, stream=True)
        if response.status_code in call.statuses:
            return response
        body = b"".join(self.pieces(response))
        raise call.error(response.status_code, response.headers, body)

    def _silence(self) -> float:
        return min(self.rules.timeout_s, _SILENCE_SECONDS)

    def _attempts_to_follow(self) -> Attempts:
        return _attempts_to_follow(self.rules, self._clock())


class AsyncTransport:
    """The same for asyncio."""

    def __init__(
        self,
        url: str,
        rules: RetryRules,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.rules = rules
        self._clock = clock
        self._sleep = sleep
        self._http = httpx.AsyncClient(base_url=_checked(url), limits=_LIMITS)

    async def send(self, call: Call, rules: RetryRules | None = None) -> bytes:
        attempts = Attempts(rules or self.rules, self._clock(), _also(call))
        while True:
            try:
                response = await self._attempt(call, attempts.seconds_left(self._clock()))
                return b"".join([piece async for piece in self.pieces(response)])
            except GemmaError as error:
                seconds = attempts.seconds_until_next(error, self._clock())
            await self._sleep(seconds)

    async def open(self, call: Call, rules: RetryRules | None = None) -> httpx.Response:
        attempts = Attempts(rules or self.rules, self._clock())
        while True:
            try:
                return await self._attempt(call, attempts.seconds_left(self._clock()))
            except GemmaError as error:
                seconds = attempts.seconds_until_next(error, self._clock())
            await self._sleep(seconds)

    async def follow(self, reader: JobEventReader) -> AsyncGenerator[JobEvent]:
        attempts = self._attempts_to_follow()
        while not reader.is_over:
            error: GemmaError = ConnectionLost("The events of a job ended before it did.")
            try:
                response = await self._attempt(reader.call(), self._silence())
                async with aclosing(self.pieces(response)) as pieces:
                    async for piece in pieces:
                        attempts = self._attempts_to_follow()
                        for event in reader.feed(piece):
                            yield event
            except GemmaError as broken:
                error = broken
            if not reader.is_over:
                await self._sleep(attempts.seconds_until_next(error, self._clock()))

    async def save(self, call: Call, path: Path) -> None:
        with new_file(path) as file:
            async with aclosing(self.pieces(await self.open(call))) as pieces:
                async for piece in pieces:
                    await asyncio.to_thread(file.write, piece)

    async def pieces(self, response: httpx.Response) -> AsyncGenerator[bytes]:
        try:
            with _own_errors(response.url):
                async for piece in response.aiter_bytes():
                    yield piece
        finally:
            await response.aclose()

    async def close(self) -> None:
        await self._http.aclose()

    async def _attempt(self, call: Call, seconds: float) -> httpx.Response:
        request = _request(self._http, call, seconds)
        with _own_errors(request.url):
            response = await self._http.send(request, stream=True)
        if response.status_code in call.statuses:
            return response
        body = b"".join([piece async for piece in self.pieces(response)])
        raise call.error(response.status_code, response.headers, body)

    def _silence(self) -> float:
        return min(self.rules.timeout_s, _SILENCE_SECONDS)

    def _attempts_to_follow(self) -> Attempts:
        return _attempts_to_follow(self.rules, self._clock())


def _also(call: Call) -> tuple[type[GemmaError], ...]:
    """What is done once by its key may be sent again though its answer was lost."""
    return () if call.key is None else (ConnectionLost,)


def _attempts_to_follow(rules: RetryRules, now: float) -> Attempts:
    """Counted in time alone: a service that is started again takes as long as it takes."""
    return Attempts(RetryRules(None, rules.timeout_s), now, _BREAKS)


def _checked(url: str) -> httpx.URL:
    """The address of a service."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        # Without the address itself: it may hold a password.
        raise ValueError("The address of a service is like http://127.0.0.1:8000.")
    return parsed


def _request(http: httpx.Client | httpx.AsyncClient, call: Call, seconds: float) -> httpx.Request:
    """Each wait for the network may take that long."""
    return http.build_request(
        call.method,
        call.path,
        content=call.body,
        headers=call.headers(),
        timeout=httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS), pool=None),
    )


@contextmanager
def _own_errors(url: httpx.URL) -> Iterator[None]:
    """httpx's exceptions as ours. For asynchronous code too: nothing in here waits."""
    place = f"{url.host}:{url.port}" if url.port else url.host
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ConnectionFailed(f"Nobody answers at {place}. Does the service run there?") from error
    except httpx.TimeoutException as error:
        raise TimedOut(f"No answer of {place} within timeout_s of the client.") from error
    except httpx.TransportError as error:
        raise ConnectionLost(f"{place} broke the connection off.") from error
    except httpx.HTTPError as error:
        raise UnexpectedAnswer(f"The answer of {place} cannot be decoded.") from error
