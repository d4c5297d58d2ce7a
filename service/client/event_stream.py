"""Server-sent events, read from bytes in whatever pieces they come.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """The name of an event, its data, which is JSON in all that this service sends, and its id."""

    name: str
    data: str
    id: str | None = None


class EventReader:
    """Joins pieces to events; comments are skipped, and so is an event that never ended."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[bytes, list[bytes]] = {}

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that end in ``piece``."""
        for line in self._whole_lines(piece):
            if line:
                name, _, value = line.partition(b":")
                self._fields.setdefault(name, []).append(value.removeprefix(b" "))
                continue
            fields, self._fields = self._fields, {}
            if b"data" in fields:
                name = fields.get(b"event", [b"message"])[-1]
                numbers = fields.get(b"id")
                id_ = None if numbers is None else numbers[-1].decode()
                yield Event(name.decode(), b"\n".join(fields[b"data"]).decode(), id_)

    def _whole_lines(self, piece: bytes) -> list[bytes]:
        """Without their ends; a carriage return at the end of a piece may be half of one."""
        lines = (self._rest + piece).splitlines(keepends=True)
        self._rest = b""
        if lines and not lines[-1].endswith(b"\n"):
            self._rest = lines.pop()
        return [line.rstrip(b"\r\n") for line in lines]
