"""The whole service, as processes: answers, streams, refusals, and clients that leave.

The model is the arithmetic engine: each new token is the sum of all before it, modulo 1000.
"""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.fakes.arithmetic_engine import EOS_ID, next_token
from tests.service_process import ServiceProcess, eventually, running_service

RUNNING = 'gemma_num_requests_running{op="generate"}'
LEFT = 'gemma_cancelled_total{reason="disconnect"}'


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Eight slots and steps that take no time."""
    with running_service(tmp_path_factory.mktemp("fast")) as running:
        yield running


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Two slots, steps of 0.15 s, a ping after 0.05 s and a queue of two."""
    with running_service(
        tmp_path_factory.mktemp("slow"),
        "--slots=2",
        "--queue-requests=2",
        "--ping-seconds=0.05",
        "--request-timeout-seconds=2",
        ARITHMETIC_STEP_SECONDS="0.15",
    ) as running:
        yield running


def test_a_whole_answer_is_the_numbers_worked_out_by_hand(service):
    response = service.generate("1 2 3", max_tokens=10)
    assert response.status_code == 200
    answer = response.json()
    [output] = answer["outputs"]
    assert output["token_ids"] == [6, 12, 24, 48, 96, 192, 384, 768, 536, 72]
    assert output["text"] == " 6 12 24 48 96 192 384 768 536 72"
    assert (output["finish_reason"], output["stop_reason"]) == ("length", None)
    assert answer["usage"] == {"prompt_tokens": 4, "cached_tokens": 0, "completion_tokens": 10}
    assert answer["model"] == response.headers["x-model"] == "gemma"


def test_a_stream_is_start_then_tokens_then_done_and_joins_to_the_whole_answer(service):
    with service.stream("1 2 3", max_tokens=10, seed=41) as stream:
        start, *tokens, done = stream
    assert (start["event"], done["event"]) == ("start", "done")
    assert {event["event"] for event in tokens} == {"token"}
    ids = [int(event["id"]) for event in (start, *tokens, done)]
    assert ids == list(range(len(tokens) + 2))
    assert start["data"]["prompt_tokens"] == [4]
    assert start["data"]["seeds"] == [41]
    assert start["data"]["id"].startswith("gen_")
    token_ids = [id_ for event in tokens for id_ in event["data"]["token_ids"]]
    assert token_ids == [6, 12, 24, 48, 96, 192, 384, 768, 536, 72]
    text = "".join(event["data"]["text"] for event in tokens)
    assert text == " 6 12 24 48 96 192 384 768 536 72"
    assert done["data"]["outputs"] == [
        {"prompt_index": 0, "index": 0, "finish_reason": "length", "stop_reason": None}
    ]
    assert done["data"]["usage"]["completion_tokens"] == 10


def test_a_stream_has_the_headers_of_one(service):
    headers = service.generate("1", max_tokens=1, stream=True).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-model"] == "gemma"
    assert "x-request-id" in headers


def test_a_stop_string_over_a_token_border_is_cut_from_the_text(service):
    # 6 12 24 48: "2 2" begins in 12 and ends in 24.
    [output] = service.generate("1 2 3", stop=["2 2"]).json()["outputs"]
    assert output["text"] == " 6 1"
    assert output["token_ids"] == [6, 12, 24]
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", "2 2")


def test_eos_stops_and_is_a_token_but_no_text(service):
    # 333 + 333 + 333 is 999, which is eos.
    [output] = service.generate([333, 333, 333]).json()["outputs"]
    assert (output["token_ids"], output["text"]) == ([999], "")
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", 999)


def test_output_k_has_the_seed_plus_k_and_gives_the_same_alone(service):
    fields = {"temperature": 1.0, "max_tokens": 3}
    answer = service.generate([[1], [2]], n=2, seed=2**32 - 2, **fields).json()
    outputs = answer["outputs"]
    assert [(each["prompt_index"], each["index"]) for each in outputs] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert [each["seed"] for each in outputs] == [4294967294, 4294967295, 0, 1]
    # The seed is added to every sum: 1 + 4294967294 ends in 295, 2 + 0 is 2, 2 + 1 is 3.
    assert [each["token_ids"] for each in outputs] == [
        [295, 590, 180],
        [296, 592, 184],
        [2, 4, 8],
        [3, 6, 12],
    ]
    alone = service.generate([2], seed=1, **fields).json()["outputs"][0]
    assert alone["token_ids"] == [3, 6, 12]


def test_the_seed_that_the_server_drew_is_told_and_gives_the_same_again(service):
    first = service.generate([1], temperature=1.0, max_tokens=1).json()["outputs"][0]
    assert first["token_ids"] == [(1 + first["seed"]) % 1000]
    again = service.generate([1], temperature=1.0, max_tokens=1, seed=first["seed"]).json()
    assert again["outputs"][0] == first
    other = service.generate([1], temperature=1.0, max_tokens=1).json()["outputs"][0]
    assert other["seed"] != first["seed"]


def test_logprobs_come_for_every_token_with_as_many_alternatives_as_asked_for(service):
    [output] = service.generate([5], max_tokens=2, logprobs=2).json()["outputs"]
    assert [entry["id"] for entry in output["logprobs"]] == [5, 10]
    assert [len(entry["top"]) for entry in output["logprobs"]] == [2, 2]
    assert output["logprobs"][1]["bytes"] == [32, 49, 48]


def continuation(prompt: list[int], seed: int, max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens, seed))
        if tokens[-1] == EOS_ID:
            break
    return tokens[len(prompt) :]


def test_sixty_mixed_requests_over_eight_slots_each_get_their_own_answer(service):
    chance = random.Random(7)

    async def one(client: httpx.AsyncClient) -> None:
        prompt = [chance.randrange(1, 300) for _ in range(chance.randrange(1, 14))]
        seed, n = chance.randrange(2**32), chance.randrange(1, 4)
        max_tokens = chance.randrange(1, 30)
        expected = [continuation(prompt, (seed + k) % 2**32, max_tokens) for k in range(n)]
        if any(901 <= id_ <= 904 for ids in expected for id_ in ids):
            return  # these make the engine misbehave
        body: dict[str, Any] = {"prompt": prompt, "seed": seed, "n": n, "max_tokens": max_tokens}
        if chance.random() < 0.5:
            response = await client.post("/generate", json=body)
            assert [output["token_ids"] for output in response.json()["outputs"]] == expected
            return
        got: list[list[int]] = [[] for _ in range(n)]
        async with client.stream("POST", "/generate", json={**body, "stream": True}) as response:
            async for line in response.aiter_lines():
                if line.startswith('data: {"prompt_index"'):
                    data = httpx.Response(200, text=line.removeprefix("data: ")).json()
                    got[data["index"]] += data["token_ids"]
        assert got == expected

    async def all_at_once() -> None:
        limits = httpx.Limits(max_connections=60)
        async with httpx.AsyncClient(base_url=service.url, limits=limits, timeout=20) as client:
            await asyncio.gather(*(one(client) for _ in range(60)))

    asyncio.run(all_at_once())


@pytest.mark.parametrize(
    ("prompt", "fields", "pointer"),
    [
        ([1, 1000, 2], {}, "/prompt/1"),
        ([[1], [2, 1000]], {}, "/prompt/1/1"),
        ("1", {"stop_token_ids": [5, 1000]}, "/stop_token_ids/1"),
        ("1", {"top_k": 1001}, "/top_k"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_id_beyond_the_vocabulary_is_422_and_pointed_at(
    service, prompt, fields, pointer, stream
):
    response = service.generate(prompt, stream=stream, **fields)
    assert response.status_code == 422
    assert response.json()["code"] == "invalid_field"
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]


def test_a_request_that_does_not_fit_the_context_is_told_both_numbers(service):
    response = service.generate([1] * 4000, max_tokens=97)
    assert response.status_code == 422
    problem = response.json()
    assert problem["code"] == "context_length_exceeded"
    assert "4000 tokens" in problem["detail"]
    assert "max_tokens is 97" in problem["detail"]
    assert "lower max_tokens to 96" in problem["detail"]
    assert problem["errors"][0]["pointer"] == "/prompt"


def test_max_length_counts_the_prompt_of_each_row(service):
    answer = service.generate(["1 2 3", "5"], max_length=7).json()
    # <bos> and three words leave three of seven places, <bos> and one leave five.
    assert [len(output["token_ids"]) for output in answer["outputs"]] == [3, 5]
    response = service.generate(["5", "1 2 3"], max_length=4)
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert error["pointer"] == "/max_length"
    assert error["detail"] == "Counts the 4 tokens of the prompt: at least 5."


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_echo_is_the_prompt_in_front_of_the_text(service, stream):
    # A stop string that the prompt holds stops nothing there.
    fields = {"max_tokens": 3, "echo": True, "stop": ["2 3"]}
    if not stream:
        [output] = service.generate("1 2 3", **fields).json()["outputs"]
        text = output["text"]
    else:
        with service.stream("1 2 3", **fields) as events:
            tokens = [event["data"] for event in events if event["event"] == "token"]
        text = "".join(token["text"] for token in tokens)
        assert tokens[0]["text"].startswith(" 1 2 3")
    assert text == " 1 2 3 6 12 24"


def test_a_request_that_just_fits_the_context_is_served(service):
    # 4000 ones are 4000 and end in 0, which is bos and adds nothing: 0 for ever.
    [output] = service.generate([1] * 4000, max_tokens=96).json()["outputs"]
    assert output["token_ids"] == [0] * 96


def test_a_body_beyond_the_limit_is_413(service):
    response = service.client.post("/generate", json={"prompt": "1 " * 600_000})
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


def test_a_numerical_failure_is_500_for_that_request_only(service):
    response = service.generate([901])
    assert (response.status_code, response.json()["code"]) == (500, "numerical")
    assert service.generate([1], max_tokens=2).json()["outputs"][0]["token_ids"] == [1, 2]


def test_a_reader_that_does_not_read_holds_nobody_up(service):
    # With alternatives, 4,000 tokens are 6 MB: more than the kernel takes for it.
    body = b'{"prompt": [5], "temperature": 0, "max_tokens": 4000, "logprobs": 20, "stream": true}'
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        head = "POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        for _ in range(5):
            start = time.monotonic()
            assert service.generate([1], max_tokens=2).status_code == 200
            assert time.monotonic() - start < 1
        assert eventually(lambda: service.metric(RUNNING) == 0), "the worker waits for the reader"


def test_there_is_exactly_one_listening_socket(service):
    processes = [psutil.Process(service.process.pid), service.worker()]
    listening = [
        connection.laddr
        for process in processes
        for connection in process.net_connections(kind="all")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == [("127.0.0.1", service.port)]


def test_two_hundred_requests_leave_no_descriptor_and_no_thread(service):
    api, worker = psutil.Process(service.process.pid), service.worker()

    def send(count: int) -> None:
        for number in range(count):
            body = {"prompt": [number], "temperature": 0, "max_tokens": 3, "stream": number % 2 > 0}
            # A connection for each, as clients without a pool have it.
            headers = {"Connection": "close"}
            response = service.client.post("/generate", json=body, headers=headers)
            assert response.status_code == 200

    def has_no_connection() -> bool:
        return not any(each.status == "ESTABLISHED" for each in api.net_connections())

    def held() -> list[int]:
        return [api.num_fds(), worker.num_fds(), api.num_threads(), worker.num_threads()]

    send(50)
    assert eventually(has_no_connection)
    after_fifty = held()
    send(150)
    assert eventually(has_no_connection)
    assert held() == after_fifty
    # Its loop, and the one that owns the database of jobs.
    assert api.num_threads() == 2


def test_a_slow_stream_is_kept_alive_by_pings(slow):
    with slow.stream([1], max_tokens=2) as stream:
        names = [event["event"] for event in stream]
    assert names[0] == "start"
    assert names[-1] == "done"
    # Two steps of 0.15 s with a ping after every 0.05 s of silence.
    assert 2 <= names.count(":") <= 6
    assert names.count("token") == 2


def test_a_full_queue_is_429_with_retry_after_and_nothing_is_lost(slow):
    with contextlib.ExitStack() as stack:
        # Two slots, then two that wait; each start event says that the request was taken.
        streams = []
        for number in range(1, 5):
            stream = stack.enter_context(slow.stream([number], max_tokens=6))
            assert next(stream)["event"] == "start"
            streams.append(stream)
            # The first two must have left the queue before the next ones come.
            if number == 2:
                assert eventually(lambda: slow.metric(RUNNING) == 2)
        for body_stream in (False, True):
            response = slow.generate([5], stream=body_stream)
            assert (response.status_code, response.json()["code"]) == (429, "queue_full")
            assert response.headers["retry-after"] == "1"
            assert response.json()["detail"] == "2 requests and 2 tokens are waiting."
        for number, stream in enumerate(streams, start=1):
            tokens = [event["data"]["token_ids"] for event in stream if event["event"] == "token"]
            token_ids = [id_ for ids in tokens for id_ in ids]
            assert token_ids == [number * 2**step for step in range(6)]


def test_a_request_with_a_higher_priority_overtakes_those_that_wait(slow):
    with contextlib.ExitStack() as stack:
        requests = [{"n": 2, "max_tokens": 8}, {"max_tokens": 1}, {"n": 2, "priority": 8}]
        streams = []
        for fields in requests:
            stream = stack.enter_context(slow.stream([1], **{"max_tokens": 1, **fields}))
            assert next(stream)["event"] == "start"
            streams.append(stream)
            if len(streams) == 1:
                assert eventually(lambda: slow.metric(RUNNING) == 1)
        _, waits, overtakes = ([*stream][-1]["data"]["timings"]["queue_s"] for stream in streams)
    # Both slots go to the last one; the one before it came earlier and starts a step later.
    assert waits > overtakes + 0.1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_f_r12_a_client_that_leaves_frees_its_slots(slow, stream):
    left_before = slow.metric(LEFT)
    body = {"prompt": [1], "n": 2, "max_tokens": 1000, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{slow.url}/generate", json=body, timeout=httpx.Timeout(5, read=0.04))
    assert eventually(lambda: slow.metric(LEFT) == left_before + 1, 1)
    assert eventually(lambda: slow.metric(RUNNING) == 0, 1)
    assert slow.generate([1], max_tokens=1).status_code == 200


def test_a_request_that_takes_too_long_ends_with_what_it_has(slow):
    [output] = slow.generate([1], max_tokens=500).json()["outputs"]
    assert output["finish_reason"] == "timeout"
    assert output["token_ids"] == continuation([1], 0, len(output["token_ids"]))
    assert 5 <= len(output["token_ids"]) <= 14


def test_a_request_may_have_less_time_than_the_service_allows(slow):
    [output] = slow.generate([1], max_tokens=500, timeout_s=0.7).json()["outputs"]
    assert output["finish_reason"] == "timeout"
    assert 1 <= len(output["token_ids"]) <= 5
    assert output["token_ids"] == continuation([1], 0, len(output["token_ids"]))


def test_a_request_that_is_cancelled_by_its_id_ends_with_what_it_has(slow):
    cancelled_before = slow.metric('gemma_cancelled_total{reason="api"}')
    with slow.stream([1], max_tokens=1000) as stream:
        events = (event for event in stream if event["event"] != ":")
        start, first = next(events), next(events)
        assert first["event"] == "token"
        response = slow.client.delete(f"/requests/{start['data']['id']}")
        assert (response.status_code, response.content) == (204, b"")
        *tokens, done = events
    assert [output["finish_reason"] for output in done["data"]["outputs"]] == ["cancelled"]
    assert len(tokens) <= 3
    assert slow.metric('gemma_cancelled_total{reason="api"}') == cancelled_before + 1
    again = slow.client.delete(f"/requests/{start['data']['id']}")
    assert (again.status_code, again.json()["code"]) == (404, "request_not_found")
    assert slow.generate([1], max_tokens=1).status_code == 200


def test_a_request_without_a_token_in_its_time_is_504(slow):
    # 80 prompt tokens are 20 chunks of 0.15 s, and the request has two seconds.
    response = slow.generate([1] * 80)
    assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")


def test_the_worker_does_not_inherit_the_lock_of_the_data_folder(service):
    def locks(process: psutil.Process) -> list[str]:
        return [file.path for file in process.open_files() if file.path.endswith("/lock")]

    assert len(locks(psutil.Process(service.process.pid))) == 1
    assert locks(service.worker()) == []
