"""What is sent again, after how long, and what is not: on a clock of the test's own."""

import json

import pytest

from service.client import (
    ConnectionFailed,
    ConnectionLost,
    GemmaError,
    ServiceFailed,
    TimedOut,
    Unavailable,
)
from service.client.errors import Problem
from service.client.generate import generate_call, stream_call
from service.client.ops import READY_AT_LAST
from service.client.retries import Attempts, RetryRules
from tests.client_kinds import KINDS, FakeClock, Kind, open_client, open_sender
from tests.scripted_server import EVENT_STREAM, OK, problem, response, scripted_server

CALL = generate_call("secret", {})
STREAM = stream_call("secret", {})
ANSWER = response(OK, b"{}")
LOADING = response("503 No", problem(503, "loading", retry_after_s=4), "Retry-After: 4")
START = b'event: start\nid: 0\ndata: {"id":"g","model":"m","prompt_tokens":[1],"seeds":[7]}\n\n'
TOKENS = (
    b'event: token\nid: 1\ndata: {"prompt_index":0,"index":0,"text":"a","token_ids":[1,2],'
    b'"logprobs":null}\n\n'
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.mark.parametrize("asked", ["Retry-After: 3", "retry-after: 3"])
@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_a_refusal_waits_as_long_as_it_says_and_is_sent_again(kind, status, asked):
    clock = FakeClock()
    with (
        scripted_server(response(status, b"", asked), ANSWER) as server,
        open_sender(kind, server.url, RetryRules(2, 60.0), clock) as sender,
    ):
        assert sender.send(CALL) == b"{}"
    assert clock.slept == [3.0]
    assert server.bodies == [CALL.body] * 2


def test_the_last_refusal_is_the_error(kind):
    clock = FakeClock()
    with (
        scripted_server(LOADING, LOADING, LOADING, ANSWER) as server,
        open_sender(kind, server.url, RetryRules(2, 60.0), clock) as sender,
        pytest.raises(Unavailable) as caught,
    ):
        sender.send(CALL)
    assert (caught.value.code, caught.value.retry_after_s) == ("loading", 4)
    assert clock.slept == [4.0, 4.0]
    assert len(server.bodies) == 3


def test_no_wait_goes_beyond_the_time_for_the_whole(kind):
    clock = FakeClock()
    with (
        scripted_server(LOADING, LOADING, ANSWER) as server,
        open_sender(kind, server.url, RetryRules(9, 8.0), clock) as sender,
        pytest.raises(Unavailable),
    ):
        sender.send(CALL)
    # 4 + 4 would end when the time does.
    assert clock.slept == [4.0]
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("answer", "family"),
    [
        (response("503 No", b"<html>"), Unavailable),
        (response("500 No", problem(500, "internal"), "Retry-After: 1"), ServiceFailed),
        (response("504 No", problem(504, "deadline_exceeded")), ServiceFailed),
        (response(OK, b"half", lacks_bytes=9), ConnectionLost),
        (b"HTTP/1.1 ", ConnectionLost),
    ],
    ids=["no Retry-After", "internal", "deadline", "half an answer", "half a head"],
)
def test_nothing_else_is_sent_again(kind, answer, family):
    clock = FakeClock()
    with (
        scripted_server(answer, ANSWER) as server,
        open_sender(kind, server.url, RetryRules(2, 60.0), clock) as sender,
        pytest.raises(GemmaError) as caught,
    ):
        sender.send(CALL)
    assert type(caught.value) is family
    assert "secret" not in str(caught.value)
    assert clock.slept == []
    assert len(server.bodies) == 1


def test_a_server_that_is_not_there_is_tried_again_after_longer_and_longer(kind):
    with scripted_server() as gone:
        pass
    clock = FakeClock()
    with (
        open_sender(kind, gone.url, RetryRules(4, 60.0), clock) as sender,
        pytest.raises(ConnectionFailed, match=r"^Nobody answers at 127\.0\.0\.1:\d+\."),
    ):
        sender.send(CALL)
    assert clock.slept == [0.5, 1.0, 2.0, 2.0]


def test_a_stream_that_was_refused_is_sent_again(kind):
    clock = FakeClock()
    stream = response(OK, START, f"Content-Type: {EVENT_STREAM}")
    with (
        scripted_server(LOADING, stream) as server,
        open_sender(kind, server.url, RetryRules(2, 60.0), clock) as sender,
        sender.stream(STREAM) as events,
    ):
        assert next(iter(events)).seeds == [7]
    assert clock.slept == [4.0]
    assert len(server.bodies) == 2


@pytest.mark.parametrize("lacks_bytes", [0, 9], ids=["ended", "cut"])
def test_a_stream_that_broke_says_how_many_tokens_had_come_and_is_not_sent_again(kind, lacks_bytes):
    clock = FakeClock()
    answer = response(OK, START + TOKENS + TOKENS + b"event: to", lacks_bytes=lacks_bytes)
    read = []
    with (
        scripted_server(answer, ANSWER) as server,
        open_sender(kind, server.url, RetryRules(2, 60.0), clock) as sender,
        sender.stream(STREAM) as stream,
    ):
        with pytest.raises(ConnectionLost, match="after 4 tokens") as caught:
            read.extend(stream)
        assert list(stream) == [], "it has ended"
    assert caught.value.num_tokens == stream.num_tokens == 4
    assert clock.slept == []
    assert len(server.bodies) == 1


def test_an_error_event_is_raised_after_what_came_before_it(kind):
    told = json.dumps(problem(503, "worker_restarting", retry_after_s=2))
    events = START + TOKENS + f"event: error\nid: 2\ndata: {told}\n\n".encode()
    with (
        scripted_server(response(OK, events)) as server,
        open_client(kind, server.url) as client,
        client.stream("1") as stream,
    ):
        read = stream.text
        assert next(read) == "a"
        with pytest.raises(Unavailable) as caught:
            next(read)
    assert (caught.value.code, caught.value.retry_after_s) == ("worker_restarting", 2)


def test_an_event_that_is_newer_than_the_client_is_skipped_and_a_newer_field_kept(kind):
    newer = START.replace(b'"id"', b'"mood":"good","id"') + b"event: mood\ndata: x\n\n" + TOKENS
    with (
        scripted_server(response(OK, newer)) as server,
        open_client(kind, server.url) as client,
        client.stream("1") as stream,
    ):
        events = iter(stream)
        assert next(events).mood == "good"
        assert next(events).token_ids == [1, 2]


def test_silence_ends_a_request_and_is_not_sent_again(kind):
    with (
        scripted_server(b"", ANSWER) as server,
        open_client(kind, server.url, timeout_s=0.1) as client,
        pytest.raises(TimedOut, match="within timeout_s"),
    ):
        client.generate("secret")
    assert len(server.bodies) == 1


def test_waiting_until_ready_outlasts_both_a_server_that_is_not_there_and_one_that_loads(kind):
    loading = {"ready": False, "reason": "compiling", "progress": 0.4}
    clock = FakeClock()
    with (
        scripted_server(
            *[response("503 No", loading, "Retry-After: 1")] * 5, response(OK, {"ready": True})
        ) as server,
        open_sender(kind, server.url, RetryRules(0, 1.0), clock) as sender,
    ):
        assert sender.send(READY_AT_LAST, RetryRules(None, 60.0)) == b'{"ready": true}'
        assert clock.slept == [1.0] * 5

    with (
        open_sender(kind, server.url, RetryRules(0, 1.0), clock) as sender,
        pytest.raises(ConnectionFailed),
    ):
        sender.send(READY_AT_LAST, RetryRules(None, 10.0))
    assert clock.slept[5:] == [0.5, 1, 2, 2, 2, 2]


def test_waiting_in_vain_says_what_the_service_was_doing(kind):
    loading = {"ready": False, "reason": "compiling", "progress": 0.4}
    with (
        scripted_server(response("503 No", loading, "Retry-After: 9")) as server,
        open_client(kind, server.url) as client,
        pytest.raises(
            Unavailable, match="not ready: compiling, 40% of the start is done"
        ) as caught,
    ):
        client.wait_until_ready(5.0)
    assert (caught.value.code, caught.value.retry_after_s) == ("compiling", 9)


def test_rules_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="max_retries should be at least 0, got -1"):
        RetryRules(-1, 60.0)
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout_s should be above 0"):
            RetryRules(2, seconds)


def test_an_attempt_has_the_time_that_those_before_it_left():
    attempts = Attempts(RetryRules(2, 60.0), 100.0)
    refused = Unavailable(Problem(status=429, detail="", retry_after_s=5))

    assert attempts.seconds_left(100.0) == 60
    assert attempts.seconds_until_next(refused, 107.0) == 5
    assert attempts.seconds_left(112.0) == 48
