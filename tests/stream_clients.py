"""Many clients of one service at once, each with a stream, cheap enough to be told apart from it.

A client notes when bytes come and looks into them only after the end.
"""

import asyncio
import itertools
import json
import re
import resource
from dataclasses import dataclass
from typing import Any

from tests.fakes.arithmetic_engine import (
    EOS_ID,
    EXIT,
    HANG,
    NOT_FINITE,
    ONCE,
    RAISE,
    VOCABULARY_SIZE,
    next_token,
)

_SPECIAL = frozenset((EOS_ID, EXIT, HANG, NOT_FINITE, ONCE, RAISE))

# An event is one chunk of the response, so these bytes are never interrupted.
_EVENT = re.compile(rb"event: (\w+)\nid: (\d+)\ndata: (.*)\n\n")


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event, with the second of the loop's clock at which its last byte came."""

    name: str
    id: int
    data: dict[str, Any]
    time: float


class StreamClient(asyncio.Protocol):
    """Sends one request, reads to the end of the connection."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = json.dumps(body).encode()
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        # How many bytes were there, and when.
        self._arrivals: list[tuple[int, float]] = []
        self.ended = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        head = (
            "POST /generate HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(self._body)}\r\n\r\n"
        )
        transport.write(head.encode() + self._body)

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._arrivals.append((len(self._received), self._loop.time()))

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(exc)

    def events(self) -> list[Event]:
        """What came, in order."""
        assert self._received.startswith(b"HTTP/1.1 200"), bytes(self._received[:500])
        events = []
        arrivals = iter(self._arrivals)
        num_bytes, time = 0, 0.0
        for match in _EVENT.finditer(self._received):
            while num_bytes < match.end():
                num_bytes, time = next(arrivals)
            name, event_id, data = match.groups()
            events.append(Event(name.decode(), int(event_id), json.loads(data), time))
        return events


def allow_descriptors(count: int) -> None:
    """Lets this process and those that it starts have so many open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= count, f"the system allows {hard} open files"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


async def stream_all(port: int, bodies: list[dict[str, Any]]) -> list[list[Event]]:
    """The events of one stream for each body, all of them open at once."""
    loop = asyncio.get_running_loop()
    clients = [StreamClient(body) for body in bodies]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
    await asyncio.gather(*(client.ended for client in clients))
    return [client.events() for client in clients]


def bodies_of(num_streams: int, max_tokens: int) -> list[dict[str, Any]]:
    """Requests of prompts that hardly any two share, so that a token out of place is wrong."""
    prompts = itertools.cycle(_ordinary_prompts(max_tokens))
    fields = {"temperature": 0.0, "max_tokens": max_tokens, "stream": True}
    return [{"prompt": next(prompts), "seed": k, **fields} for k in range(num_streams)]


def _ordinary_prompts(max_tokens: int) -> list[list[int]]:
    """Those that meet no token that ends them or makes the arithmetic engine misbehave."""
    prompts = [[token] for token in range(1, VOCABULARY_SIZE)]
    return [
        prompt
        for prompt in prompts
        if not _SPECIAL.intersection(prompt + _continuation(prompt, max_tokens))
    ]


def _continuation(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def check(events: list[Event], body: dict[str, Any]) -> None:
    """The stream is whole, in order, and this request's own."""
    start, *tokens, done = events
    assert (start.name, done.name) == ("start", "done")
    assert {event.name for event in tokens} == {"token"}
    assert [event.id for event in events] == list(range(len(events)))
    assert start.data["seeds"] == [body["seed"]]
    token_ids = [id_ for event in tokens for id_ in event.data["token_ids"]]
    assert token_ids == _continuation(body["prompt"], body["max_tokens"])
    assert "".join(event.data["text"] for event in tokens) == "".join(
        f" {id_}" if id_ else "" for id_ in token_ids
    )


def gaps(events: list[Event], since: float) -> list[float]:
    """Seconds between the tokens of one stream; tokens of one event came together."""
    times = [
        event.time
        for event in events
        if event.name == "token" and event.time >= since
        for _ in event.data["token_ids"]
    ]
    return [later - earlier for earlier, later in itertools.pairwise(times)]
