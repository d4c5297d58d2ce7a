"""One streamed request, and what its client saw of it."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from service.client.event_stream import EventReader

Outcome = Literal["done", "refused", "failed", "unfinished"]

# A connection for each stream, however many there are; and no time limit but the caller's.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


@dataclass(frozen=True, slots=True)
class Ask:
    """A greedy request that ends after exactly ``num_new_tokens``."""

    token_ids: tuple[int, ...]
    num_new_tokens: int

    def body(self) -> dict[str, Any]:
        return {
            "prompt": list(self.token_ids),
            "max_tokens": self.num_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }


@dataclass(slots=True)
class Record:
    """What became of one request. Times are seconds since the measurement began.

    Attributes:
        num_prompt_tokens: Of the request.
        due: When it was to be sent; what the server makes a client wait counts from here.
        sent: When it was.
        arrivals: Time and number of tokens of each event.
        token_ids: All of them.
        ended: When it was answered or given up.
        outcome: ``unfinished`` if it was given up.
        status: HTTP status, or 0 before there is one.
        cached_tokens: Of the prompt, as the server says at the end.
    """

    num_prompt_tokens: int
    due: float
    sent: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    ended: float = 0.0
    outcome: Outcome = "unfinished"
    status: int = 0
    cached_tokens: int = 0

    @property
    def first_token_seconds(self) -> float:
        """From when the request was due; of one given up before, how long it waited."""
        return (self.arrivals[0][0] if self.arrivals else self.ended) - self.due


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._zero


def open_client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, limits=_LIMITS, timeout=None)


async def follow(client: httpx.AsyncClient, ask: Ask, record: Record, clock: Clock) -> Record:
    """Sends ``ask`` and writes down in ``record`` what comes, until it ends or is cancelled."""
    record.sent = clock.now()
    reader = EventReader()
    try:
        async with client.stream("POST", "/generate", json=ask.body()) as response:
            record.status = response.status_code
            if response.status_code != 200:
                record.outcome = "refused"
                return record
            async for piece in response.aiter_raw():
                now = clock.now()
                for event in reader.feed(piece):
                    if event.name == "token":
                        token_ids = json.loads(event.data)["token_ids"]
                        record.arrivals.append((now, len(token_ids)))
                        record.token_ids += token_ids
                    elif event.name == "done":
                        record.cached_tokens = json.loads(event.data)["usage"]["cached_tokens"]
                        record.outcome = "done"
                    elif event.name == "error":
                        record.outcome = "failed"
    except httpx.TransportError:
        record.outcome = "failed"
    finally:
        record.ended = clock.now()
    return record


async def together(url: str, asks: Sequence[Ask]) -> list[Record]:
    """All at once; a request that is not answered in full is an error of the measurement."""
    clock = Clock()
    async with open_client(url) as client:
        records = [Record(len(ask.token_ids), 0.0) for ask in asks]
        await asyncio.gather(
            *(follow(client, ask, record, clock) for ask, record in zip(asks, records, strict=True))
        )
    for ask, record in zip(asks, records, strict=True):
        check_whole(ask, record)
    return records


def check_whole(ask: Ask, record: Record) -> None:
    """Raises unless all tokens came."""
    if record.outcome != "done" or len(record.token_ids) != ask.num_new_tokens:
        raise RuntimeError(
            f"A request ended as {record.outcome} (HTTP {record.status}) with "
            f"{len(record.token_ids)} of {ask.num_new_tokens} tokens."
        )
