"""The client against the whole service, as processes, in both of its kinds.

The model is the arithmetic engine: each new token is the sum of all before it, modulo 1000.
"""

import asyncio
import contextlib
import json
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from service.client import (
    AsyncGemmaClient,
    ConnectionLost,
    DoneEvent,
    GemmaClient,
    InvalidField,
    NotFound,
    RequestError,
    StartEvent,
    TokenEvent,
    Unavailable,
)
from service.client.generate import generate_call
from service.client.retries import RetryRules
from tests.client_kinds import KINDS, FakeClock, Kind, open_client, open_sender
from tests.service_process import ServiceProcess, eventually, running_service

RUNNING = 'gemma_num_requests_running{op="generate"}'
WAITING = 'gemma_num_requests_waiting{op="generate"}'
LEFT = 'gemma_cancelled_total{reason="disconnect"}'
# The prompt [5] is continued by multiples of five, none of which makes the engine misbehave.
# Of 1 2 3, worked out by hand.
NUMBERS = [6, 12, 24, 48, 96, 192, 384, 768, 536, 72]
TEXT = " 6 12 24 48 96 192 384 768 536 72"


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with running_service(tmp_path_factory.mktemp("fast")) as running:
        yield running


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One slot, steps of 0.05 s and a queue of one."""
    with running_service(
        tmp_path_factory.mktemp("slow"),
        "--slots=1",
        "--queue-requests=1",
        ARITHMETIC_STEP_SECONDS="0.05",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: ServiceProcess, kind: Kind) -> Iterator[Any]:
    with open_client(kind, service.url) as opened:
        yield opened


def test_a_whole_answer_is_typed_and_the_one_that_http_gives(service, client):
    generation = client.generate("1 2 3", max_tokens=10, temperature=0.0, seed=3, logprobs=1)

    assert generation.text == TEXT
    [output] = generation.outputs
    assert (output.token_ids, output.finish_reason) == (NUMBERS, "length")
    assert output.logprobs[0].top[0].bytes == list(b" 6")
    assert generation.usage.completion_tokens == 10
    assert generation.timings.ttft_s > 0
    plain = service.generate("1 2 3", max_tokens=10, seed=3, logprobs=1).json()
    told = json.loads(generation.model_dump_json())
    for key in ("model", "outputs", "usage"):
        assert told[key] == plain[key]
    assert told.keys() == plain.keys()


def test_prompts_may_be_texts_or_ids_and_outputs_come_in_order(client):
    generation = client.generate([[1], [2]], n=2, seed=2**32 - 2, max_tokens=1)

    places = [(output.prompt_index, output.index) for output in generation.outputs]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [output.token_ids for output in generation.outputs] == [[295], [296], [2], [3]]
    with pytest.raises(ValueError, match="There are 4 outputs"):
        _ = generation.text
    assert client.generate((1, 2), max_tokens=1, temperature=0).text == " 3"
    assert client.generate(["4"], max_tokens=1, temperature=0).text == " 4"


def test_a_bias_may_be_named_by_a_number(client):
    # The arithmetic engine does not add it, but the service takes it.
    assert client.generate([1], logit_bias={7: -5.0}, max_tokens=1, temperature=0).text == " 1"


def test_a_stream_is_start_then_tokens_then_done_and_joins_to_the_whole_answer(client):
    with client.stream("1 2 3", max_tokens=10, temperature=0.0, seed=41) as stream:
        assert (stream.start, stream.done) == (None, None)
        start, *tokens, done = stream
    assert isinstance(start, StartEvent)
    assert isinstance(done, DoneEvent)
    assert (start.prompt_tokens, start.seeds) == ([4], [41])
    assert {type(token) for token in tokens} == {TokenEvent}
    assert [token_id for token in tokens for token_id in token.token_ids] == NUMBERS
    assert done.outputs[0].finish_reason == "length"
    assert (stream.start, stream.done, stream.num_tokens) == (start, done, 10)


def test_a_stream_that_is_entered_again_is_asked_for_again(client):
    stream = client.stream("1 2 3", max_tokens=3, temperature=0.0)
    for _ in range(2):
        with stream:
            assert (stream.done, stream.num_tokens) == (None, 0)
            assert "".join(stream.text) == " 6 12 24"


def test_the_texts_of_a_stream_join_to_the_whole_text(client):
    with client.stream("1 2 3", max_tokens=10, temperature=0.0) as stream:
        pieces = list(stream.text)
    assert "".join(pieces) == TEXT
    assert "" not in pieces


def test_the_text_of_several_outputs_is_not_mixed(client):
    with (
        client.stream([[1], [2]], max_tokens=2) as stream,
        pytest.raises(ValueError, match="There are 2 outputs; read the events of each"),
    ):
        next(iter(stream.text))


def test_a_stream_is_read_inside_of_its_with_statement(client):
    stream = client.stream("1", max_tokens=1)
    with pytest.raises(RuntimeError, match="inside of its with statement"):
        iter(stream)
    with stream:
        pass
    with pytest.raises(RuntimeError, match="inside of its with statement"):
        _ = stream.text


def test_a_stream_that_is_left_early_frees_its_slot(slow, kind):
    before = slow.metric(LEFT)
    with open_client(kind, slow.url) as client:
        with client.stream([5], max_tokens=3000, temperature=0.0) as stream:
            for event in stream:
                if isinstance(event, TokenEvent):
                    break
            assert eventually(lambda: slow.metric(RUNNING) == 1)
        assert eventually(lambda: slow.metric(RUNNING) == 0, 2)
        assert slow.metric(LEFT) == before + 1
        # The slot answers the next one, over the same client.
        assert client.generate([1], max_tokens=1, temperature=0.0).text == " 1"


def test_an_interrupt_in_the_block_frees_the_slot_too(slow, kind):
    with open_client(kind, slow.url) as client:
        try:
            with client.stream([5], max_tokens=3000, temperature=0.0) as stream:
                next(iter(stream))
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert eventually(lambda: slow.metric(RUNNING) == 0, 2)


def test_a_task_that_is_cancelled_frees_its_slot(slow):
    before = slow.metric(LEFT)

    async def give_up() -> None:
        async with AsyncGemmaClient(slow.url) as client:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.generate([5], max_tokens=3000, temperature=0.0)

    asyncio.run(give_up())

    assert eventually(lambda: slow.metric(RUNNING) == 0, 2)
    assert slow.metric(LEFT) == before + 1


def test_a_hundred_tasks_share_one_client_and_each_gets_its_own_answer(service):
    async def ask_all() -> list[str]:
        async with AsyncGemmaClient(service.url) as client:
            asked = (client.generate([k], max_tokens=2, temperature=0) for k in range(1, 101))
            return [generation.text for generation in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [f" {k} {2 * k}" for k in range(1, 101)]


def test_threads_share_one_client(service):
    texts: dict[int, str] = {}
    with GemmaClient(service.url) as client:

        def ask(number: int) -> None:
            texts[number] = client.generate([number], max_tokens=2, temperature=0).text

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(1, 21)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == {k: f" {k} {2 * k}" for k in range(1, 21)}


def fill(service: ServiceProcess, held: contextlib.ExitStack) -> None:
    """One request in the only slot and one in the queue, until ``held`` is closed."""
    streams = [held.enter_context(service.stream([5], max_tokens=3000))]
    assert next(streams[0])["event"] == "start"
    assert eventually(lambda: service.metric(RUNNING) == 1)
    streams.append(held.enter_context(service.stream([5], max_tokens=3000)))
    assert next(streams[1])["event"] == "start"
    # An iterator that nobody holds closes its connection.
    held.callback(streams.clear)


def test_a_full_queue_is_waited_for_as_long_as_it_says(slow, kind):
    with contextlib.ExitStack() as held:
        fill(slow, held)

        def leave() -> None:
            held.close()
            assert eventually(lambda: slow.metric(RUNNING) == slow.metric(WAITING) == 0, 2)

        clock = FakeClock(on_sleep=leave)
        with open_sender(kind, slow.url, RetryRules(2, 600.0), clock) as sender:
            answer = json.loads(
                sender.send(generate_call([3], {"max_tokens": 1, "temperature": 0}))
            )
    assert answer["outputs"][0]["token_ids"] == [3]
    [seconds] = clock.slept
    assert 1 <= seconds <= 600
    assert seconds == int(seconds)


def test_without_retries_a_full_queue_is_an_error(slow, kind):
    with contextlib.ExitStack() as held, open_client(kind, slow.url, max_retries=0) as client:
        fill(slow, held)
        for ask in (client.generate, lambda prompt: client.stream(prompt).__enter__()):
            with pytest.raises(Unavailable) as caught:
                ask([3])
            assert (caught.value.status, caught.value.code) == (429, "queue_full")
            assert caught.value.retry_after_s >= 1
    assert eventually(lambda: slow.metric(RUNNING) == 0, 2)


def test_a_request_is_cancelled_from_outside_and_keeps_what_it_had(slow, kind):
    with (
        open_client(kind, slow.url) as client,
        client.stream([5], max_tokens=3000, temperature=0.0) as stream,
    ):
        events = iter(stream)
        start = next(events)
        next(events)
        client.cancel(start.id)
        *_, done = events
        assert done.outputs[0].finish_reason == "cancelled"
        assert done.usage.completion_tokens == stream.num_tokens > 0
        with pytest.raises(NotFound) as caught:
            client.cancel(start.id)
    assert caught.value.code == "request_not_found"


@pytest.mark.parametrize(
    ("prompt", "fields", "pointer"),
    [
        ("1", {"top_p": 7.0}, "/top_p"),
        ("1", {"max_tokens": "many"}, "/max_tokens"),
        ([[1], [2, 1000]], {}, "/prompt/1/1"),
        ([], {}, "/prompt"),
    ],
)
def test_the_service_judges_and_says_which_field(client, prompt, fields, pointer):
    with pytest.raises(InvalidField) as caught:
        client.generate(prompt, **fields)
    assert [field.pointer for field in caught.value.errors] == [pointer]
    assert pointer in str(caught.value)
    assert "many" not in str(caught.value)
    assert len(caught.value.request_id) == 32


def test_a_stream_that_is_refused_has_the_same_error(client):
    with pytest.raises(InvalidField) as caught, client.stream("1", top_p=7.0):
        pytest.fail("it was refused before the block")
    assert [field.pointer for field in caught.value.errors] == ["/top_p"]


@pytest.mark.parametrize("bad", ["\ud800", float("nan")])
def test_what_json_lacks_is_refused_by_the_service_and_not_repeated(client, bad):
    with pytest.raises(RequestError) as caught:
        client.generate("1", stop=[bad])
    assert caught.value.code == "malformed_json"


@pytest.mark.parametrize("method", ["generate", "stream", "score"])
def test_an_unknown_keyword_is_a_type_error_before_anything_is_sent(client, method):
    message = rf"^{method}\(\) got an unexpected keyword argument 'temprature'$"
    with pytest.raises(TypeError, match=message):
        getattr(client, method)("1", temprature=1.0)


def test_scores_are_the_numbers_worked_out_by_hand(client):
    scores = client.score(
        [{"context": "1 2", "targets": [" 3", " 5"]}, {"token_ids": [1, 2], "target_mask": [0, 1]}],
        return_=["prob", "greedy", "top"],
        top=2,
    )

    context, ids = scores.results
    three, five = context.targets
    # 1 + 2 is 3, and each number above it is less likely by a factor of e.
    assert (three.logprob, five.logprob) == (-1, -3)
    assert three.prob == pytest.approx(1 / (1 + 2.718281828**-2))
    assert (three.greedy, five.greedy) == (True, False)
    assert (five.tokens[0].rank, five.tokens[0].top[1].id) == (2, 4)
    assert three.loss is None, "it was not asked for"
    # After 1, 2 has rank 1.
    assert ids.targets[0].logprob == -2
    assert ids.logits is None


def test_logits_are_bytes_of_numbers(client):
    scores = client.score([{"token_ids": [1, 2]}], return_=["logits"])

    tensor = scores.results[0].logits.tensor
    assert (tensor.dtype, tensor.shape) == ("float32", [1, 1000])
    numbers = struct.unpack("<1000f", tensor.data)
    assert numbers[:3] == (-1000.0, -1.0, -2.0)


def test_the_service_tells_what_it_is_and_how_it_is(client, service):
    assert client.health().status == "ok"
    assert client.ready().ready is True
    info = client.info()
    assert (info.model, info.family, info.slots) == ("gemma", "arithmetic", 8)
    assert json.loads(info.model_dump_json()) == service.get("/info").json()
    assert client.wait_until_ready().ready is True


def test_a_model_that_is_not_served_is_not_found(client):
    with pytest.raises(NotFound) as caught:
        client.score([{"text": "1 2"}], model="another")
    assert caught.value.code == "model_not_found"


# Both kinds meet the same in test_client_retries, from a server that is quicker at it.


def test_a_service_that_starts_is_waited_for(tmp_path):
    loading = {"is_ready": False, "ARITHMETIC_LOAD_SECONDS": "0.5"}
    with (
        running_service(tmp_path, **loading) as service,
        open_client("blocking", service.url, max_retries=0) as client,
    ):
        ready = client.ready()
        assert (ready.ready, ready.reason) == (False, "loading")
        with pytest.raises(Unavailable) as caught:
            client.info()
        assert caught.value.code == "loading"
        assert client.wait_until_ready(20).ready is True
        assert client.info().slots == 8


def test_a_worker_that_dies_ends_a_stream_with_its_error_and_the_next_request_waits(tmp_path):
    with (
        running_service(tmp_path, ARITHMETIC_STEP_SECONDS="0.02") as service,
        open_client("blocking", service.url) as client,
    ):
        with client.stream([5], max_tokens=3000, temperature=0.0) as stream:
            events = iter(stream)
            next(events)
            next(events)
            service.worker().kill()
            with pytest.raises(Unavailable) as caught:
                list(events)
            assert stream.num_tokens > 0
        assert (caught.value.code, caught.value.retry_after_s) == ("worker_restarting", 2)
        # Refused with Retry-After: 2, as the new worker is not there yet.
        asked_at = time.monotonic()
        assert client.generate([1], max_tokens=3, temperature=0.0).text == " 1 2 4"
        assert time.monotonic() - asked_at > 2

        with client.stream([5], max_tokens=3000, temperature=0.0) as stream:
            events = iter(stream)
            next(events)
            next(events)
            service.process.kill()
            with pytest.raises(ConnectionLost, match=r"after \d+ tokens") as lost:
                list(events)
        assert lost.value.num_tokens == stream.num_tokens > 0
