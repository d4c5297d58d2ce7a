"""The worker's end of the socket: blocking frames in, and a thread that sends frames out."""

import queue
import socket
import threading
from collections.abc import Sequence

from service.protocol import framing
from service.protocol.framing import AnyCommand, AnyEvent

# Frames that may wait for the API process to read them. It always reads, so a full buffer means
# that it hangs; the loop then waits, and the supervisor's heartbeat goes stale.
_MAX_WAITING_FRAMES = 1024


class ConnectionClosed(Exception):
    """The API process is gone."""


def read_frame(connection: socket.socket) -> list[AnyCommand]:
    """The commands of the next frame; waits for it.

    Raises:
        ConnectionClosed: End of file, also in the middle of a frame.
        framing.ProtocolError: The frame is malformed.
    """
    length = framing.body_length(_read_exactly(connection, framing.LENGTH_BYTES))
    return framing.decode_commands(_read_exactly(connection, length))


def _read_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    buffer = bytearray()
    while len(buffer) < num_bytes:
        try:
            received = connection.recv(min(num_bytes - len(buffer), 1 << 20))
        except ConnectionError as error:
            raise ConnectionClosed from error
        if not received:
            raise ConnectionClosed
        buffer += received
    return bytes(buffer)


class Writer:
    """Sends frames from a thread of its own, so that no step waits for the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames: queue.Queue[bytes] = queue.Queue(_MAX_WAITING_FRAMES)
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def send(self, events: Sequence[AnyEvent]) -> None:
        """Queues one frame."""
        self._frames.put(framing.encode(events))

    def send_if_room(self, events: Sequence[AnyEvent]) -> None:
        """Queues one frame that may be lost, such as a heartbeat, unless the buffer is full."""
        try:
            self._frames.put_nowait(framing.encode(events))
        except queue.Full:
            return

    def flush(self) -> None:
        """Waits until everything queued is sent; for the last words of a process."""
        self._frames.join()

    def _run(self) -> None:
        while True:
            frame = self._frames.get()
            try:
                self._connection.sendall(frame)
            except OSError:
                # The reader sees the end of file and ends the process; drain until then, so that
                # nobody waits for room.
                pass
            finally:
                self._frames.task_done()
