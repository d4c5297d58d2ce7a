"""Server-sent events, read from bytes in whatever pieces they come."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """The name of an event and its data."""

    name: str
    data: dict[str, Any]


class EventReader:
    """Joins pieces to events; comments are skipped."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that end in ``piece``."""
        *whole, self._rest = (self._rest + piece).split(b"\n\n")
        for block in whole:
            fields = dict(
                line.split(b": ", 1) for line in block.split(b"\n") if not line.startswith(b":")
            )
            if b"data" in fields:
                yield Event(fields[b"event"].decode(), json.loads(fields[b"data"]))
