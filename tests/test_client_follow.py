"""Jobs over connections that break: no event is missed or told twice, and none is started twice.

The trainer counts in integers (`tests.fakes.arithmetic_trainer`), so jobs take no time.
"""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from service.client import (
    ConnectionFailed,
    ConnectionLost,
    GemmaClient,
    StepEvent,
    UnexpectedAnswer,
    jobs,
)
from service.client.job_events import JobEventReader
from service.client.retries import RetryRules
from service.client.transport import AsyncTransport, Transport
from tests.client_kinds import KINDS, Blocking, FakeClock, Kind, open_client, open_sender
from tests.scripted_server import EVENT_STREAM, OK, response, scripted_server
from tests.service_process import ServiceProcess, running_service

ROWS = [{"token_ids": [1, 2, 3 + index]} for index in range(6)]
SLOW = {"ARITHMETIC_SLICE_SECONDS": "0.02"}

STEP = (
    'id: {0}\nevent: step\ndata: {{"step":{0},"loss":0.5,"learning_rate":0.1,"grad_norm":1.0,'
    '"tokens":4,"tokens_per_s":8.0,"rows_shared":0}}\n\n'
)
DONE = 'id: 4\nevent: done\ndata: {"status":"succeeded","step":3,"version":null}\n\n'
REFUSED = response("503 No", b"", "Retry-After: 5")


def streamed(*events: str, lacks_bytes: int = 0) -> bytes:
    body = "".join(events).encode()
    return response(OK, body, f"Content-Type: {EVENT_STREAM}", lacks_bytes=lacks_bytes)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def followed(kind: Kind, url: str, clock: FakeClock, timeout_s: float = 60.0) -> list[Any]:
    """The events of a job, by a client of that kind and on that clock."""
    rules = RetryRules(0, timeout_s)
    if kind == "blocking":
        transport = Transport(url, rules, clock=clock.now, sleep=clock.sleep)
        return list(transport.follow(JobEventReader("ft_1")))
    with asyncio.Runner() as runner:
        waiting = AsyncTransport(url, rules, clock=clock.now, sleep=clock.sleep_in_loop)
        try:
            return list(Blocking(waiting, runner).follow(JobEventReader("ft_1")))
        finally:
            runner.run(waiting.close())


def test_events_go_on_behind_the_last_one_that_came(kind):
    clock = FakeClock()
    with scripted_server(
        streamed(STEP.format(1), STEP.format(2), STEP.format(3)[:30], lacks_bytes=9),
        b"HTTP/1.1 ",
        REFUSED,
        # What was told before is told again by whatever stands between.
        streamed(": ping\n\n", STEP.format(2), STEP.format(3), "id: 3\nevent: mood\ndata: 1\n\n"),
        streamed(DONE),
    ) as server:
        events = followed(kind, server.url, clock)

    assert [event.id for event in events] == [1, 2, 3, 4]
    asked = [head["last-event-id"] for head in server.heads]
    assert asked == ["0", "2", "2", "2", "3"]
    # Counted from the last byte that came; a refusal says how long itself.
    assert clock.slept == [0.5, 1.0, 5.0, 0.5]


def test_events_are_asked_for_as_long_as_a_silence_may_be(kind):
    with scripted_server() as gone:
        pass
    clock = FakeClock()
    with pytest.raises(ConnectionFailed):
        followed(kind, gone.url, clock, timeout_s=8.0)
    assert clock.slept == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_an_event_without_a_number_is_none_of_this_service(kind):
    with (
        scripted_server(streamed("event: done\ndata: {}\n\n")) as server,
        pytest.raises(UnexpectedAnswer, match="has no number"),
    ):
        followed(kind, server.url, FakeClock())


def test_a_job_whose_answer_was_lost_is_asked_for_again_under_the_same_key(kind):
    clock = FakeClock()
    call = jobs.finetune_call(ROWS, "tone", {})
    with (
        scripted_server(
            b"HTTP/1.1 ", response("202 Accepted", b"half", lacks_bytes=5), response(OK, b"{}")
        ) as server,
        open_sender(kind, server.url, RetryRules(2, 60.0), clock) as sender,
    ):
        assert sender.send(call) == b"{}"
    keys = [head["idempotency-key"] for head in server.heads]
    assert keys == [call.key] * 3
    assert clock.slept == [0.5, 1.0]
    assert jobs.finetune_call(ROWS, "tone", {}).key != call.key

    # Without a key nothing is sent again.
    with (
        scripted_server(b"HTTP/1.1 ", response(OK, b"{}")) as server,
        open_sender(kind, server.url, RetryRules(2, 60.0), clock) as sender,
        pytest.raises(ConnectionLost),
    ):
        sender.send(jobs.jobs_call(1, None))


def test_a_job_is_followed_across_the_death_of_the_service(tmp_path):
    fields = {"steps": 30, "batch_size": 2, "publish": {"every": 2}, "seed": 7}
    with (
        running_service(tmp_path, "--checkpoint-seconds=0.1", **SLOW) as service,
        open_client("blocking", service.url) as client,
    ):
        job = client.finetune(ROWS, adapter="tone", **fields)
        events = iter(job.events())
        found = [next(events) for _ in range(8)]
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait()
        with running_service(tmp_path, f"--port={service.port}", **SLOW):
            found.extend(events)
            assert job.wait(timeout_s=5).status == "succeeded"
    assert [event.step for event in found if isinstance(event, StepEvent)] == list(range(1, 31))
    assert [event.id for event in found] == sorted({event.id for event in found})


# --- over a network that breaks ---------------------------------------------------------------


class Relay:
    """Passes connections on to a service, one after another, and breaks off when told to.

    Attributes:
        url: Instead of the service's.
        lost: How many answers are read from the service and given to nobody.
        cut_after: Bytes of an answer after which its connection breaks; None: never.
        num_connections: That came.
    """

    def __init__(self, service: ServiceProcess) -> None:
        self._port = service.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.lost = 0
        self.cut_after: int | None = None
        self.num_connections = 0

    def serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            with client, socket.create_connection(("127.0.0.1", self._port)) as server:
                self._pass_on(client, server)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        """One request; the service is asked to close behind it."""
        request = b""
        while b"\r\n\r\n" not in request:
            request += client.recv(1 << 16)
        head, _, body = request.partition(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.split(b"\r\n") if b"ength:" in line), 0
        )
        while len(body) < length:
            body += client.recv(1 << 16)
        head = head.replace(b"Connection: keep-alive", b"Connection: close")
        server.sendall(head + b"\r\n\r\n" + body)
        if self.lost:
            self.lost -= 1
            while server.recv(1 << 16):
                pass
            return
        passed = 0
        while piece := server.recv(1 << 10):
            client.sendall(piece)
            passed += len(piece)
            if self.cut_after is not None and passed > self.cut_after:
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextlib.contextmanager
def relay_to(service: ServiceProcess) -> Iterator[Relay]:
    relay = Relay(service)
    thread = threading.Thread(target=relay.serve)
    thread.start()
    try:
        yield relay
    finally:
        relay.close()
        thread.join()


def test_a_job_is_started_once_and_followed_whole_over_a_network_that_breaks(tmp_path):
    with (
        running_service(tmp_path) as service,
        relay_to(service) as relay,
        GemmaClient(relay.url) as client,
        GemmaClient(service.url) as near,
    ):
        relay.lost = 1
        job = client.finetune(ROWS, adapter="tone", steps=40)
        assert [each.id for each in near.jobs()] == [job.id]
        whole = list(near.job(job.id).events())

        before, relay.cut_after = relay.num_connections, 1500
        assert list(job.events()) == whole
        # Some 170 bytes each: no more than 15 events come before a break.
        assert relay.num_connections - before >= 3
    assert [event.step for event in whole if isinstance(event, StepEvent)] == list(range(1, 41))
