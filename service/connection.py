"""A client's connection, which is cut once the client stops reading.

Without that a client that stops reading keeps its connection, its handler and, while it streams,
its slots for as long as it likes: a full socket is no error, and uvicorn waits for it for ever. So
while the kernel does not take all that we wrote, somebody looks whether the client takes any of it.
One that reads slowly is not cut off.
"""

import asyncio
import fcntl
import sys
import termios
from typing import ClassVar

from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

# How often it is looked at: a stall is noticed at most a quarter of its time late.
_LOOKS_PER_STALL = 4
_STALLED = "is_stalled"


def connection_class(stall_seconds: float) -> type[asyncio.Protocol]:
    """The protocol class of connections that may stall for so long, for ``uvicorn.Config``."""

    class Bounded(Connection):
        bound_seconds = stall_seconds

    return Bounded


def is_stalled(scope: Scope) -> bool:
    """Whether the connection of this request was cut because its client stopped reading."""
    return _STALLED in scope.get("state", {})


class Connection(H11Protocol):
    """uvicorn's, and a watch while bytes wait for the client."""

    bound_seconds: ClassVar[float]
    _watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Told of the first byte that the kernel does not take, and not after 64 KiB of them.
        transport.set_write_buffer_limits(high=0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_again(_num_unread_bytes(self.transport), self.loop.time())

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def _look_again(self, num_unread: int, since: float) -> None:
        """Later; so many bytes are unread ``since`` then."""
        delay = self.bound_seconds / _LOOKS_PER_STALL
        self._watch = self.loop.call_later(delay, self._look, num_unread, since)

    def _look(self, num_unread_before: int, since: float) -> None:
        num_unread, now = _num_unread_bytes(self.transport), self.loop.time()
        if num_unread != num_unread_before:
            self._look_again(num_unread, now)
        elif now - since < self.bound_seconds:
            self._look_again(num_unread, since)
        else:
            if self.cycle is not None:
                self.cycle.scope["state"][_STALLED] = True
            # Not close(), which would wait until the client has read what there is.
            self.transport.abort()

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None


def _num_unread_bytes(transport: asyncio.Transport) -> int:
    """What the client has not acknowledged, of our bytes here and of those that the kernel took.

    The kernel holds megabytes, and takes the next byte only when a third of its room is free; so
    where it does not tell, a client must read that much within the time.
    """
    num_bytes = transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    if sys.platform == "linux" and connection.fileno() >= 0:
        answer = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
        num_bytes += int.from_bytes(answer, sys.byteorder)
    return num_bytes
