"""DELETE /requests/{id}, on requests that are answered whole and so tell their id at the end."""

import concurrent.futures

import pytest

from service.client import NotFound, RequestError
from tests.client_kinds import KINDS, open_client
from tests.service_process import eventually, running_service
from tests.test_service_adapters import number_files

RUNNING = 'gemma_num_requests_running{op="score"}'
WAITING = 'gemma_num_requests_waiting{op="score"}'
CANCELLED = 'gemma_cancelled_total{reason="api"}'
# Some seconds of work.
LONG = {"inputs": [{"text": "1 " * 250}] * 20}
SHORT = {"inputs": [{"token_ids": [1, 2]}]}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Two slots for three adapters, and steps of 0.02 s."""
    directory = tmp_path_factory.mktemp("cancelled")
    files = number_files(directory / "files", a=10, b=20, c=30)
    options = ("--adapter-slots=2", "--slots=4", "--context-tokens=256")
    with running_service(directory, *files, *options, ARITHMETIC_STEP_SECONDS="0.02") as running:
        yield running


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield pool


def post(service, path, name, body):
    return service.client.post(path, json=body, headers={"X-Request-Id": name})


def becomes(service, metric, value):
    """Within a time that is long for machines that are shared."""
    return eventually(lambda: service.metric(metric) == value, 20)


def cancel(service, name):
    return service.client.delete(f"/requests/{name}").status_code


def assert_cancelled(response, name):
    assert (response.status_code, response.json()["code"]) == (409, "request_cancelled")
    assert response.json()["request_id"] == response.headers["X-Request-Id"] == name


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"models": ["gemma:a", "gemma", "gemma:b"]},
        {"capture": [{"layers": [0], "positions": "all"}]},
        {
            "inputs": [{"text": "1 " * 20}] * 20,
            "attribution": {"method": "integrated_gradients", "of": "loss_sum"},
        },
    ],
    ids=["scores", "versions", "captures", "attribution"],
)
def test_a_score_that_runs_is_ended_by_the_name_it_was_sent_with(service, pool, more):
    before = service.metric(CANCELLED)
    answer = pool.submit(post, service, "/score", "mine", {**LONG, **more})
    assert becomes(service, RUNNING, 1)
    assert cancel(service, "mine") == 204
    assert_cancelled(answer.result(timeout=20), "mine")
    assert becomes(service, RUNNING, 0)
    assert becomes(service, WAITING, 0)
    assert service.metric(CANCELLED) == before + 1
    assert cancel(service, "mine") == 404, "it runs no more"
    assert post(service, "/score", "next", SHORT).status_code == 200


def test_slots_of_the_bank_that_it_held_go_to_who_waits_for_them(service, pool):
    long = {**LONG, "models": ["gemma:a", "gemma:b"]}
    first = pool.submit(post, service, "/score", "first", long)
    assert becomes(service, RUNNING, 1)
    waiting = pool.submit(post, service, "/score", "second", {**SHORT, "model": "gemma:c"})
    assert eventually(lambda: service.metric(WAITING) >= 1)
    third = {**SHORT, "models": ["gemma:c", "gemma:a"]}
    also_waiting = pool.submit(post, service, "/score", "third", third)
    assert cancel(service, "first") == 204
    assert_cancelled(first.result(timeout=20), "first")
    for answer in (waiting, also_waiting):
        assert answer.result(timeout=20).status_code == 200


def test_a_score_that_waits_is_ended_before_anything_of_it_was_read(service, pool):
    held = pool.submit(post, service, "/score", "held", {**LONG, "models": ["gemma:a", "gemma:b"]})
    assert becomes(service, RUNNING, 1)
    waiting = pool.submit(post, service, "/score", "waiting", {**SHORT, "model": "gemma:c"})
    assert eventually(lambda: cancel(service, "waiting") == 204)
    assert_cancelled(waiting.result(timeout=20), "waiting")
    assert cancel(service, "held") == 204
    assert_cancelled(held.result(timeout=20), "held")


def test_all_requests_of_one_name_are_ended_and_no_others(service, pool):
    # Multiples of five, none of which makes the engine misbehave.
    body = {"prompt": [5], "max_tokens": 250, "temperature": 0, "ignore_eos": True}
    twins = [
        pool.submit(post, service, "/score", "twins", LONG),
        pool.submit(post, service, "/generate", "twins", body),
    ]
    other = pool.submit(post, service, "/generate", "other", {**body, "max_tokens": 40})
    assert becomes(service, 'gemma_num_requests_running{op="generate"}', 2)
    assert becomes(service, RUNNING, 1)
    assert cancel(service, "twins") == 204
    score, generation = (each.result(timeout=20) for each in twins)
    assert_cancelled(score, "twins")
    [output] = generation.json()["outputs"]
    assert output["finish_reason"] == "cancelled"
    assert 0 < len(output["token_ids"]) < 250
    [output] = other.result(timeout=20).json()["outputs"]
    assert (output["finish_reason"], len(output["token_ids"])) == ("length", 40)


@pytest.mark.parametrize("kind", KINDS)
def test_the_client_names_a_request_and_ends_it_from_elsewhere(service, pool, kind):
    def score():
        with open_client(kind, service.url) as client:
            client.score(LONG["inputs"], request_id="of-client")

    # Of the test before.
    assert becomes(service, RUNNING, 0)
    running = pool.submit(score)
    assert becomes(service, RUNNING, 1)
    with open_client(kind, service.url) as client:
        client.cancel("of-client")
        with pytest.raises(RequestError) as caught:
            running.result(timeout=20)
        assert (caught.value.code, caught.value.request_id) == ("request_cancelled", "of-client")
        with pytest.raises(NotFound):
            client.cancel("of-client")
