"""POST /score of the whole service, on the arithmetic engine."""

import base64
import concurrent.futures
import contextlib
import json
import math
import socket
import struct

import pytest

from tests.service_process import eventually, running_service


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scores")
    options = ("--context-tokens", "256", "--slots", "4")
    with running_service(directory, *options, ARITHMETIC_STEP_SECONDS="0.01") as running:
        yield running


def post(service, **body):
    return service.client.post("/score", json=body)


def scored(service, *inputs, **others):
    response = post(service, inputs=[*inputs], **others)
    assert response.status_code == 200, response.text
    return response.json()


def test_an_answer_has_what_return_names_and_nothing_else(service):
    answer = scored(service, {"context": "1 2", "targets": [" 3", " 5 8"]}, {"text": "1 1 2"})
    assert set(answer) == {"id", "model", "results", "usage", "timings"}
    assert answer["id"].startswith("sco_")
    assert answer["results"] == [
        {
            "input_index": 0, "model": "gemma", "prompt_tokens": 3,
            "targets": [
                {"text": " 3", "num_tokens": 1, "num_bytes": 2, "logprob": -1.0},
                {"text": " 5 8", "num_tokens": 2, "num_bytes": 4, "logprob": -4.0},
            ],
        },
        {
            "input_index": 1, "model": "gemma", "prompt_tokens": 4,
            "targets": [{"text": "1 1 2", "num_tokens": 3, "num_bytes": 5, "logprob": -4.0}],
        },
    ]  # fmt: skip
    assert answer["usage"] == {"prompt_tokens": 3 + 1 + 2 + 4, "cached_tokens": 0}
    assert 0 <= answer["timings"]["queue_s"] <= answer["timings"]["total_s"]


def test_loss_prob_and_greedy_come_from_the_log_probabilities(service):
    given = {"context": "1 2", "targets": [" 3", " 5 8"]}
    answer = scored(service, given, **{"return": ["loss", "prob", "greedy"]})
    first, second = answer["results"][0]["targets"]
    assert (first["loss"], second["loss"]) == (1.0, 2.0)
    assert (first["greedy"], second["greedy"]) == (True, False)
    assert first["prob"] == pytest.approx(1 / (1 + math.exp(-3)))
    assert first["prob"] + second["prob"] == pytest.approx(1)
    assert "logprob" not in first


def test_tokens_come_with_place_rank_and_alternatives(service):
    given = {"token_ids": [1, 1, 9], "target_mask": [0, 0, 1]}
    answer = scored(service, given, top=2, **{"return": ["tokens"]})
    [target] = answer["results"][0]["targets"]
    assert (target["text"], target["num_bytes"], target["logprob"]) == (None, 2, -8.0)
    assert target["tokens"] == [
        {
            "id": 9, "token": " 9", "bytes": [32, 57], "logprob": -8.0, "position": 2, "rank": 7,
            "top": [
                {"id": 2, "token": " 2", "bytes": [32, 50], "logprob": -1.0},
                {"id": 3, "token": " 3", "bytes": [32, 51], "logprob": -2.0},
            ],
        }
    ]  # fmt: skip


def test_what_generate_tells_is_what_score_tells(service):
    generated = service.generate([1, 2, 3], max_tokens=5, logprobs=2).json()["outputs"][0]
    ids = [1, 2, 3, *generated["token_ids"]]
    given = {"token_ids": ids, "target_mask": [0] * 3 + [1] * 5}
    answer = scored(service, given, top=2, **{"return": ["top"]})
    [target] = answer["results"][0]["targets"]
    shared = [
        {k: v for k, v in t.items() if k not in ("position", "rank")} for t in target["tokens"]
    ]
    assert shared == generated["logprobs"]


def test_logits_come_for_one_target(service):
    given = {"context": "1 2", "targets": [" 3 7"]}
    answer = scored(service, given, **{"return": ["logits"]})
    [result] = answer["results"]
    assert result["targets"] == [{"text": " 3 7", "num_tokens": 2, "num_bytes": 4}]
    logits, tensor = result["logits"], result["logits"]["tensor"]
    assert (logits["positions"], tensor["dtype"], tensor["shape"]) == ([2, 3], "float32", [2, 1000])
    numbers = struct.unpack("<2000f", base64.b64decode(tensor["b64"]))
    assert numbers[3] == -1, "3 is due behind 0 1 2"
    assert numbers[1000 + 7] == -1 - 1, "6 is due behind 0 1 2 3"


def test_the_served_name_is_taken_and_no_other(service):
    text = {"text": "1 2"}
    assert scored(service, text, model="gemma")["model"] == "gemma"
    assert scored(service, text, models=["gemma"])["model"] == "gemma"
    for others in ({"model": "other"}, {"models": ["gemma", "gemma:tone"]}, {"model": "gemma@1"}):
        response = post(service, inputs=[text], **others)
        assert (response.status_code, response.json()["code"]) == (404, "model_not_found")


TEXT = {"text": "1 2"}
CONTEXT = {"context": "1", "targets": [" 2"]}


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/inputs"),
        ({"inputs": []}, "/inputs"),
        ({"inputs": [TEXT] * 65}, "/inputs"),
        ({"inputs": TEXT}, "/inputs"),
        ({"inputs": [[]]}, "/inputs/0"),
        ({"inputs": [TEXT, {}]}, "/inputs/1"),
        ({"inputs": [{"text": 5}]}, "/inputs/0/text"),
        ({"inputs": [{"text": "1", "context": "1"}]}, "/inputs/0"),
        ({"inputs": [{"text": "1", "extra": 1}]}, "/inputs/0/extra"),
        ({"inputs": [{"text": "1", "targets": [" 2"]}]}, "/inputs/0/targets"),
        ({"inputs": [{"context": "1"}]}, "/inputs/0/targets"),
        ({"inputs": [{"context": "1", "targets": []}]}, "/inputs/0/targets"),
        ({"inputs": [{"context": "1", "targets": [" 2"] * 65}]}, "/inputs/0/targets"),
        ({"inputs": [{"context": "1", "targets": [" 2", ""]}]}, "/inputs/0/targets/1"),
        ({"inputs": [{"context": "1", "targets": [" 2", 7]}]}, "/inputs/0/targets/1"),
        ({"inputs": [TEXT, {"context": "1", "targets": ["9"]}]}, "/inputs/1/targets/0"),
        ({"inputs": [{"text": ""}]}, "/inputs/0/text"),
        ({"inputs": [{"text": "1 " * 300}]}, "/inputs/0/text"),
        ({"inputs": [{"token_ids": []}]}, "/inputs/0/token_ids"),
        ({"inputs": [{"token_ids": [1]}]}, "/inputs/0/token_ids"),
        ({"inputs": [{"token_ids": [1, True]}]}, "/inputs/0/token_ids/1"),
        ({"inputs": [{"token_ids": [1, -1]}]}, "/inputs/0/token_ids/1"),
        ({"inputs": [{"token_ids": [1, 1000]}]}, "/inputs/0/token_ids/1"),
        ({"inputs": [{"token_ids": [1, 2], "target_ids": [1]}]}, "/inputs/0/target_ids"),
        ({"inputs": [{"token_ids": [1, 2], "target_mask": [0]}]}, "/inputs/0/target_mask"),
        ({"inputs": [{"token_ids": [1, 2], "target_mask": [1, 1]}]}, "/inputs/0/target_mask/0"),
        ({"inputs": [{"token_ids": [1, 2], "target_mask": [0, 0]}]}, "/inputs/0/target_mask"),
        ({"inputs": [{"token_ids": [1, 2], "target_mask": [0, 2]}]}, "/inputs/0/target_mask/1"),
        ({"inputs": [{"token_ids": [1, 2], "target_mask": [0, True]}]}, "/inputs/0/target_mask/1"),
        ({"inputs": [TEXT], "return": []}, "/return"),
        ({"inputs": [TEXT, TEXT], "return": ["logits"]}, "/inputs"),
        ({"inputs": [{"context": "1", "targets": [" 2", " 3"]}], "return": ["logits"]}, "/return"),
        ({"inputs": [{"text": "1 " * 17}], "return": ["logits"]}, "/return"),
        ({"inputs": [TEXT], "return": ["logprob", "x"]}, "/return/1"),
        ({"inputs": [TEXT], "top": 3}, "/top"),
        ({"inputs": [TEXT], "return": ["top"]}, "/top"),
        ({"inputs": [TEXT], "return": ["top"], "top": 21}, "/top"),
        ({"inputs": [TEXT], "model": ""}, "/model"),
        ({"inputs": [TEXT], "models": []}, "/models"),
        ({"inputs": [TEXT], "models": ["gemma"] * 5}, "/models"),
        ({"inputs": [TEXT], "models": ["gemma", "gemma"]}, "/models"),
        ({"inputs": [TEXT], "models": ["gemma"], "model": "gemma"}, "/models"),
        ({"inputs": [TEXT], "timeout_s": 0}, "/timeout_s"),
        ({"inputs": [TEXT], "priority": 9}, "/priority"),
        ({"inputs": [TEXT], "attribution": {}}, "/attribution/method"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_its_place(service, body, pointer):
    response = service.client.post("/score", json=body)
    assert response.status_code == 422, response.text
    assert response.json()["errors"][0]["pointer"] == pointer


def test_other_failures_have_their_own_status(service):
    accept = {"Accept": "text/event-stream"}
    assert service.client.post("/score", json={"inputs": [TEXT]}, headers=accept).status_code == 406
    json_type = {"Content-Type": "application/json"}
    response = service.client.post("/score", content=b"{", headers=json_type)
    assert (response.status_code, response.json()["code"]) == (400, "malformed_json")
    response = post(service, inputs=[{"text": "901 1"}])
    assert (response.status_code, response.json()["code"]) == (500, "numerical")
    response = post(service, inputs=[{"text": "1 " * 250}], timeout_s=0.05)
    assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")


def test_requests_at_once_are_answered_as_each_alone(service):
    inputs = [
        [
            {"text": " ".join(map(str, range(number, 2 * number)))},
            {**CONTEXT, "context": str(number)},
        ]
        for number in range(3, 15)
    ]

    def results(each):
        return scored(service, *each, **{"return": ["tokens"]})["results"]

    alone = [results(each) for each in inputs]
    with concurrent.futures.ThreadPoolExecutor(len(inputs)) as pool:
        assert list(pool.map(results, inputs)) == alone


def long_score(service):
    """A request of several seconds, on a connection of its own."""
    body = json.dumps({"inputs": [{"text": "1 " * 250}] * 10}).encode()
    head = "POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", service.port))
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


RUNNING = 'gemma_num_requests_running{op="score"}'


def test_a_client_that_leaves_ends_its_request(service):
    before = service.metric('gemma_cancelled_total{reason="disconnect"}')
    with contextlib.closing(long_score(service)):
        assert eventually(lambda: service.metric(RUNNING) == 1)
    assert eventually(lambda: service.metric(RUNNING) == 0, 2)
    assert service.metric('gemma_cancelled_total{reason="disconnect"}') == before + 1
    assert scored(service, TEXT)["results"]


def test_metrics_and_info_tell_of_scores(service):
    before = service.metric('gemma_request_success_total{finished_reason="stop",op="score"}')
    tokens = service.metric('gemma_prompt_tokens_total{adapter="base",op="score"}')
    scored(service, TEXT, {"context": "1", "targets": [" 2", " 3 4"]})
    after = service.metric('gemma_request_success_total{finished_reason="stop",op="score"}')
    assert after == before + 1
    assert service.metric('gemma_prompt_tokens_total{adapter="base",op="score"}') == tokens + 3 + 5
    failed = service.metric('gemma_request_failure_total{code="invalid_field",op="score"}')
    assert post(service, inputs=[{"text": ""}]).status_code == 422
    assert (
        service.metric('gemma_request_failure_total{code="invalid_field",op="score"}') == failed + 1
    )
    limits = service.get("/info").json()["limits"]
    expected = {"score_inputs": 64, "score_targets": 64, "score_models": 4, "score_top": 20}
    expected["score_logit_positions"] = 16
    assert {name: limits[name] for name in expected} == expected


def test_a_worker_that_dies_ends_the_scores_that_it_held(service):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pending = pool.submit(post, service, inputs=[{"text": "1 " * 250}] * 10)
        assert eventually(lambda: service.metric(RUNNING) == 1)
        service.worker().kill()
        response = pending.result()
    assert (response.status_code, response.json()["code"]) == (503, "worker_restarting")
    assert eventually(service.is_ready)
    assert scored(service, TEXT)["results"]
