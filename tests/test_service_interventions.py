"""Captures and interventions over HTTP: on the arithmetic engine, and on a tiny Gemma."""

import base64
import json
import math
import struct

import numpy as np
import pytest

from service.api import intervention_schemas
from service.worker import interventions as worker_interventions
from tests import goldens
from tests.service_process import running_service
from tests.test_company import SERVED_AS_LOADED, real_engine

NAME = "gemma2_tiny"
WIDTH, LAYERS = 48, 3


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = tmp_path_factory.mktemp("arithmetic")
    with running_service(directory, "--context-tokens", "256", "--slots", "4") as running:
        yield running


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, cache_dir):
    directory = tmp_path_factory.mktemp("gemma")
    preset = f"--preset={goldens.preset_directory(NAME)}"
    with real_engine(directory, cache_dir, preset, *SERVED_AS_LOADED) as running:
        yield running


def vector(*numbers, dtype="float32"):
    letter = {"float32": "f", "float16": "e"}[dtype]
    packed = struct.pack(f"<{len(numbers)}{letter}", *numbers)
    return {"b64": base64.b64encode(packed).decode(), "dtype": dtype, "shape": [len(numbers)]}


def numbers(tensor):
    dtype = {"float32": "<f4", "float16": "<f2"}[tensor["dtype"]]
    return np.frombuffer(base64.b64decode(tensor["b64"]), dtype).reshape(tensor["shape"])


def scored(service, *inputs, **others):
    response = service.client.post("/score", json={"inputs": [*inputs], **others})
    assert response.status_code == 200, response.text
    return response.json()["results"]


IDS = {"token_ids": [1, 2, 3, 4]}
ADD = {"layers": [-1], "positions": [0], "op": "add", "vector": vector(5)}


def test_a_capture_is_told_by_target_and_layer_with_its_shape(service):
    capture = [{"layers": [0, -1], "positions": "all", "dtype": "float16"}, {"layers": [-1]}]
    given = {"context": "1 2", "targets": [" 3", " 5 8"]}
    [result] = scored(service, given, capture=capture, interventions=[ADD])
    assert [(c["target_index"], c["layer"], c["positions"]) for c in result["captures"]] == [
        (0, 0, [0, 1, 2, 3]),
        (0, -1, [0, 1, 2, 3]),
        (0, -1, [3]),
        (1, 0, [0, 1, 2, 3, 4]),
        (1, -1, [0, 1, 2, 3, 4]),
        (1, -1, [4]),
    ]
    first, *_, last = (each["tensor"] for each in result["captures"])
    assert (first["dtype"], first["shape"], last["shape"]) == ("float16", [4, 1], [1, 1])
    assert numbers(first).ravel().tolist() == [5, 6, 8, 11]
    assert numbers(last).tolist() == [[8]]
    assert "captures" not in scored(service, given)[0]


def test_a_vector_may_be_float16(service):
    half = {**ADD, "vector": vector(5, dtype="float16")}
    assert scored(service, IDS, interventions=[half]) == scored(service, IDS, interventions=[ADD])
    assert scored(service, IDS, interventions=[half]) != scored(service, IDS)


def test_a_steered_stream_is_the_steered_whole(service):
    body = {"prompt": [1, 2, 3], "max_tokens": 5, "interventions": [{**ADD, "positions": "all"}]}
    greedy = {**body, "sampler": "greedy"}
    whole = service.generate(**greedy).json()["outputs"][0]["token_ids"]
    # Every token counts for 5 more.
    assert whole == [21, 47, 99, 203, 411]
    assert [t for e in tokens_of_stream(service, greedy) for t in e["token_ids"]] == whole
    contrastive = {"sampler": "contrastive", "top_k": 2, "contrastive_alpha": 0}
    for search in ({"sampler": "beam", "num_beams": 2}, contrastive):
        response = service.client.post("/generate", json={**body, "max_tokens": 1, **search})
        assert response.json()["outputs"][0]["token_ids"] == whole[:1]


def tokens_of_stream(service, body):
    found = []
    with service.client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        kind = None
        for line in response.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            if line.startswith("data: ") and kind == "token":
                found.append(json.loads(line.removeprefix("data: ")))
    return found


SCALE = {"layers": [0], "op": "scale", "scale": 2.0}
SET = {"layers": [0], "op": "set", "vector": vector(1)}
NAN = {**vector(1), "b64": base64.b64encode(struct.pack("<f", math.nan)).decode()}
INF = {"b64": base64.b64encode(struct.pack("<e", -math.inf)).decode(), "dtype": "float16",
       "shape": [1]}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "pointer"),
    [
        (5, ""),
        ([SCALE] * 5, ""),
        ([5], "/0"),
        ([{**SCALE, "layers": []}], "/0/layers"),
        ([{**SCALE, "layers": 0}], "/0/layers"),
        ([{**SCALE, "layers": [0, True]}], "/0/layers/1"),
        ([{**SCALE, "layers": [0, 0]}], "/0/layers/1"),
        ([{**SCALE, "layers": [-2]}], "/0/layers/0"),
        ([{**SCALE, "layers": [1]}], "/0/layers/0"),
        ([{**SCALE, "layers": [*range(257)]}], "/0/layers"),
        ([{**SCALE, "op": "delete"}], "/0/op"),
        ([{"layers": [0], "scale": 1.0}], "/0/op"),
        ([{"layers": [0], "op": "scale"}], "/0/scale"),
        ([{**SCALE, "scale": 2e6}], "/0/scale"),
        ([{**SCALE, "scale": None}], "/0/scale"),
        ([{**SET, "scale": 1.0}], "/0/scale"),
        ([{"layers": [0], "op": "zero", "scale": 0.0}], "/0/scale"),
        ([{**SCALE, "vector": vector(1)}], "/0/vector"),
        ([{"layers": [0], "op": "add"}], "/0/vector"),
        ([{**SET, "vector": [1.0]}], "/0/vector"),
        ([{**SET, "vector": vector(1, 2)}], "/0/vector"),
        ([{**SET, "vector": {**vector(1), "shape": [2]}}], "/0/vector/b64"),
        ([{**SET, "vector": {**vector(1), "shape": [1, 1]}}], "/0/vector/shape"),
        ([{**SET, "vector": {**vector(1), "shape": [0]}}], "/0/vector/shape/0"),
        ([{**SET, "vector": {**vector(1), "shape": ["1"]}}], "/0/vector/shape/0"),
        ([{**SET, "vector": {**vector(1), "dtype": "int8"}}], "/0/vector/dtype"),
        ([{**SET, "vector": {**vector(1), "dtype": "float16"}}], "/0/vector/b64"),
        ([{**SET, "vector": {**vector(1), "b64": "AAA"}}], "/0/vector/b64"),
        ([{**SET, "vector": {**vector(1), "b64": "é!"}}], "/0/vector/b64"),
        ([{**SET, "vector": NAN}], "/0/vector/b64"),
        ([{**SET, "vector": INF}], "/0/vector/b64"),
        ([{**SET, "op": "project_out", "vector": vector(0)}], "/0/vector/b64"),
        ([{**SCALE, "positions": "first"}], "/0/positions"),
        ([{**SCALE, "positions": []}], "/0/positions"),
        ([{**SCALE, "positions": [*range(65)]}], "/0/positions"),
        ([{**SCALE, "positions": [0, 0]}], "/0/positions/1"),
        ([{**SCALE, "positions": [-1]}], "/0/positions/0"),
        ([{**SCALE, "positions": [1.0]}], "/0/positions/0"),
        ([SCALE, {**SCALE, "positions": [1, 4]}], "/1/positions/1"),
        ([{**SCALE, "extra": 1}], "/0/extra"),
    ],
)
def test_a_wrong_intervention_is_refused_with_its_place(service, wrong, pointer):
    for path, body in (("/score", {"inputs": [IDS]}), ("/generate", {"prompt": [1, 2, 3, 4]})):
        response = service.client.post(path, json={**body, "interventions": wrong})
        assert response.status_code == 422, response.text
        assert response.json()["errors"][0]["pointer"] == f"/interventions{pointer}"


@pytest.mark.parametrize(
    ("wrong", "pointer"),
    [
        ({}, ""),
        ([{"layers": [0]}] * 9, ""),
        ([{"positions": "all"}], "/0/layers"),
        ([{"layers": [1]}], "/0/layers/0"),
        ([{"layers": [0], "positions": [4]}], "/0/positions/0"),
        ([{"layers": [0], "positions": [*range(65)]}], "/0/positions"),
        ([{"layers": [0], "dtype": "float64"}], "/0/dtype"),
        ([{"layers": [0], "op": "zero"}], "/0/op"),
    ],
)
def test_a_wrong_capture_is_refused_with_its_place(service, wrong, pointer):
    response = service.client.post("/score", json={"inputs": [IDS], "capture": wrong})
    assert response.status_code == 422, response.text
    assert response.json()["errors"][0]["pointer"] == f"/capture{pointer}"


def test_more_than_an_answer_may_hold_is_refused(gemma):
    tokens = [5] * 512
    inputs = [{"token_ids": tokens}] * 32
    layers = [*range(-1, LAYERS)]
    capture = [{"layers": layers, "positions": "all"}]
    assert 32 * 512 * len(layers) * WIDTH * 4 > 8 * 2**20
    response = gemma.client.post("/score", json={"inputs": inputs, "capture": capture})
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/capture")


def test_the_limits_are_told(service):
    limits = service.get("/info").json()["limits"]
    expected = {"intervention_positions": 64, "intervention_scale": 1e6, "captures": 8}
    expected |= {"capture_bytes": 8 * 2**20, "tensor_bytes": 16 * 2**20}
    assert {name: limits[name] for name in expected} == expected
    assert limits["interventions"] == {"maxItems": 4}
    assert worker_interventions.MAX_CAPTURE_BYTES == intervention_schemas.MAX_CAPTURE_BYTES
    assert worker_interventions.MAX_TENSOR_BYTES == intervention_schemas.MAX_TENSOR_BYTES


def prefix_rows():
    """Rows of the goldens that are full or padded on the right, as ids, and their numbers."""
    arrays = goldens.arrays(NAME)
    ids, mask = arrays["fwd.token_ids"], arrays["fwd.padding_mask"]
    rows = [r for r in range(len(mask)) if mask[r, 0] and (np.diff(mask[r] * 1) <= 0).all()]
    return [(row, ids[row, : int(mask[row].sum())].tolist()) for row in rows]


HALF = {"layers": [1], "op": "scale", "scale": 0.5}


def test_the_stored_logits_and_streams_of_keras_hub_are_met_over_http(gemma):
    arrays = goldens.arrays(NAME)
    for row, ids in prefix_rows():
        given = {"token_ids": ids, "target_ids": [7] * len(ids)}
        capture = [{"layers": [*range(-1, LAYERS)], "positions": "all"}]
        [plain] = scored(gemma, given, capture=capture, **{"return": ["logits"]})
        [half] = scored(gemma, given, interventions=[HALF], **{"return": ["logits"]})
        for found, stored in ((plain, "score.logits"), (half, "score.logits_half1")):
            assert found["logits"]["positions"] == [*range(len(ids))]
            logits = numbers(found["logits"]["tensor"])
            np.testing.assert_allclose(logits, arrays[stored][row, : len(ids)], atol=2e-4)
        for each in plain["captures"]:
            stored = arrays[f"fwd.act.{each['layer']}"][row, : len(ids)]
            np.testing.assert_allclose(numbers(each["tensor"]), stored, atol=2e-4)


def test_over_http_too_a_zero_intervention_is_none_to_the_last_bit(gemma):
    nothing = {
        "layers": [*range(-1, LAYERS)], "op": "add", "scale": 0.0, "vector": vector(*range(WIDTH)),
    }  # fmt: skip
    [(_, ids), *_] = prefix_rows()
    body = {"prompt": ids, "max_tokens": 8, "logprobs": 20, "temperature": 1.0, "seed": 3}
    plain, zero = (
        gemma.generate(**body, interventions=each).json()["outputs"] for each in ([], [nothing])
    )
    assert plain == zero
    asked = {"top": 5, "return": ["tokens"]}
    given = {"token_ids": ids}
    assert scored(gemma, given, interventions=[nothing], **asked) == scored(gemma, given, **asked)


@pytest.mark.parametrize("positions", ["all", "context", "target", "last", [0, 3]])
def test_a_steered_generation_is_what_scores_find_step_by_step(gemma, positions):
    [(_, prompt), *_] = prefix_rows()
    random = np.random.default_rng(1)
    steer = {
        "layers": [0, 2], "op": "add", "scale": 3.0, "positions": positions,
        "vector": vector(*random.standard_normal(WIDTH)),
    }  # fmt: skip
    body = {"prompt": prompt, "max_tokens": 5, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    whole = gemma.generate(**body, interventions=[steer]).json()["outputs"][0]
    streamed = tokens_of_stream(gemma, {**body, "interventions": [steer]})
    assert [t for e in streamed for t in e["token_ids"]] == whole["token_ids"]
    assert [t for e in streamed for t in e["logprobs"]] == whole["logprobs"]
    ids, end = [*prompt], len(prompt)
    for token in whole["logprobs"]:
        places = {
            "all": [*range(len(ids))],
            "context": [*range(end)],
            "target": [*range(end, len(ids))],
            "last": [*range(end - 1, len(ids))],
        }
        acting = places[positions] if isinstance(positions, str) else positions
        given = {
            "token_ids": ids,
            "target_ids": [token["id"]] * len(ids),
            "target_mask": [0] * (len(ids) - 1) + [1],
        }
        changes = [{**steer, "positions": acting}] if acting else []
        [result] = scored(gemma, given, interventions=changes, **{"return": ["tokens"]})
        [[found]] = [target["tokens"] for target in result["targets"]]
        assert found["rank"] == 0
        assert found["logprob"] == pytest.approx(token["logprob"], abs=5e-5)
        ids.append(token["id"])
    plain = gemma.generate(**body).json()["outputs"][0]
    assert plain["logprobs"] != whole["logprobs"]


def test_values_that_overflow_fail_the_request_and_no_other(gemma):
    huge = {"layers": [0, 1], "op": "scale", "scale": 1e6}
    body = {"prompt": [5, 6, 7], "max_tokens": 2, "interventions": [huge] * 4}
    # At −1 the norm of the first block would make it small again; at the end nothing does.
    [captured] = scored(
        gemma, IDS, interventions=[{**huge, "layers": [2]}] * 4, capture=[{"layers": [2]}]
    )
    assert np.isfinite(numbers(captured["captures"][0]["tensor"])).all()
    squared = {"layers": [2], "op": "scale", "scale": 1e6}
    big = {"layers": [2], "op": "set", "vector": vector(*[3e38] * WIDTH)}
    response = gemma.generate(**{**body, "interventions": [big, squared]})
    assert (response.status_code, response.json()["code"]) == (500, "numerical")
    capture = {"capture": [{"layers": [2]}], "interventions": [big, squared]}
    response = gemma.client.post("/score", json={"inputs": [IDS], **capture})
    assert (response.status_code, response.json()["code"]) == (500, "numerical")
    assert scored(gemma, IDS)
