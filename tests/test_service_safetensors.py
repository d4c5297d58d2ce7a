"""Answers of POST /score as safetensors files, read by the library and by the client."""

import base64
import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load

from service.api.safetensors import MEDIA_TYPE, NamedTensors
from service.client import UnexpectedAnswer
from tests.client_kinds import KINDS, open_client
from tests.scripted_server import OK, response, scripted_server
from tests.service_process import running_service
from tests.test_service_adapters import number_files

IDS = {"token_ids": [1, 2, 3, 4]}
HALF = {"layers": [-1, 0], "positions": "all", "dtype": "float16"}
FULL = {"layers": [0], "positions": "last", "dtype": "float32"}
NOWHERE = {"layers": [0], "positions": "context"}
SUCCESSES = 'gemma_request_success_total{finished_reason="stop",op="score"}'
DTYPES = {"float16": "<f2", "float32": "<f4"}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = tmp_path_factory.mktemp("safetensors")
    with running_service(directory, *number_files(directory / "files", tone=10)) as running:
        yield running


def post(service, accept, **body):
    return service.client.post("/score", json=body, headers={"Accept": accept})


def answer_of(file):
    size = int.from_bytes(file[:8], "little")
    return json.loads(json.loads(file[8 : 8 + size])["__metadata__"]["answer"])


def tensors_of(part):
    """Every tensor in an answer, in its order."""
    if isinstance(part, dict) and "dtype" in part:
        return [part]
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [tensor for each in parts for tensor in tensors_of(each)]


def without_time(answer):
    return {name: part for name, part in answer.items() if name not in ("id", "timings")}


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [IDS], "capture": [HALF, FULL], "return": ["tokens", "logits"]},
        {"inputs": [IDS, {"text": "7 8"}], "capture": [HALF], "models": ["gemma", "gemma:tone"]},
        {
            "inputs": [IDS, {"text": "7"}],
            "attribution": {"method": "gradient", "of": "loss_sum", "reduce": "none"},
        },
        {"inputs": [{"text": "5"}], "capture": [NOWHERE, FULL, HALF]},
        {"inputs": [{"context": "1 2", "targets": [" 3", ' 9 "\\ €']}], "return": ["tokens"]},
    ],
    ids=["logits", "versions", "attribution", "empty", "no tensors"],
)
def test_a_file_has_the_answer_and_the_bits_of_its_tensors(service, body):
    as_json = post(service, "application/json", **body)
    as_file = post(service, MEDIA_TYPE, **body)
    assert (as_json.status_code, as_file.status_code) == (200, 200), as_json.text
    assert as_file.headers["Content-Type"] == MEDIA_TYPE
    assert as_file.headers["X-Model"] == as_json.headers["X-Model"]
    expected, found = as_json.json(), answer_of(as_file.content)
    arrays = load(as_file.content)
    tensors = tensors_of(found)
    assert arrays.keys() == {each["name"] for each in tensors}
    assert len(arrays) == len(tensors), "each has a name of its own"
    for ours, theirs in zip(tensors, tensors_of(expected), strict=True):
        array = arrays[ours.pop("name")]
        assert (array.dtype, list(array.shape)) == (DTYPES[ours["dtype"]], ours["shape"])
        assert array.tobytes() == base64.b64decode(theirs["b64"])
        ours["b64"] = theirs["b64"]
    assert without_time(found) == without_time(expected)


def test_a_file_is_the_one_that_its_format_describes():
    tensors = NamedTensors()
    tensors.tensor("half", "float16", (3,), struct.pack("<3e", 1, 2, 3))
    tensors.tensor("full", "float32", (1, 2), struct.pack("<2f", 4, 5))
    header = (
        b'{"__metadata__":{"answer":"\xe2\x82\xac"},'
        b'"full":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"half":{"dtype":"F16","shape":[3],"data_offsets":[8,14]}}'
    )
    header += b" " * (-len(header) % 8)
    numbers = struct.pack("<2f", 4, 5) + struct.pack("<3e", 1, 2, 3)
    file = tensors.file({"answer": "€"})
    assert file == struct.pack("<Q", len(header)) + header + numbers
    np.testing.assert_array_equal(load(file)["full"], [[4, 5]])


@pytest.mark.parametrize(
    ("accept", "given"),
    [
        ("*/*", "application/json"),
        ("application/*;q=0.5", "application/json"),
        (f"{MEDIA_TYPE}, */*;q=0.1", MEDIA_TYPE),
        (f"*/*, {MEDIA_TYPE}", MEDIA_TYPE),
        (f"{MEDIA_TYPE}, application/json", "application/json"),
        (f"application/json;q=0.9, {MEDIA_TYPE.upper()} ; q=1.0", MEDIA_TYPE),
        ("application/json;q=0, */*", MEDIA_TYPE),
        ("text/html", None),
        (f"{MEDIA_TYPE};q=0", None),
        (f"{MEDIA_TYPE};q=much", None),
    ],
)
def test_accept_says_which_form_an_answer_has(service, accept, given):
    answer = post(service, accept, inputs=[IDS])
    if given is None:
        assert (answer.status_code, answer.json()["code"]) == (406, "not_acceptable")
        assert f"application/json or {MEDIA_TYPE}" in answer.json()["detail"]
        return
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, given)


def test_what_fails_is_a_problem_in_json_and_metrics_count_both_forms(service):
    for inputs, status in (([], 422), ([{"text": "1 " * 10_000}], 422)):
        refused = post(service, MEDIA_TYPE, inputs=inputs)
        assert refused.status_code == status
        assert refused.headers["Content-Type"] == "application/problem+json"
    before = service.metric(SUCCESSES)
    for accept in (MEDIA_TYPE, "application/json"):
        assert post(service, accept, inputs=[IDS]).status_code == 200
    assert service.metric(SUCCESSES) == before + 2


# --- the client -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_client_gives_the_same_numbers_in_both_forms(service, kind):
    with open_client(kind, service.url) as client:
        fields = {"capture": [HALF, FULL], "return_": ["logits"]}
        plain = client.score([IDS], **fields).results[0]
        other = client.score([IDS], as_safetensors=True, **fields).results[0]
    pairs = zip(
        [plain.logits.tensor, *(each.tensor for each in plain.captures)],
        [other.logits.tensor, *(each.tensor for each in other.captures)],
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours.dtype, ours.shape, ours.data) == (theirs.dtype, theirs.shape, theirs.data)
        assert len(ours.data) > 0
        assert (ours.name, theirs.b64) == (None, None)
    assert plain.targets == other.targets


def file_of(answer, **tensors):
    header = {"__metadata__": {"answer": json.dumps(answer)}, **tensors}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


LOGITS = {"positions": [0], "tensor": {"name": "x", "dtype": "float32", "shape": [1, 1]}}
ANSWER = {
    "id": "sco_1", "model": "gemma", "usage": {"prompt_tokens": 1, "cached_tokens": 0},
    "timings": {"queue_s": 0.0, "total_s": 0.0},
    "results": [{"input_index": 0, "model": "gemma", "prompt_tokens": 1, "targets": [],
                 "logits": LOGITS}],
}  # fmt: skip
X = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no whole safetensors file"),
        (b'{"id": "sco_1"}', "no whole safetensors file"),
        (b"\x02" + bytes(7) + b"[]", "no whole safetensors file"),
        (file_of(ANSWER, x={"dtype": "F32"}), "no whole safetensors file"),
        (file_of(ANSWER), r"results.*the numbers of a tensor are not there"),
        (file_of(ANSWER, x=X) + b"\0" * 3, "no whole safetensors file"),
        (file_of({"id": "sco_1"}, x=X) + b"\0" * 4, "model"),
    ],
)
def test_what_is_no_such_file_is_no_answer(body, said):
    with (
        scripted_server(response(OK, body)) as server,
        open_client("blocking", server.url) as client,
        pytest.raises(UnexpectedAnswer, match=said),
    ):
        client.score([IDS], as_safetensors=True)


def test_a_tensor_of_a_file_that_is_whole_is_read():
    body = file_of(ANSWER, x=X) + struct.pack("<f", 1.5)
    with (
        scripted_server(response(OK, body)) as server,
        open_client("blocking", server.url) as client,
    ):
        [result] = client.score([IDS], as_safetensors=True).results
    assert struct.unpack("<f", result.logits.tensor.data) == (1.5,)
