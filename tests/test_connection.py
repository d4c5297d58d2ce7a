"""service.connection under uvicorn: who stops reading is cut off, however little waits."""

import asyncio
import socket
from typing import Any

import pytest
import uvicorn

from service.connection import connection_class

STALL_SECONDS = 0.3


async def read_nothing(num_bytes: int) -> tuple[bytes, bool]:
    """Asks for a body of so many bytes and leaves it unread until the server has no connection
    left; what can be read then, and whether that took less than ten seconds."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", str(num_bytes).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x" * num_bytes})

    config = uvicorn.Config(app, http=connection_class(STALL_SECONDS), lifespan="off", log_level=50)
    server = uvicorn.Server(config)
    with socket.socket() as listener, socket.socket() as client:
        # The kernel takes little of what is written, on both sides.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, listener.getsockname())
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        received = await loop.sock_recv(client, 1)
        is_cut = False
        for _ in range(100):
            if is_cut := not server.server_state.connections:
                break
            await asyncio.sleep(0.1)
        while piece := await loop.sock_recv(client, 1 << 20):
            received += piece
        server.should_exit = True
        await serving
    return received, is_cut


# The first one is less than uvicorn itself would wait for, the second one much more.
@pytest.mark.parametrize("num_bytes", [40_000, 4_000_000])
def test_a_client_that_stops_reading_is_cut_off_whether_little_or_much_waits(num_bytes):
    received, is_cut = asyncio.run(read_nothing(num_bytes))
    assert is_cut
    assert len(received) < num_bytes
