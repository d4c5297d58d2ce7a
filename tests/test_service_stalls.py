"""Clients that stop reading: a real service and raw sockets whose buffers run full."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.service_process import ServiceProcess, eventually, running_service
from tests.test_loop import continuation

RUNNING = 'gemma_num_requests_running{op="generate"}'
STALLED = 'gemma_cancelled_total{reason="stalled"}'
LEFT = 'gemma_cancelled_total{reason="disconnect"}'
SUCCESS = 'gemma_request_success_total{finished_reason="length",op="generate"}'
STALL_SECONDS = 1.0
# With twenty alternatives a token takes 1.4 KB; the kernel holds 3 MB for a reader on this machine.
MANY = {"prompt": [5], "temperature": 0, "max_tokens": 3500, "logprobs": 20}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with running_service(
        tmp_path_factory.mktemp("stalls"),
        "--slots=10",
        "--context-tokens=100000",
        f"--stream-stall-seconds={STALL_SECONDS}",
    ) as running:
        yield running


@contextlib.contextmanager
def sent(service: ServiceProcess, **fields: object) -> Iterator[socket.socket]:
    """A connection with little room for what it receives, and a request that is being answered."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(("127.0.0.1", service.port))
        body = json.dumps({**MANY, **fields}).encode()
        head = "POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert client.recv(12) == b"HTTP/1.1 200"
        yield client


def rest_of(client: socket.socket) -> bytes:
    """What can still be read, up to the end of the connection."""
    received = bytearray()
    while True:
        try:
            piece = client.recv(1 << 20)
        except ConnectionResetError:
            return bytes(received)
        if not piece:
            return bytes(received)
        received += piece


def num_connections(service: ServiceProcess) -> int:
    """Sockets of the API process that are a connection to a client, in whatever state."""
    return sum(
        each.laddr.port == service.port and each.status != psutil.CONN_LISTEN
        for each in psutil.Process(service.process.pid).net_connections("tcp")
    )


def test_a_stream_that_nobody_reads_is_cut_and_gives_its_slots_back(service):
    api = psutil.Process(service.process.pid)
    assert eventually(lambda: num_connections(service) == 1), "only the one of service.client"
    descriptors = api.num_fds()
    with sent(service, n=8, max_tokens=90_000, stream=True) as stalled:
        # Multiples of 5 never become a token that makes this engine misbehave.
        for number in (5, 10, 15):
            with service.stream([number], max_tokens=300) as stream:
                tokens = [event["data"] for event in stream if event["event"] == "token"]
            token_ids = [id_ for token in tokens for id_ in token["token_ids"]]
            assert token_ids == continuation([number], 0, 300)
        assert eventually(lambda: service.metric(STALLED) == 1, 20)
        assert eventually(lambda: service.metric(RUNNING) == 0)
        assert service.metric(LEFT) == 0
        assert eventually(lambda: num_connections(service) == 1)
        assert api.num_fds() == descriptors
        assert b"event: done" not in rest_of(stalled)
    assert "Traceback" not in service.log


def test_a_whole_answer_that_nobody_reads_is_cut_too_and_was_generated(service):
    ended, stalled = service.metric(SUCCESS), service.metric(STALLED)
    with sent(service) as client:
        assert eventually(lambda: num_connections(service) == 2)
        assert eventually(lambda: num_connections(service) == 1, 20)
        with pytest.raises(json.JSONDecodeError):
            json.loads(rest_of(client).partition(b"\r\n\r\n")[2])
    # Its slot was free long before, so nothing was cancelled.
    assert service.metric(SUCCESS) == ended + 1
    assert service.metric(STALLED) == stalled


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_reads_slowly_all_the_time_gets_everything(service, stream):
    received = bytearray()
    with sent(service, stream=stream) as client:
        # Three times as long as it may stall, and far from done then.
        for _ in range(int(3 * STALL_SECONDS / 0.1)):
            received += client.recv(4096)
            time.sleep(0.1)
        assert not is_whole(received)
        while not is_whole(received):
            piece = client.recv(1 << 20)
            assert piece, "cut off"
            received += piece
    assert len(received) > 4_000_000


def is_whole(received: bytearray) -> bool:
    return b"event: done" in received[-1000:] or b'"total_s"' in received[-1000:]


def test_afterwards_nothing_is_in_flight_that_a_stop_would_wait_for(service):
    service.process.terminate()
    assert service.process.wait(10) == 0
