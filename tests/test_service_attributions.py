"""POST /score with `attribution`: fields on the arithmetic engine, numbers on a tiny Gemma."""

import base64
import concurrent.futures
import contextlib
import json
import socket
import struct

import numpy as np
import pytest

from model.attribution_questions import AttributedText
from tests import goldens
from tests.service_process import eventually, running_service
from tests.test_attribution import by_another_road
from tests.test_company import tiny_service
from tests.test_compilations import COMPILATIONS


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = tmp_path_factory.mktemp("attributions")
    options = ("--context-tokens", "1024", "--slots", "4")
    with running_service(directory, *options, ARITHMETIC_STEP_SECONDS="0.01") as running:
        yield running


TEXT = {"text": "1 2"}
CONTEXT = {"context": "1", "targets": [" 2", " 3"]}
GRADIENT = {"method": "gradient", "of": "target_logprob"}


def attributed(service, *inputs, **fields):
    response = service.client.post(
        "/score", json={"inputs": [*inputs], "attribution": {**GRADIENT, **fields}}
    )
    assert response.status_code == 200, response.text
    return [result["attribution"] for result in response.json()["results"]]


def test_scores_come_with_place_and_token(service):
    assert attributed(service, CONTEXT, {"text": "5"}, layer=0) == [
        {
            "of": "target_logprob", "layer": 0, "tensor": None, "completeness_error": None,
            "scores": [
                {"position": 0, "id": 0, "token": " 0", "score": 0.0},
                {"position": 1, "id": 1, "token": " 1", "score": 1.0},
                {"position": 2, "id": 2, "token": " 2", "score": 0.0},
            ],
        },
        {
            "of": "target_logprob", "layer": 0, "tensor": None, "completeness_error": None,
            "scores": [
                {"position": 0, "id": 0, "token": " 0", "score": 0.0},
                {"position": 1, "id": 5, "token": " 5", "score": 0.0},
            ],
        },
    ]  # fmt: skip


def test_a_tensor_comes_where_nothing_is_reduced(service):
    fields = {"method": "integrated_gradients", "of": "loss_sum", "steps": 5, "reduce": "none"}
    [found] = attributed(service, TEXT, layer=0, **fields)
    assert (found["of"], found["scores"], found["completeness_error"]) == ("loss_sum", None, 0.2)
    assert (found["tensor"]["dtype"], found["tensor"]["shape"]) == ("float32", [3, 1])
    numbers = struct.unpack("<3f", base64.b64decode(found["tensor"]["b64"]))
    assert numbers == (0, -1, 0)


def test_without_steps_there_are_as_many_as_there_may_be(service):
    [found] = attributed(service, TEXT, method="integrated_gradients")
    assert found["completeness_error"] == 1 / 64


def test_a_request_without_it_says_nothing_of_it(service):
    response = service.client.post("/score", json={"inputs": [TEXT], "attribution": None})
    assert "attribution" not in response.json()["results"][0]


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"method": None}, "/attribution/method"),
        ({"method": "saliency"}, "/attribution/method"),
        ({"of": "logit"}, "/attribution/of"),
        ({"target": -1}, "/attribution/target"),
        ({"target": 64}, "/attribution/target"),
        ({"target": 2}, "/attribution/target"),
        ({"target": 0, "of": "loss_sum"}, "/attribution/target"),
        ({"layer": -2}, "/attribution/layer"),
        ({"layer": 1}, "/attribution/layer"),
        ({"layer": 2000}, "/attribution/layer"),
        ({"layer": 0.5}, "/attribution/layer"),
        ({"reduce": "sum"}, "/attribution/reduce"),
        ({"steps": 4}, "/attribution/steps"),
        ({"steps": 0, "method": "integrated_gradients"}, "/attribution/steps"),
        ({"steps": 65, "method": "integrated_gradients"}, "/attribution/steps"),
        ({"baseline": "pad"}, "/attribution/baseline"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(service, fields, pointer):
    body = {"inputs": [CONTEXT], "attribution": {**GRADIENT, **fields}}
    response = service.client.post("/score", json=body)
    assert response.status_code == 422, response.text
    assert response.json()["errors"][0]["pointer"] == pointer


def test_what_is_too_long_or_too_much_is_refused_with_both_numbers(service):
    body = {"inputs": [TEXT, {"text": "1 " * 600}], "attribution": GRADIENT}
    response = service.client.post("/score", json=body)
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert error["pointer"] == "/inputs/1/text"
    assert "601" in error["detail"]
    assert "512" in error["detail"]
    steps = {**GRADIENT, "method": "integrated_gradients", "steps": 64}
    body = {"inputs": [{"text": "1 " * 500}] * 2, "attribution": steps}
    response = service.client.post("/score", json=body)
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert (error["pointer"], "64000" in error["detail"]) == ("/attribution", True)


def test_limits_are_told(service):
    limits = service.get("/info").json()["limits"]
    found = {name: limits[name] for name in limits if name.startswith("attribution")}
    assert found == {
        "attribution_tokens": 512, "attribution_steps": 64,
        "attribution_work_tokens": 32_768, "attribution_bytes": 8 * 2**20,
    }  # fmt: skip


RUNNING = 'gemma_num_requests_running{op="score"}'
LONG = {
    "inputs": [{"text": "1 " * 500}],
    "attribution": {**GRADIENT, "method": "integrated_gradients"},
}


def test_a_client_that_leaves_ends_its_attribution(service):
    body = json.dumps(LONG).encode()
    head = "POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with contextlib.closing(socket.create_connection(("127.0.0.1", service.port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: service.metric(RUNNING) == 1)
    assert eventually(lambda: service.metric(RUNNING) == 0, 1)
    assert attributed(service, TEXT)


def test_an_attribution_ends_when_its_time_has_passed(service):
    response = service.client.post("/score", json={**LONG, "timeout_s": 0.2})
    assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
    assert eventually(lambda: service.metric(RUNNING) == 0, 1)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, cache_dir):
    directory = tmp_path_factory.mktemp("tiny")
    with tiny_service(directory, cache_dir) as running:
        yield running


def test_a_stream_keeps_its_tokens_and_scores_theirs_beside_an_attribution(gemma):
    prompt = {
        "prompt": [2, 30, 40],
        "max_tokens": 60,
        "ignore_eos": True,
        "temperature": 0,
        "seed": 3,
    }
    text = {"token_ids": [2, *range(30, 90)]}
    alone = gemma.client.post("/generate", json=prompt).json()["outputs"]
    scored = gemma.client.post("/score", json={"inputs": [text]}).json()["results"]
    asked = {"inputs": [text], "attribution": {**GRADIENT, "method": "integrated_gradients"}}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pending = pool.submit(gemma.client.post, "/score", json=asked, timeout=60)
        beside = [gemma.client.post("/generate", json=prompt).json()["outputs"]]
        while not pending.done():
            beside.append(gemma.client.post("/generate", json=prompt).json()["outputs"])
    [result] = pending.result().json()["results"]
    assert result.pop("attribution")["completeness_error"] < 0.01
    assert result == scored[0], "to the last bit what it is without"
    assert all(each == alone for each in beside)
    assert gemma.metric(COMPILATIONS) == 0
    programs = gemma.get("/info").json()["programs"]
    assert {"block_forward[128]", "block_backward[512]", "score_gradient"} <= set(programs)


def test_a_gradient_over_http_is_of_the_model_that_interventions_make(gemma):
    ids = [2, *range(40, 60)]
    zero = {"layers": [6], "positions": "all", "op": "zero"}
    body = {
        "inputs": [{"token_ids": ids}],
        "interventions": [zero],
        "attribution": {"method": "gradient", "of": "loss_sum", "reduce": "l2", "layer": 3},
    }
    [result] = gemma.client.post("/score", json=body).json()["results"]
    found = [each["score"] for each in result["attribution"]["scores"]]
    assert found == [0.0] * len(found), "what is set to zero at the end depends on nothing"
    del body["interventions"]
    [result] = gemma.client.post("/score", json=body).json()["results"]
    found = [each["score"] for each in result["attribution"]["scores"]]
    assert sum(score == 0 for score in found) == 1, "on the last token alone nothing depends"


def test_the_gradient_over_http_is_that_of_the_library(gemma):
    ids = [2, *range(40, 60)]
    given = {"token_ids": ids, "target_ids": [*ids[1:], 7]}
    body = {
        "inputs": [given],
        "attribution": {"method": "gradient", "of": "loss_sum", "reduce": "none", "layer": 3},
    }
    [result] = gemma.client.post("/score", json=body).json()["results"]
    tensor = result["attribution"]["tensor"]
    found = np.frombuffer(base64.b64decode(tensor["b64"]), "<f4").reshape(tensor["shape"])
    model = goldens.backbone("gemma3_tiny")
    assert found.shape == (21, model.config.hidden_dim)
    text = AttributedText(tuple(ids), tuple(enumerate(given["target_ids"])))
    _, gradient, _ = by_another_road("gemma3_tiny", text, 3)
    by_hand = -gradient
    np.testing.assert_allclose(found, by_hand, atol=1e-4 * np.abs(by_hand).max(), rtol=0)
