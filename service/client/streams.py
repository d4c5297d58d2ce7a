"""A streamed generation in a ``with`` statement, whose end closes the connection.

However it is left, early or by an exception, the service then frees the slots.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import aclosing
from typing import Self

import httpx

from service.client.call import Call
from service.client.errors import ConnectionLost, TimedOut
from service.client.generate import DoneEvent, GenerationEvent, GenerationReader, StartEvent
from service.client.transport import AsyncTransport, Transport

_OUTSIDE = "A stream is read inside of its with statement, which sends the request."


class _Progress:
    """How far a stream is."""

    def __init__(self) -> None:
        self._reader = GenerationReader()

    @property
    def start(self) -> StartEvent | None:
        """The first event, once it has been read."""
        return self._reader.start

    @property
    def done(self) -> DoneEvent | None:
        """The last event, once it has been read."""
        return self._reader.done

    @property
    def num_tokens(self) -> int:
        """How many have been read, of all outputs together."""
        return self._reader.num_tokens


class GenerationStream(_Progress):
    """Iterates over typed events, or over the ``text`` of the only output."""

    def __init__(self, transport: Transport, call: Call) -> None:
        super().__init__()
        self._transport = transport
        self._call = call
        self._events: Generator[GenerationEvent] | None = None

    def __enter__(self) -> Self:
        self._reader = GenerationReader()
        self._response = self._transport.open(self._call)
        self._events = self._read(self._response)
        return self

    def __exit__(self, *_: object) -> None:
        events, self._events = self._events, None
        if events is not None:
            events.close()
        self._response.close()

    def __iter__(self) -> Iterator[GenerationEvent]:
        if self._events is None:
            raise RuntimeError(_OUTSIDE)
        return self._events

    @property
    def text(self) -> Iterator[str]:
        """Pieces of text, none of them empty."""
        return (text for event in self if (text := self._reader.text(event)))

    def _read(self, response: httpx.Response) -> Generator[GenerationEvent]:
        broken = None
        try:
            for piece in self._transport.pieces(response):
                yield from self._reader.feed(piece)
        except (ConnectionLost, TimedOut) as error:
            broken = error
        self._reader.end(broken)


class AsyncGenerationStream(_Progress):
    """The same for asyncio."""

    def __init__(self, transport: AsyncTransport, call: Call) -> None:
        super().__init__()
        self._transport = transport
        self._call = call
        self._events: AsyncGenerator[GenerationEvent] | None = None

    async def __aenter__(self) -> Self:
        self._reader = GenerationReader()
        self._response = await self._transport.open(self._call)
        self._events = self._read(self._response)
        return self

    async def __aexit__(self, *_: object) -> None:
        events, self._events = self._events, None
        try:
            if events is not None:
                await events.aclose()
        finally:
            await self._response.aclose()

    def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        if self._events is None:
            raise RuntimeError(_OUTSIDE)
        return self._events

    @property
    def text(self) -> AsyncIterator[str]:
        """Pieces of text, none of them empty."""
        return (text async for event in self if (text := self._reader.text(event)))

    async def _read(self, response: httpx.Response) -> AsyncGenerator[GenerationEvent]:
        broken = None
        try:
            async with aclosing(self._transport.pieces(response)) as pieces:
                async for piece in pieces:
                    for event in self._reader.feed(piece):
                        yield event
        except (ConnectionLost, TimedOut) as error:
            broken = error
        self._reader.end(broken)
