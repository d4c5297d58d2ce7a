"""Answers under mixed random load are, to the last bit, those of the same requests sent alone.

Alone means one at a time to another service, one that keeps no prefixes: so the answers are also
those after a restart, and those with the prefix cache on are those with it off.

`make test` compares some hundred answers of the tiny preset, and some of Gemma 3 270M;
GEMMA_CAMPAIGN_ANSWERS and GEMMA_CAMPAIGN_REAL_ANSWERS set other numbers, as `make nightly` does.
"""

import asyncio
import contextlib
import os
import random

import httpx
import pytest

from tests.service_process import eventually, running_service

NUM_ANSWERS = int(os.environ.get("GEMMA_CAMPAIGN_ANSWERS", "500"))
NUM_REAL_ANSWERS = int(os.environ.get("GEMMA_CAMPAIGN_REAL_ANSWERS", "20"))
CONTEXT_TOKENS = 2304
# As `engine_of` of conftest.py loads it, so that both have the same programs.
SERVED_AS_LOADED = (
    *("--slots=4", "--context-tokens=1024"),
    *("--adapter-slots=4", "--adapter-max-rank=8"),
)
CACHED_TOKENS = 'gemma_prefix_cached_tokens_total{adapter="base"}'
# What many prompts begin with, as a system prompt would be.
SHARED = random.Random(1).choices(range(12, 512), k=2100)


@contextlib.contextmanager
def real_engine(directory, cache_dir, *options, **environment):
    cache = f"--cache-dir={cache_dir}"
    words = ("--engine=model.engine:load", cache, *options)
    with running_service(directory, *words, is_ready=False, **environment) as running:
        assert eventually(running.is_ready, 300), running.log
        yield running


def tiny_service(directory, cache_dir, *options, **environment):
    """The real engine on the tiny preset: four slots, so that most requests wait and mix.

    All tests that use it share its programs; two slots for adapters, so that three come and go.
    """
    context = f"--context-tokens={CONTEXT_TOKENS}"
    words = ("--preset=tiny", "--slots=4", "--adapter-slots=2", context, *options)
    return real_engine(directory, cache_dir, *words, **environment)


@pytest.fixture(scope="module")
def service(tmp_path_factory, cache_dir):
    with tiny_service(tmp_path_factory.mktemp("company"), cache_dir) as running:
        yield running


@pytest.fixture(scope="module")
def forgetful_service(tmp_path_factory, cache_dir):
    directory = tmp_path_factory.mktemp("alone")
    with tiny_service(directory, cache_dir, "--prefix-cache-bytes=0") as running:
        yield running


def random_request(draw):
    """Any prompt that fits, and any way to draw; short answers, as there are many."""
    lengths = [1, 2, 7, 31, 40, 40, 63, 64, 65, 200, 255, 256, 257, 300, 513, 600, 1900, 2000]
    num_prompt = draw.choice(lengths)
    num_shared = draw.choice([0, 0, num_prompt // 2, num_prompt - 1])
    others = [draw.randrange(12, 512) for _ in range(num_prompt - num_shared)]
    body = {
        "prompt": SHARED[:num_shared] + others,
        "max_tokens": draw.randint(1, 12),
        "seed": draw.randrange(2**32),
        "temperature": draw.choice([0, 0.3, 1.0, 2.5]),
        "n": draw.choice([1, 1, 1, 2, 4]),
        "logprobs": draw.choice([None, 0, 3, 20]),
        "ignore_eos": draw.random() < 0.5,
    }
    if draw.random() < 0.4:
        body |= {"top_k": draw.choice([1, 5, 40]), "top_p": draw.choice([0.3, 0.9, 1.0])}
    if draw.random() < 0.3:
        body["min_p"] = draw.choice([0.01, 0.2])
    if draw.random() < 0.3:
        body |= {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.2}
    if draw.random() < 0.3:
        body["logit_bias"] = {str(draw.randrange(512)): draw.uniform(-5, 5) for _ in range(9)}
    if draw.random() < 0.2:
        body["min_tokens"] = body["max_tokens"]
    return searching(body, draw) if draw.random() < 0.15 else body


def searching(body, draw):
    """The same request with a search in place of its draws."""
    kept = ("prompt", "max_tokens", "min_tokens", "logprobs", "ignore_eos", "logit_bias")
    body = {key: body[key] for key in kept if key in body}
    if draw.random() < 0.5:
        num_beams = draw.randint(2, 4)
        n = draw.randint(1, num_beams)
        return body | {"sampler": "beam", "num_beams": num_beams, "n": n}
    alpha = draw.choice([0, 0.5, 0.9])
    top_k = draw.randint(2, 4)
    return body | {"sampler": "contrastive", "top_k": top_k, "contrastive_alpha": alpha, "n": 1}


def parts(answer):
    """All of an answer that belongs to the request, floats as they are written: to the last bit."""
    return [
        (output["token_ids"], output["text"], output["finish_reason"], output["logprobs"])
        for output in answer["outputs"]
    ]


async def post_all(url, bodies, at_once):
    limit = asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:

        async def post(body):
            async with limit:
                response = await client.post("/generate", json=body)
                assert response.status_code == 200, response.text
                return parts(response.json())

        return await asyncio.gather(*(post(body) for body in bodies))


def random_requests(num_answers):
    draw = random.Random(20261122)
    bodies = []
    while sum(body["n"] for body in bodies) < num_answers:
        bodies.append(random_request(draw))
    return bodies


def test_f_r6_every_answer_in_company_is_the_answer_alone(service, forgetful_service):
    bodies = random_requests(NUM_ANSWERS)
    together = asyncio.run(post_all(service.url, bodies, at_once=24))
    compilations = service.metric('gemma_compilations_total{phase="serving"}')
    assert service.metric(CACHED_TOKENS) > 0
    alone = asyncio.run(post_all(forgetful_service.url, bodies, at_once=1))
    assert forgetful_service.metric(CACHED_TOKENS) == 0
    different = [
        number
        for number, pair in enumerate(zip(together, alone, strict=True))
        if pair[0] != pair[1]
    ]
    assert different == []
    assert compilations == 0


def test_f_r6_so_it_is_on_gemma_3_270m(tmp_path, cache_dir):
    bodies = random_requests(NUM_REAL_ANSWERS)
    with real_engine(tmp_path, cache_dir, "--preset=gemma3_270m") as service:
        together = asyncio.run(post_all(service.url, bodies, at_once=12))
        alone = asyncio.run(post_all(service.url, bodies, at_once=1))
        assert service.metric('gemma_compilations_total{phase="serving"}') == 0
    assert together == alone


def test_another_seed_or_a_neighbouring_bias_would_be_noticed(service):
    """The comparison can fail: what is compared changes with the least part of a request."""
    body = {"prompt": [40, 77, 91], "max_tokens": 8, "temperature": 1.0, "seed": 5, "logprobs": 3}
    changed = [{**body, "seed": 6}, {**body, "prompt": [40, 77, 92]}]
    first, *others = asyncio.run(post_all(service.url, [body, *changed], at_once=1))
    assert all(other != first for other in others)


def test_one_unit_in_the_last_place_of_a_row_in_company_would_be_noticed(tmp_path, cache_dir):
    engine = "--engine=tests.fakes.uneven_company_engine:load"
    # Long enough that none has ended before the next one comes, however busy the machine is.
    body = {"prompt": [40, 77, 91], "max_tokens": 600, "logprobs": 0, "ignore_eos": True}
    bodies = [{**body, "seed": seed} for seed in range(4)]
    with tiny_service(tmp_path, cache_dir, engine) as uneven:
        together = asyncio.run(post_all(uneven.url, bodies, at_once=4))
        alone = asyncio.run(post_all(uneven.url, bodies, at_once=1))
    assert together != alone
