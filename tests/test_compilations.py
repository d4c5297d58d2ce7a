"""Nothing compiles while requests run, whatever they ask: counted by the service and by JAX's log.

`make test` sends some hundred random requests; GEMMA_FUZZ_REQUESTS sets another number, as
`make nightly` does.
"""

import asyncio
import base64
import os
import random
import struct

import httpx
import pytest

from tests.lora_files import lora_file
from tests.service_process import eventually
from tests.test_company import random_request, tiny_service

NUM_REQUESTS = int(os.environ.get("GEMMA_FUZZ_REQUESTS", "300"))
COMPILATIONS = 'gemma_compilations_total{phase="serving"}'
# What JAX writes, told to by JAX_LOG_COMPILES, before it compiles or fetches a program.
COMPILE_LINE = "Compiling "
NAMES = ("one", "other", "third")


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
    if draw.random() < 0.4:
        body["model"] = "gemma:" + draw.choice(NAMES)
    if draw.random() < 0.2:
        body["timeout_s"] = draw.choice([0.01, 0.1, 100])
    if draw.random() < 0.3:
        body["stream"] = True
    if draw.random() < 0.3:
        body["interventions"] = any_interventions(draw)
    return body


def any_interventions(draw, positions=("all", "context", "target", "last", [0])):
    """Of the tiny preset: 7 layers, 32 numbers wide."""
    return [
        {
            "layers": draw.sample(range(-1, 7), draw.randint(1, 8)),
            "positions": draw.choice(positions),
            **draw.choice(
                [
                    {"op": "zero"},
                    {"op": "scale", "scale": draw.uniform(-2, 2)},
                    {"op": "add", "scale": draw.uniform(-2, 2), "vector": any_vector(draw)},
                    {"op": "set", "vector": any_vector(draw)},
                    {"op": "project_out", "vector": any_vector(draw)},
                ]
            ),
        }
        for _ in range(draw.randint(1, 4))
    ]


def any_vector(draw):
    packed = struct.pack("<32f", *(draw.gauss(0, 1) for _ in range(32)))
    return {"b64": base64.b64encode(packed).decode(), "dtype": "float32", "shape": [32]}


def any_score(draw):
    """Texts of all lengths, with and without a look inside."""
    ids = [
        [draw.randrange(12, 512) for _ in range(draw.choice([2, 9, 64, 65, 200, 300, 600]))]
        for _ in range(draw.randint(1, 3))
    ]
    body = {"inputs": [{"token_ids": each} for each in ids]}
    if draw.random() < 0.5:
        body["inputs"].append({"context": "a b c", "targets": [" d", " e f g"]})
    if draw.random() < 0.7:
        body["interventions"] = any_interventions(draw)
    if draw.random() < 0.7:
        layers = draw.sample(range(-1, 7), draw.randint(1, 8))
        dtype = draw.choice(["float16", "float32"])
        positions = draw.choice(["all", "context", "target", "last", [1, 0]])
        body["capture"] = [{"layers": layers, "positions": positions, "dtype": dtype}]
    if draw.random() < 0.5 and all(len(each) <= 512 for each in ids):
        body["attribution"] = any_attribution(draw)
    return body


def any_attribution(draw):
    asked = {
        "method": "gradient",
        "of": draw.choice(["target_logprob", "loss_sum"]),
        "layer": draw.randrange(-1, 7),
        "reduce": draw.choice(["none", "dot_input", "l2"]),
    }
    if draw.random() < 0.5:
        asked |= {"method": "integrated_gradients", "steps": draw.randint(1, 5)}
    return asked


async def send(url, bodies, *, at_once):
    """The status of each; some clients leave before their answer is whole."""
    limit = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def post(number, body):
            async with limit:
                if "inputs" in body:
                    return (await client.post("/score", json=body)).status_code
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
    # More adapters than slots.
    options = [f"--adapter={name}={lora_file(directory, name)}" for name in NAMES]
    with tiny_service(directory, cache_dir, *options, JAX_LOG_COMPILES="1") as running:
        yield running


def test_f_r5_no_request_compiles_anything(logging_service):
    before = logging_service.log
    assert compile_lines(before), "the log shows what is compiled before the service is ready"
    draw = random.Random(20261123)
    bodies = [any_request(draw) for _ in range(NUM_REQUESTS)]
    bodies += [any_score(draw) for _ in range(NUM_REQUESTS // 5)]
    draw.shuffle(bodies)
    statuses = asyncio.run(send(logging_service.url, bodies, at_once=16))
    assert set(statuses) <= {200, 504}, "504 only for a time of a hundredth of a second"
    assert statuses.count(200) > NUM_REQUESTS / 2
    assert compile_lines(logging_service.log.removeprefix(before)) == []
    assert logging_service.metric(COMPILATIONS) == 0
    assert logging_service.metric("gemma_adapter_evictions_total") > 0
    assert compile_lines(logging_service.log[len(before) :]) == []


def test_an_engine_with_one_python_valued_parameter_is_found(tmp_path, cache_dir):
    engine = "--engine=tests.fakes.python_valued_engine:load"
    with tiny_service(tmp_path, cache_dir, engine, JAX_LOG_COMPILES="1") as service:
        before = service.log
        bodies = [{"prompt": [20], "max_tokens": 1, "temperature": t} for t in (0.1, 0.2, 0.3, 0.2)]
        asyncio.run(send(service.url, bodies, at_once=1))
        assert len(compile_lines(service.log[len(before) :])) >= 3
        assert eventually(lambda: service.metric(COMPILATIONS) >= 3)
