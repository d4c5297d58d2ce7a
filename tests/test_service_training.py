"""Jobs over HTTP with the real trainer on the tiny preset: API, worker, database and files.

What a job ends with is compared by the SHA-256 of the file that a client downloads. `make nightly`
kills more often, by GEMMA_CAMPAIGN_KILLS.
"""

import concurrent.futures
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import zipfile
from functools import partial

import pytest
from safetensors.numpy import load, save

from tests.service_process import eventually
from tests.test_company import tiny_service
from tests.test_service_finetune import job, told

NUM_KILLS = int(os.environ.get("GEMMA_CAMPAIGN_KILLS", "1"))
NUM_STEPS = 120
BINARY = {"Content-Type": "application/octet-stream"}
DRAW = random.Random(7)
# As long as they are, all of a step stand in one micro-batch with rows of others.
ROWS = [
    {"token_ids": [2, *DRAW.choices(range(12, 512), k=10)], "loss_mask": [0] * 4 + [1] * 7}
    for _ in range(6)
]
JOB = {
    "adapter": "tone",
    "data": ROWS,
    "validation": ROWS,
    "steps": NUM_STEPS,
    "batch_size": 2,
    "learning_rate": 0.01,
    "rank": 4,
    "seed": 5,
}
PROMPT = [2, 40, 77, 91]


@pytest.fixture(scope="module")
def service(tmp_path_factory, cache_dir):
    with tiny_service(tmp_path_factory.mktemp("training"), cache_dir) as running:
        yield running


def posted(service, **fields):
    response = service.client.post("/finetune", json={**JOB, **fields})
    assert response.status_code == 202, response.text
    return response.json()["id"]


def ended(service, job_id):
    found = told(service, job_id)
    assert found[-1]["data"]["status"] == "succeeded", (found[-1], service.log)
    return job(service, job_id)


def measured(service, job_id):
    """Losses of the validation rows, in order."""
    return [each["data"]["valid_loss"] for each in told(service, job_id) if each["event"] == "eval"]


def weights(service, name, version, layout="keras"):
    return service.get(f"/adapters/{name}/versions/{version}/weights?format={layout}")


def digest(service, made):
    content = weights(service, made["adapter"], made["version"]).content
    return hashlib.sha256(content).hexdigest()


def upload(service, name, content, layout):
    return service.client.put(f"/adapters/{name}?format={layout}", content=content, headers=BINARY)


def answer(service, model="gemma", **fields):
    """Greedy tokens with what the model thinks of them and of two others each."""
    body = {"model": model, "max_tokens": 8, "logprobs": 2, "ignore_eos": True, **fields}
    response = service.generate(PROMPT, **body)
    assert response.status_code == 200, response.text
    return response.json()["outputs"][0]["logprobs"]


def loss_of_rows(service, model):
    """Mean over the trained tokens, as /score has it."""
    inputs = [{"token_ids": row["token_ids"], "target_mask": row["loss_mask"]} for row in ROWS]
    response = service.client.post("/score", json={"model": model, "inputs": inputs})
    targets = [result["targets"][0] for result in response.json()["results"]]
    assert [target["num_tokens"] for target in targets] == [7] * len(ROWS)
    return -sum(target["logprob"] for target in targets) / (7 * len(ROWS))


@pytest.fixture(scope="module")
def alone(service):
    """The base before anything was trained, a job that trains alone, and the base beside it."""
    before = answer(service)
    job_id = posted(service, publish={"every": 50})
    beside = []
    while job(service, job_id)["status"] != "succeeded":
        beside.append(answer(service))
    made = ended(service, job_id)
    return {"before": before, "beside": beside, "job": made, "digest": digest(service, made)}


def test_f_r7_what_a_job_makes_answers_otherwise_and_scores_as_the_job_measured(service, alone):
    made = alone["job"]
    assert alone["beside"], "the base answered while the job trained"
    assert all(each == alone["before"] for each in alone["beside"])
    first, *_, last = measured(service, made["id"])
    assert last == made["metrics"]["valid_loss"] < first / 2
    assert loss_of_rows(service, "gemma") == pytest.approx(first, abs=5e-5)
    assert loss_of_rows(service, "gemma:tone") == pytest.approx(last, abs=5e-5)
    models = ["gemma", "gemma:tone", "gemma:tone@1", "gemma:tone@2", "gemma:tone@3"]
    with concurrent.futures.ThreadPoolExecutor(len(models)) as together:
        answers = dict(together.map(lambda each: (each, answer(service, each)), models))
    assert answers["gemma"] == alone["before"]
    assert answers["gemma:tone"] == answers["gemma:tone@3"]
    assert len({json.dumps(each) for each in answers.values()}) == 4


def test_a_job_packed_with_three_others_ends_with_the_bytes_of_one_alone(service, alone):
    job_ids = [posted(service, adapter="packed")]
    job_ids += [
        posted(service, adapter=f"other{rank}", rank=rank, seed=rank, data=ROWS[rank:])
        for rank in (1, 2, 3)
    ]
    made = [ended(service, job_id) for job_id in job_ids]
    assert digest(service, made[0]) == alone["digest"]
    assert len({digest(service, each) for each in made}) == 4
    events = told(service, job_ids[0])
    assert any(each["data"]["rows_shared"] for each in events if each["event"] == "step")


def test_a_job_goes_on_from_a_version_and_says_where_it_comes_from(service, alone):
    made = ended(service, posted(service, init="tone@1", rank=4, steps=5))
    version = service.get(f"/adapters/tone/versions/{made['version']}").json()
    assert (version["parent"], version["init"], version["step"]) == (1, "gemma:tone@1", 5)
    assert version["job"] == made["id"]
    first, *_, last = measured(service, made["id"])
    assert loss_of_rows(service, "gemma:tone@1") == pytest.approx(first, abs=5e-5)
    assert loss_of_rows(service, f"gemma:tone@{made['version']}") == pytest.approx(last, abs=5e-5)
    other = service.client.post("/finetune", json={**JOB, "init": "tone@1", "rank": 8})
    assert (other.status_code, other.json()["errors"][0]["pointer"]) == (422, "/init")


def test_files_go_out_and_come_in_again_as_the_same_adapter(service, alone):
    number = alone["job"]["version"]
    mine = answer(service, f"gemma:tone@{number}")
    keras = weights(service, "tone", number).content
    assert upload(service, "keras", keras, "keras").status_code == 201
    assert weights(service, "keras", 1).content == keras
    assert answer(service, "gemma:keras") == mine
    # In the other layout each of the four heads has a rank of its own.
    peft = weights(service, "tone", number, "peft").content
    version = upload(service, "peft", peft, "peft").json()
    assert (version["layout"], version["rank"]) == ("peft", 4 * 4)
    assert weights(service, "peft", 1, "peft").content == peft
    for ours, theirs in zip(mine, answer(service, "gemma:peft"), strict=True):
        assert ours["id"] == theirs["id"]
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=5e-5)
    # What has 8 a head has 32 for all four together, and the bank takes 16.
    wide = ended(service, posted(service, adapter="wide", rank=8, steps=1))
    content = weights(service, "wide", wide["version"], "peft").content
    refused = upload(service, "wide", content, "peft")
    assert refused.status_code == 422
    assert [number in refused.json()["detail"] for number in ("32", "16")] == [True, True]


def renamed(content, **metadata):
    """PEFT's file with one tensor under another name, or with other fields."""
    tensors = load(content)
    fields = {**header(content), **metadata}
    if not metadata:
        tensors["base_model.model.lm_head.lora_A.weight"] = tensors.pop(next(iter(tensors)))
    return save(tensors, metadata=fields)


def header(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def cut(content):
    """The last column of one tensor is left out."""
    tensors = load(content)
    name = next(iter(tensors))
    tensors[name] = tensors[name][:, :-1].copy()
    return save(tensors, metadata=header(content))


def archive(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("adapter_model.safetensors", content)
    return file.getvalue()


def test_what_is_no_adapter_of_this_model_is_422_and_leaves_nothing(service, alone):
    number = alone["job"]["version"]
    peft = weights(service, "tone", number, "peft").content
    keras = weights(service, "tone", number).content
    bad = {
        "names": renamed(peft),
        "shapes": cut(peft),
        "rank": renamed(peft, r="3"),
        "no number": renamed(peft, r='"x"'),
        "cut": peft[:-5],
        "pickle": pickle.dumps({"r": 4}),
        "zip": archive(peft),
        "path": b"/etc/passwd",
        "../../passwd": json.dumps({"path": "../../passwd"}).encode(),
        "nothing": b"",
    }
    for kind, content in bad.items():
        for layout in ("peft", "keras"):
            refused = upload(service, "bad", content, layout)
            assert (refused.status_code, refused.json()["code"]) == (422, "invalid_field"), kind
            assert "passwd" not in refused.text
    assert upload(service, "bad", keras, "peft").status_code == 422
    assert upload(service, "bad", peft, "keras").status_code == 422
    assert service.get("/adapters/bad").status_code == 404
    for path in ("/adapters/none", "/adapters/tone/versions/999", "/finetune/none"):
        assert service.get(path).status_code == 404
    assert weights(service, "tone", 999).status_code == 404
    assert service.generate(PROMPT, model="gemma:none").status_code == 404


def test_f_r1_a_stream_keeps_its_version_when_another_is_promoted_and_its_own_deleted(
    service, alone
):
    number = alone["job"]["version"]
    assert upload(service, "moved", weights(service, "tone", number).content, "keras").is_success
    assert upload(service, "moved", weights(service, "tone", 1).content, "keras").is_success
    fields = {"max_tokens": 1000, "ignore_eos": True}
    [mine, other] = [
        service.generate(PROMPT, model=f"gemma:moved@{each}", **fields).json()["outputs"][0]
        for each in (1, 2)
    ]
    assert mine["token_ids"] != other["token_ids"]
    live = {"live": 1, "if_live": 2}
    assert service.client.patch("/adapters/moved", json=live).json()["live"] == 1
    with service.stream(PROMPT, model="gemma:moved", **fields) as stream:
        assert next(stream)["data"]["model"] == "gemma:moved@1"
        assert service.client.patch("/adapters/moved", json={"live": 2}).json()["live"] == 2
        assert service.client.delete("/adapters/moved/versions/1").status_code == 204
        assert service.generate(PROMPT, model="gemma:moved@1").status_code == 404
        assert answer(service, "gemma:moved") == answer(service, "gemma:moved@2")
        tokens = [
            token_id
            for each in stream
            if each["event"] == "token"
            for token_id in each["data"]["token_ids"]
        ]
    assert tokens == mine["token_ids"]


def test_neither_a_full_disk_nor_kills_change_a_byte_of_what_a_job_ends_with(
    tmp_path, cache_dir, alone
):
    options = ["--checkpoint-seconds=0"]
    with tiny_service(tmp_path, cache_dir, *options) as service:
        worker = service.worker().pid
        unlimited = resource.RLIM_INFINITY
        # No file may grow beyond a byte: what a full disk is to a write.
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (1, unlimited))
        job_id = posted(service)
        assert eventually(lambda: job(service, job_id)["status"] == "paused", 30)
        assert service.metric("gemma_storage_paused_jobs") == 1
        assert answer(service) == alone["before"]
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (unlimited, unlimited))
        assert digest(service, ended(service, job_id)) == alone["digest"]
        # And killed again and again, the next one ends with the same bytes.
        job_id = posted(service, adapter="killed", publish={"every": 10})
        at = iter(sorted(DRAW.sample(range(5, NUM_STEPS - 20), 2 * NUM_KILLS)))
        for number in range(1, NUM_KILLS + 1):
            reach(service, job_id, next(at))
            service.worker().kill()
            assert eventually(partial(has_restarted, service, number), 10)
            assert eventually(service.is_ready, 300)
        reach(service, job_id, next(at))
        os.kill(service.process.pid, signal.SIGKILL)
    for step in [*at, NUM_STEPS]:
        with tiny_service(tmp_path, cache_dir, *options) as service:
            if step < NUM_STEPS:
                reach(service, job_id, step)
                os.kill(service.process.pid, signal.SIGKILL)
                continue
            assert digest(service, ended(service, job_id)) == alone["digest"]
            steps = [
                each["data"]["step"] for each in told(service, job_id) if each["event"] == "step"
            ]
            assert steps == list(range(1, NUM_STEPS + 1))


def has_restarted(service, num_deaths):
    return service.metric("gemma_worker_restarts_total") == num_deaths


def reach(service, job_id, step):
    assert eventually(lambda: job(service, job_id)["step"] >= step, 60), service.log
    assert job(service, job_id)["status"] == "running"
