"""Fine-tune jobs over real processes, on the arithmetic engine: API, worker, database, files."""

import hashlib
import os
import random
import signal
import time
from functools import partial

import pytest

from tests.service_process import events, eventually, running_service
from tests.test_service_adapters import served

ROWS = [{"token_ids": [1, 2, 3 + index]} for index in range(6)]
JOB = {
    "adapter": "tone",
    "data": ROWS,
    "validation": [{"token_ids": [4, 5]}],
    "steps": 30,
    "batch_size": 2,
    "publish": {"every": 5},
    "seed": 7,
}
WEIGHTS = "/adapters/tone/versions/{}/weights?format=keras"


def post(service, **fields):
    response = service.client.post("/finetune", json={**JOB, **fields})
    assert response.status_code == 202, response.text
    return response.json()["id"]


def job(service, job_id):
    return service.get(f"/finetune/{job_id}").json()


def has_succeeded(service, job_id):
    return eventually(lambda: job(service, job_id)["status"] == "succeeded", 30)


def told(service, job_id):
    """Its events to the end."""
    headers = {"Accept": "text/event-stream"}
    with service.client.stream("GET", f"/finetune/{job_id}/events", headers=headers) as response:
        return [each for each in events(response.iter_lines()) if each["event"] != ":"]


def test_a_job_is_followed_to_its_end_and_its_versions_answer(tmp_path):
    with running_service(tmp_path) as service:
        job_id = post(service)
        found = told(service, job_id)
        assert found[-1]["event"] == "done", service.log
        steps = [each["data"]["step"] for each in found if each["event"] == "step"]
        versions = [each["data"]["version"] for each in found if each["event"] == "version"]
        assert (steps, versions) == (list(range(1, 31)), list(range(1, 7)))
        adapter = service.get("/adapters/tone").json()
        assert adapter["live"] == 6
        answers = {
            model: service.generate([1, 2], max_tokens=1, model=model).json()
            for model in ("gemma", "gemma:tone", "gemma:tone@6")
        }
        assert answers["gemma:tone"]["model"] == "gemma:tone@6"
        tokens = {model: each["outputs"][0]["token_ids"] for model, each in answers.items()}
        assert tokens["gemma"] == [3] != tokens["gemma:tone"] == tokens["gemma:tone@6"]


def test_rows_that_are_too_long_to_be_trained_are_refused_by_their_place(tmp_path):
    with running_service(tmp_path, "--context-tokens", "2048") as service:
        assert service.get("/info").json()["limits"]["job_row_tokens"] == 512
        long = {"token_ids": [1] * 513}
        body = {**JOB, "data": [*ROWS, long], "validation": [{"text": "1 " * 600}]}
        response = service.client.post("/finetune", json=body)
        assert (response.status_code, response.json()["code"]) == (422, "invalid_field")
        errors = response.json()["errors"]
        assert [each["pointer"] for each in errors] == ["/data/6", "/validation/0"]
        assert "513 tokens; it may have 512" in errors[0]["detail"]
        assert "602 tokens" in errors[1]["detail"]
        fitting = {**JOB, "data": [{"token_ids": [1] * 512}], "steps": 1}
        assert service.client.post("/finetune", json=fitting).status_code == 202


def test_a_job_that_is_cancelled_stays_so(tmp_path):
    with running_service(tmp_path, ARITHMETIC_SLICE_SECONDS="0.02") as service:
        job_id = post(service, steps=10_000)
        assert eventually(lambda: job(service, job_id)["step"] > 0, 20)
        assert service.client.post(f"/finetune/{job_id}/cancel").json()["status"] == "cancelled"
        assert told(service, job_id)[-1]["data"]["status"] == "cancelled"
        assert eventually(lambda: not list((tmp_path / "checkpoints").iterdir()))


def final_weights(service, job_id):
    assert has_succeeded(service, job_id), service.log
    version = job(service, job_id)["version"]
    return hashlib.sha256(service.get(WEIGHTS.format(version)).content).hexdigest()


def is_back(service, num_deaths):
    return service.metric("gemma_worker_restarts_total") == num_deaths and service.is_ready()


@pytest.mark.parametrize("killed", ["worker", "service"])
def test_the_last_bytes_are_the_same_after_three_kills(tmp_path, killed):
    slow = {"ARITHMETIC_SLICE_SECONDS": "0.02"}
    with running_service(tmp_path / "whole") as service:
        whole = final_weights(service, post(service))
    chance = random.Random(5)
    options = ["--checkpoint-seconds=0.1"]
    directory = tmp_path / "killed"
    if killed == "worker":
        with running_service(directory, *options, **slow) as service:
            job_id = post(service)
            for num_deaths in range(3):
                time.sleep(chance.uniform(0.1, 0.6))
                service.worker().kill()
                assert eventually(partial(is_back, service, num_deaths + 1), 20)
            assert final_weights(service, job_id) == whole
        return
    with running_service(directory, *options, **slow) as service:
        job_id = post(service)
        time.sleep(chance.uniform(0.1, 0.6))
        os.kill(service.process.pid, signal.SIGKILL)
    for _ in range(2):
        with running_service(directory, *options, **slow) as service:
            assert job(service, job_id)["status"] in ("running", "queued", "succeeded")
            time.sleep(chance.uniform(0.1, 0.6))
            os.kill(service.process.pid, signal.SIGKILL)
    with running_service(directory, *options, **slow) as service:
        assert final_weights(service, job_id) == whole
        steps = [each["data"]["step"] for each in told(service, job_id) if each["event"] == "step"]
        assert steps == list(range(1, 31))


def test_what_the_worker_did_while_nobody_listened_is_told_again_after_a_kill(tmp_path):
    slow = {"ARITHMETIC_SLICE_SECONDS": "0.02"}
    options = ["--checkpoint-seconds=0"]
    with running_service(tmp_path, *options, **slow) as service:
        job_id = post(service)
        assert eventually(lambda: job(service, job_id)["step"] >= 3)
        os.kill(service.process.pid, signal.SIGSTOP)
        folder = tmp_path / "checkpoints" / job_id
        assert eventually(lambda: max(folder.glob("*.checkpoint")).stem >= "00000012")
        os.kill(service.process.pid, signal.SIGKILL)
    with running_service(tmp_path, *options) as service:
        found = told(service, job_id)
        steps = [each["data"]["step"] for each in found if each["event"] == "step"]
        assert steps == list(range(1, 31))
        versions = [each["data"]["step"] for each in found if each["event"] == "version"]
        assert versions == [5, 10, 15, 20, 25, 30]


def test_f_r13_a_planned_restart_loses_no_step_and_no_version(tmp_path):
    slow = {"ARITHMETIC_SLICE_SECONDS": "0.02"}
    options = ["--checkpoint-seconds=3600"]
    with running_service(tmp_path, *options, **slow) as service:
        job_id = post(service)
        with service.stream([1], max_tokens=40) as stream:
            assert next(stream)["event"] == "start"
            assert eventually(lambda: job(service, job_id)["step"] >= 7)
            service.process.send_signal(signal.SIGTERM)
            *_, done = stream
        assert done["event"] == "done"
        assert service.process.wait(10) == 0
        assert "Traceback" not in service.log
    [step] = [int(each.stem) for each in (tmp_path / "checkpoints" / job_id).glob("*.checkpoint")]
    with running_service(tmp_path, *options) as service:
        live = service.get("/adapters/tone").json()["live"]
        found = told(service, job_id)
        steps = [each["data"]["step"] for each in found if each["event"] == "step"]
        assert steps == list(range(1, 31))
        assert 7 <= step < 30
        assert live >= step // 5
        # Two rows of three tokens a step: no step was made once more.
        learned = 'gemma_computed_tokens_total{use="request",work="train"}'
        assert eventually(lambda: service.metric(learned) == (30 - step) * 2 * 3)


def test_a_database_that_is_damaged_ends_the_start_with_one_line(tmp_path):
    tmp_path.joinpath("service.sqlite").write_bytes(b"no database" * 1000)
    status, lines = served(tmp_path)
    assert (status, len(lines)) == (65, 1)
    assert "service.sqlite cannot be read" in lines[0]
