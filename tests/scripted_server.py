"""A server that answers each connection with the next of given bytes, right or wrong."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

OK = "200 OK"
EVENT_STREAM = "text/event-stream"


def response(
    status: str, body: bytes | dict[str, Any] = b"", *headers: str, lacks_bytes: int = 0
) -> bytes:
    """One response, in which so many bytes that were promised are missing."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content) + lacks_bytes}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + content


def problem(status: int, code: str, **fields: Any) -> dict[str, Any]:
    """As the service writes one."""
    return {"status": status, "code": code, "detail": "Told.", "request_id": "r", **fields}


class ScriptedServer:
    """Attributes: ``url``, and ``heads`` and ``bodies`` of the requests that came."""

    def __init__(self, answers: Sequence[bytes]) -> None:
        self._answers = list(answers)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.heads: list[dict[str, str]] = []
        self.bodies: list[bytes] = []

    def serve(self) -> None:
        """Until there are no more answers; an empty one keeps its connection open, silently."""
        with contextlib.ExitStack() as silent:
            for answer in self._answers:
                try:
                    connection, _ = self._listener.accept()
                except OSError:
                    return
                silent.enter_context(connection)
                head, body = _read_request(connection)
                self.heads.append(head)
                self.bodies.append(body)
                if answer:
                    connection.sendall(answer)
                    connection.close()
            # Nobody is left to be answered, but some may wait.
            with contextlib.suppress(OSError):
                self._listener.accept()

    def close(self) -> None:
        # Wakes the thread that waits in accept(), which closing alone does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _read_request(connection: socket.socket) -> tuple[dict[str, str], bytes]:
    """Headers by their names in lower case, and the body."""
    head = {}
    with connection.makefile("rb") as stream:
        while (line := stream.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            head[name.lower()] = value.strip()
        return head, stream.read(int(head.get("content-length", 0)))


@contextlib.contextmanager
def scripted_server(*answers: bytes) -> Iterator[ScriptedServer]:
    """It listens until the end of the block."""
    server = ScriptedServer(answers)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()
