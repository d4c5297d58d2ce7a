"""The whole service: searches over HTTP find what the Keras samplers find on the tiny preset, and
what lists find on the arithmetic engine."""

import asyncio

import httpx
import numpy as np
import pytest

from tests.service_process import eventually, running_service
from tests.test_company import tiny_service
from tests.test_searches import beam_sampler, by_the_library, contrastive_sampler, random_tokens
from tests.test_worker_searches import best_beams, chosen_tokens

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def service(tmp_path_factory, cache_dir):
    """The real engine, four slots, so that searches wait for one another."""
    directory = tmp_path_factory.mktemp("searches")
    with tiny_service(directory, cache_dir, "--ping-seconds=0.01") as running:
        yield running


def beam(num_beams, num_prompt_tokens, **fields):
    body = {"sampler": "beam", "num_beams": num_beams, "n": num_beams, "logprobs": 2}
    return body | {"prompt": random_tokens(num_prompt_tokens), "ignore_eos": True} | fields


def contrastive(k, alpha, num_prompt_tokens, **fields):
    body = {"sampler": "contrastive", "top_k": k, "contrastive_alpha": alpha, "logprobs": 2}
    return body | {"prompt": random_tokens(num_prompt_tokens), "ignore_eos": True} | fields


# Compared with the library, which compiles anew for each.
BODIES = [beam(4, 508), contrastive(4, 0.6, 508)]
COMPANY = [
    beam(2, 20),
    beam(3, 250),
    contrastive(2, 0.9, 250),
    contrastive(3, 0.4, 20),
    {"prompt": random_tokens(300, seed=4), "temperature": 1.0, "seed": 5, "logprobs": 3, "n": 2},
    {"prompt": random_tokens(30, seed=6), "temperature": 0, "logprobs": 0},
]


def expected_tokens(body):
    """Of each output, by the sampler of the library."""
    if body["sampler"] == "beam":
        sampler = beam_sampler(body["num_beams"])
        (rows, _), columns = by_the_library("gemma3_tiny", sampler, body["prompt"], NUM_TOKENS)
        return np.asarray(rows)[0, :, columns].tolist()
    sampler = contrastive_sampler(body["top_k"], body["contrastive_alpha"])
    rows, columns = by_the_library("gemma3_tiny", sampler, body["prompt"], NUM_TOKENS)
    return np.asarray(rows)[:, columns].tolist()


async def post_all(url, bodies, *, at_once):
    """What belongs to each request of its answer; floats as they are written, to the last bit."""
    limit = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def post(body):
            async with limit:
                response = await client.post("/generate", json=body | {"max_tokens": NUM_TOKENS})
                assert response.status_code == 200, response.text
                return [
                    (output["token_ids"], output["text"], output["finish_reason"],
                     output["logprobs"])
                    for output in response.json()["outputs"]
                ]  # fmt: skip

        return await asyncio.gather(*(post(body) for body in bodies))


def test_searches_find_what_the_library_finds_alone_and_in_company(service):
    bodies = [*BODIES, *COMPANY]
    alone = asyncio.run(post_all(service.url, bodies, at_once=1))
    found = [[ids for ids, *_ in outputs] for outputs in alone[: len(BODIES)]]
    assert found == [expected_tokens(body) for body in BODIES]
    together = asyncio.run(post_all(service.url, bodies * 2, at_once=16))
    assert together == alone * 2
    assert service.metric('gemma_compilations_total{phase="serving"}') == 0


def test_a_search_streams_one_token_event_for_each_output_at_its_end(service):
    body = beam(3, 40, n=2, max_tokens=60)
    with service.stream(**body, temperature=1.0) as stream:
        start, *between, done = stream
    assert (start["event"], done["event"]) == ("start", "done")
    names = [event["event"] for event in between]
    assert names[-2:] == ["token", "token"]
    assert set(names[:-2]) <= {":"}, "nothing but pings while it searches"
    whole = service.client.post("/generate", json=body).json()
    tokens = [event["data"] for event in between[-2:]]
    assert [data["index"] for data in tokens] == [0, 1]
    for data, output in zip(tokens, whole["outputs"], strict=True):
        assert {key: data[key] for key in ("text", "token_ids", "logprobs")} == {
            key: output[key] for key in ("text", "token_ids", "logprobs")
        }
        assert len(data["token_ids"]) == 60
    totals = [sum(entry["logprob"] for entry in data["logprobs"]) for data in tokens]
    assert totals[0] >= totals[1]
    assert whole["usage"]["completion_tokens"] == 120


def test_a_bias_leads_a_search_and_stop_ids_end_it(service):
    for body in (beam(2, 20, n=1), contrastive(2, 0.0, 20)):
        body |= {"logit_bias": {"77": 50}, "stop_token_ids": [77], "min_tokens": 3}
        [output] = service.client.post("/generate", json=body).json()["outputs"]
        assert output["token_ids"].index(77) == 3
        assert (output["finish_reason"], output["stop_reason"]) == ("stop", 77)
        # The bias is not in the log-probability.
        assert output["logprobs"][3]["logprob"] < -1


def test_a_search_of_too_many_slots_or_with_other_numbers_is_refused(service):
    bodies = [
        (beam(5, 3, n=1), "/num_beams", "at most 4"),
        (contrastive(5, 0.5, 3), "/top_k", "at most 4"),
        (beam(2, 3, temperature=0.5), "/temperature", "should be 1"),
    ]
    for body, pointer, detail in bodies:
        response = service.client.post("/generate", json=body)
        assert response.status_code == 422
        [error] = response.json()["errors"]
        assert error["pointer"] == pointer
        assert detail in error["detail"]


def test_a_client_that_leaves_ends_its_search(service):
    left = 'gemma_cancelled_total{reason="disconnect"}'
    before = service.metric(left)
    with service.stream(**beam(4, 20, n=1, max_tokens=700), temperature=1.0) as stream:
        assert next(stream)["event"] == "start"
    assert eventually(lambda: service.metric(left) == before + 1)
    assert service.generate([5, 6, 7], max_tokens=1).status_code == 200


def test_searches_of_the_arithmetic_engine_are_those_that_lists_find(tmp_path):
    prompt = [1, 2, 3, 4, 5, 6]
    with running_service(tmp_path) as service:
        body = {"prompt": prompt, "max_tokens": 7}
        beams = service.client.post("/generate", json=body | {"sampler": "beam", "n": 4})
        found = [output["token_ids"] for output in beams.json()["outputs"]]
        assert found == [ids for _, ids in best_beams(prompt, 4, 7)]
        chosen = body | {"sampler": "contrastive", "top_k": 5, "contrastive_alpha": 0.5}
        [output] = service.client.post("/generate", json=chosen).json()["outputs"]
        assert output["token_ids"] == chosen_tokens(prompt, 5, 0.5, 7)
        # All eight slots are free again.
        widest = service.client.post("/generate", json=body | {"sampler": "beam", "num_beams": 8})
        assert widest.json()["outputs"][0]["token_ids"] == best_beams(prompt, 8, 7)[0][1]
