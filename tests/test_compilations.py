"""Nothing compiles while requests run, whatever they ask: counted by the service and by JAX's log.

`make test` sends some hundred random requests; GEMMA_FUZZ_REQUESTS sets another number, as
`make nightly` does.
"""

import asyncio
import os
import random

import httpx
import pytest

from tests.service_process import eventually
from tests.test_company import random_request, tiny_service

NUM_REQUESTS = int(os.environ.get("GEMMA_FUZZ_REQUESTS", "300"))
COMPILATIONS = 'gemma_compilations_total{phase="serving"}'
# What JAX writes, told to by JAX_LOG_COMPILES, before it compiles or fetches a program.
COMPILE_LINE = "Compiling "


def any_request(draw):
    """Everything that a request can say, in any combination."""
    body = random_request(draw)
    if draw.random() < 0.2:
        del body["prompt"]
        body["prompt"] = ["".join(draw.choices("abc de é🙂", k=9)) for _ in range(3)]
    if draw.random() < 0.4:
        body["stop"] = ["".join(draw.choices("ab ce", k=draw.randint(1, 3))) for _ in range(3)]
    if draw.random() < 0.4:
        body["stop_token_ids"] = draw.choices(range(512), k=draw.randint(1, 16))
        body["min_tokens"] = draw.randint(0, body["max_tokens"])
    if draw.random() < 0.2:
        body["echo"] = True
    if draw.random() < 0.2:
        body["timeout_s"] = draw.choice([0.01, 0.1, 100])
    if draw.random() < 0.3:
        body["stream"] = True
    return body


async def send(url, bodies, *, at_once):
    """The status of each; some clients leave before their answer is whole."""
    limit = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def post(number, body):
            async with limit:
                if number % 10:
                    return (await client.post("/generate", json=body)).status_code
                async with client.stream("POST", "/generate", json=body) as response:
                    return response.status_code

        return await asyncio.gather(*(post(number, body) for number, body in enumerate(bodies)))


def compile_lines(log):
    return [line for line in log.splitlines() if COMPILE_LINE in line]


@pytest.fixture(scope="module")
def logging_service(tmp_path_factory, cache_dir):
    directory = tmp_path_factory.mktemp("logging")
    with tiny_service(directory, cache_dir, JAX_LOG_COMPILES="1") as running:
        yield running


def test_f_r5_no_request_compiles_anything(logging_service):
    before = logging_service.log
    assert compile_lines(before), "the log shows what is compiled before the service is ready"
    draw = random.Random(20261123)
    bodies = [any_request(draw) for _ in range(NUM_REQUESTS)]
    statuses = asyncio.run(send(logging_service.url, bodies, at_once=16))
    assert set(statuses) <= {200, 504}, "504 only for a time of a hundredth of a second"
    assert statuses.count(200) > NUM_REQUESTS / 2
    assert logging_service.metric(COMPILATIONS) == 0
    assert compile_lines(logging_service.log[len(before) :]) == []


def test_an_engine_with_one_python_valued_parameter_is_found(tmp_path, cache_dir):
    engine = "--engine=tests.fakes.python_valued_engine:load"
    with tiny_service(tmp_path, cache_dir, engine, JAX_LOG_COMPILES="1") as service:
        before = service.log
        bodies = [{"prompt": [20], "max_tokens": 1, "temperature": t} for t in (0.1, 0.2, 0.3, 0.2)]
        asyncio.run(send(service.url, bodies, at_once=1))
        assert len(compile_lines(service.log[len(before) :])) >= 3
        assert eventually(lambda: service.metric(COMPILATIONS) >= 3)
