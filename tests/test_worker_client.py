"""service.worker_client under the real application: one request's events become one answer.

A scripted worker stands in for the process; where a stream or a hang-up matters, uvicorn serves.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from service import errors
from service.adapters import ServedModel
from service.api.generate import Answer, GenerationStream
from service.api.schemas import GenerateRequest
from service.api.state import Readiness, ServiceState
from service.app import create_app
from service.observability import GenerationMeter, Metrics
from service.protocol.messages import (
    Accepted,
    Cancel,
    Command,
    Failed,
    Finished,
    Generate,
    OutputEnd,
    Piece,
    RequestEvent,
    SamplingParameters,
    Score,
    ServerInfo,
    StopRules,
    Timings,
)
from service.settings import Settings
from service.worker_client import WorkerClient

WHOLE = {"prompt": "hi"}
STREAM = {"prompt": "hi", "stream": True}
COMMAND = Generate(
    request_id="r1",
    tenant="default",
    deadline=0.0,
    adapter=None,
    prompts=("hi",),
    num_choices=1,
    sampling=SamplingParameters(0.0, 0, 1.0, seed=7),
    stop=StopRules(8, 0, (), (), ignore_eos=False),
    num_logprobs=None,
)


class ReadyView:
    """A worker that is always ready, as the routes see it."""

    info: ServerInfo | None = None

    def readiness(self) -> Readiness:
        return Readiness()

    def refresh_gauges(self, metrics: Metrics) -> None:
        pass


class ScriptedWorker:
    """Answers every Generate with the events that ``script`` makes; records all commands."""

    def __init__(self, script: Callable[[str], list[RequestEvent]], seconds: float = 0.005) -> None:
        self.commands: list[Command] = []
        self.client = WorkerClient(self._send)
        self.metrics = Metrics()
        self.state = ServiceState(Settings(), self.client, ReadyView(), self.metrics)
        self.app = create_app(self.state)
        self._script = script
        self._seconds = seconds
        self._playing: set[asyncio.Task[None]] = set()

    def _send(self, command: Command) -> None:
        self.commands.append(command)
        if isinstance(command, Generate):
            self._playing.add(asyncio.ensure_future(self._play(command.request_id)))

    async def _play(self, request_id: str) -> None:
        for event in self._script(request_id):
            await asyncio.sleep(self._seconds)
            self.client.deliver(event)

    def num_cancelled(self) -> float | None:
        return self.metrics.registry.get_sample_value(
            "gemma_cancelled_total", {"reason": "disconnect"}
        )


def finished(request_id: str, num_tokens: int) -> Finished:
    return Finished(
        request_id, (OutputEnd("length", None, num_tokens),), Timings(0.25, 0.5, total_seconds=1.0)
    )


def hello(request_id: str) -> list[RequestEvent]:
    return [
        Accepted(request_id, (3,)),
        Piece(request_id, 0, (11,), "Hel", ()),
        Piece(request_id, 0, (12,), "lo", ()),
        finished(request_id, 2),
    ]


def endless(request_id: str) -> list[RequestEvent]:
    return [Accepted(request_id, (1,)), *[Piece(request_id, 0, (1,), "x", ())] * 100_000]


@asynccontextmanager
async def serve(worker: ScriptedWorker) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a real server on a free port; ``httpx.ASGITransport`` cannot stream."""
    config = uvicorn.Config(worker.app, port=0, http="h11", log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 (uvicorn offers no event to wait on)
        await asyncio.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
        yield client
    server.should_exit = True
    await serving


async def becomes_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (a property has no event to wait on)
            await asyncio.sleep(0.005)


async def post(worker: ScriptedWorker, body: dict[str, Any]) -> httpx.Response:
    transport = httpx.ASGITransport(worker.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        return await client.post("/generate", json=body)


def test_the_pieces_are_joined_into_one_answer():
    answer = asyncio.run(post(ScriptedWorker(hello), {**WHOLE, "seed": 7})).json()
    assert answer["outputs"] == [
        {
            "prompt_index": 0,
            "index": 0,
            "text": "Hello",
            "token_ids": [11, 12],
            "finish_reason": "length",
            "stop_reason": None,
            "seed": 7,
            "logprobs": None,
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 2}
    assert answer["timings"] == {"queue_s": 0.25, "ttft_s": 0.5, "total_s": 1.0}


@pytest.mark.parametrize("error", errors.leaves(), ids=lambda error: error.code)
@pytest.mark.parametrize("body", [WHOLE, STREAM], ids=["whole", "stream"])
def test_f_r9_a_refusal_has_its_own_status_also_when_streaming(error, body):
    worker = ScriptedWorker(lambda request_id: [Failed(request_id, error.code, "because")])
    response = asyncio.run(post(worker, body))
    assert response.status_code == error.status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["code"] == error.code
    assert (problem["detail"] == "because") == (error is not errors.InternalError)
    promised = error.default_retry_after_seconds
    assert response.headers.get("retry-after") == (None if promised is None else str(promised))
    assert worker.client.num_in_flight == 0


def test_a_code_that_nobody_knows_is_an_internal_error_and_tells_nothing():
    worker = ScriptedWorker(lambda request_id: [Failed(request_id, "no_such", "a secret")])
    response = asyncio.run(post(worker, WHOLE))
    assert response.status_code == 500
    assert response.json()["code"] == "internal"
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("prompt", "pointer"),
    [("hi", "/prompt"), ([1, 2], "/prompt/5"), (["hi"], "/prompt/0"), ([[1, 2]], "/prompt/0/5")],
)
def test_a_refusal_points_into_the_body_as_the_client_wrote_it(prompt, pointer):
    is_ids = isinstance(prompt[0], int | list)
    worker_pointer = "/prompt/0/5" if is_ids else "/prompt/0"
    worker = ScriptedWorker(lambda id_: [Failed(id_, "invalid_field", "because", worker_pointer)])
    response = asyncio.run(post(worker, {"prompt": prompt}))
    assert response.json()["errors"] == [{"pointer": pointer, "detail": "because"}]


@pytest.mark.parametrize("body", [WHOLE, STREAM], ids=["whole", "stream"])
def test_without_a_worker_nothing_is_sent_and_nothing_is_left(body):
    worker = ScriptedWorker(hello)

    def refuse(command: Command) -> None:
        raise errors.WorkerRestarting("The worker is being restarted.")

    client = WorkerClient(refuse)
    worker.app = create_app(ServiceState(Settings(), client, ReadyView(), Metrics()))
    response = asyncio.run(post(worker, body))
    assert (response.status_code, response.json()["code"]) == (503, "worker_restarting")
    assert client.num_in_flight == 0


def test_an_error_after_the_first_byte_is_an_event_that_ends_the_stream():
    def script(request_id: str) -> list[RequestEvent]:
        return [*hello(request_id)[:2], Failed(request_id, "numerical", "because")]

    response = asyncio.run(post(ScriptedWorker(script), STREAM))
    assert response.status_code == 200
    *_, last, nothing = response.text.split("\n\n")
    name, event_id, data = last.split("\n")
    assert (name, event_id, nothing) == ("event: error", "id: 2", "")
    problem = json.loads(data.removeprefix("data: "))
    assert (problem["code"], problem["status"], problem["detail"]) == ("numerical", 500, "because")


def test_an_error_after_the_first_piece_of_a_whole_answer_has_its_status():
    def script(request_id: str) -> list[RequestEvent]:
        return [*hello(request_id)[:2], Failed(request_id, "numerical", "because")]

    response = asyncio.run(post(ScriptedWorker(script), WHOLE))
    assert (response.status_code, response.json()["code"]) == (500, "numerical")


def test_every_version_that_is_compared_is_in_use_until_the_request_is_closed():
    async def scenario() -> None:
        client = WorkerClient(lambda _command: None)
        command = Score("s", "default", 0.0, "sha256:a", (), compared=(None, "sha256:b"))
        scoring = asyncio.create_task(client.score(command))
        await becomes_true(lambda: client.num_in_flight == 1)
        client.deliver(Accepted("s", (1,)))
        opened = await scoring
        assert [client.uses(f"sha256:{each}") for each in "abc"] == [True, True, False]
        opened.close()
        assert not client.uses("sha256:b")

    asyncio.run(scenario())


def test_a_lost_worker_ends_every_open_request():
    async def scenario() -> list[int]:
        worker = ScriptedWorker(lambda request_id: hello(request_id)[:2])
        posts = [asyncio.create_task(post(worker, WHOLE)) for _ in range(5)]
        await becomes_true(lambda: worker.client.num_in_flight == 5)
        worker.client.fail_all("worker_restarting", "The worker ended.")
        responses = await asyncio.gather(*posts)
        assert worker.client.num_in_flight == 0
        return [response.status_code for response in responses]

    assert asyncio.run(scenario()) == [503] * 5


@pytest.mark.parametrize("body", [WHOLE, STREAM], ids=["whole", "stream"])
def test_hanging_up_cancels_the_request(body):
    async def read_a_little(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/generate", json=body) as response:
            await anext(response.aiter_raw())
            await asyncio.sleep(3600)

    async def scenario() -> ScriptedWorker:
        worker = ScriptedWorker(endless)
        async with serve(worker) as client:
            reading = asyncio.create_task(read_a_little(client))
            await becomes_true(lambda: len(worker.commands) == 1)
            reading.cancel()
            await becomes_true(lambda: len(worker.commands) == 2)
        return worker

    worker = asyncio.run(scenario())
    generate, cancel = worker.commands
    assert isinstance(generate, Generate)
    assert cancel == Cancel(generate.request_id)
    assert worker.client.num_in_flight == 0
    assert worker.num_cancelled() == 1


def test_hanging_up_before_the_first_byte_cancels_too():
    async def scenario() -> ScriptedWorker:
        worker = ScriptedWorker(endless)
        generation = await worker.client.start(COMMAND)
        meter = GenerationMeter(worker.metrics, streaming=True)
        body = GenerateRequest.model_validate(STREAM)
        answer = Answer(
            body, COMMAND, generation, worker.state, meter, "http-1", ServedModel("gemma")
        )

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(3600)

        await GenerationStream(answer)({"type": "http"}, receive, send)
        return worker

    worker = asyncio.run(scenario())
    assert worker.commands[-1] == Cancel("r1")
    assert worker.client.num_in_flight == 0


def test_giving_up_while_waiting_for_admission_cancels_too():
    async def scenario() -> ScriptedWorker:
        worker = ScriptedWorker(lambda request_id: [])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(worker.client.start(COMMAND), timeout=0.05)
        return worker

    worker = asyncio.run(scenario())
    assert worker.commands == [COMMAND, Cancel("r1")]
    assert worker.client.num_in_flight == 0


@pytest.mark.parametrize("body", [WHOLE, STREAM], ids=["whole", "stream"])
def test_a_finished_request_is_forgotten_and_not_cancelled(body):
    worker = ScriptedWorker(hello)
    asyncio.run(post(worker, body))
    assert [type(command) for command in worker.commands] == [Generate]
    assert worker.client.num_in_flight == 0
    assert worker.num_cancelled() == 0


def test_closing_twice_cancels_once_and_late_events_are_dropped():
    async def scenario() -> list[Command]:
        worker = ScriptedWorker(lambda request_id: hello(request_id)[:1])
        generation = await worker.client.start(COMMAND)
        generation.close()
        generation.close()
        worker.client.deliver(finished("r1", 0))
        return worker.commands

    assert asyncio.run(scenario()) == [COMMAND, Cancel("r1")]


def test_a_slow_reader_gets_fewer_larger_events_and_every_token():
    def script(request_id: str) -> list[RequestEvent]:
        pieces = [Piece(request_id, 0, (number,), f" {number}", ()) for number in range(300)]
        return [Accepted(request_id, (1,)), *pieces, finished(request_id, 300)]

    async def scenario() -> list[dict[str, Any]]:
        worker = ScriptedWorker(script, seconds=0.001)
        generation = await worker.client.start(COMMAND)
        meter = GenerationMeter(worker.metrics, streaming=True)
        body = GenerateRequest.model_validate(STREAM)
        answer = Answer(
            body, COMMAND, generation, worker.state, meter, "http-1", ServedModel("gemma")
        )
        events = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(3600)
            return {}

        async def send(message: Any) -> None:
            if message.get("body", b"").startswith(b"event: token"):
                events.append(json.loads(message["body"].decode().split("data: ")[1]))
            await asyncio.sleep(0.05)

        await GenerationStream(answer)({"type": "http"}, receive, send)
        return events

    events = asyncio.run(scenario())
    assert 1 < len(events) < 50
    assert [id_ for event in events for id_ in event["token_ids"]] == list(range(300))
    assert "".join(event["text"] for event in events) == "".join(f" {id_}" for id_ in range(300))
