"""/finetune and /adapters over a scripted trainer: what lasts, what is told, who is refused."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from tests.training_service import PRESET, TrainingService, until

ROWS = [
    {"text": "a"},
    {"prompt": "b", "completion": "c"},
    {"token_ids": [1, 2], "loss_mask": [0, 1]},
]
JOB = {"adapter": "tone", "data": ROWS, "steps": 3}


def run(main):
    asyncio.run(main)


@asynccontextmanager
async def service(directory, **settings):
    directory.mkdir(exist_ok=True)
    made = TrainingService(directory, **settings)
    async with made.running() as client:
        yield made, client


async def started(made, client, **fields):
    """A job that runs."""
    response = await client.post("/finetune", json={**JOB, **fields})
    assert response.status_code == 202, response.text
    job_id = response.json()["id"]
    await until(lambda: is_started(made, job_id))
    return job_id


async def is_started(made, job_id):
    return job_id in made.worker.started


async def job(client, job_id):
    return (await client.get(f"/finetune/{job_id}")).json()


async def finished(client, job_id, status="succeeded"):
    async def is_over():
        return (await job(client, job_id))["status"] == status

    await until(is_over)
    return await job(client, job_id)


def test_a_job_goes_from_its_request_to_a_live_version(tmp_path):
    async def main():
        async with service(tmp_path) as (made, client):
            response = await client.post("/finetune", json=JOB)
            told = response.json()
            assert (response.status_code, told["status"]) == (202, "queued")
            assert response.headers["location"] == f"/finetune/{told['id']}"
            assert told["hyperparameters"]["rank"] == told["hyperparameters"]["alpha"] == 8
            await until(lambda: is_started(made, told["id"]))
            made.worker.step(told["id"], 3)
            ended = await finished(client, told["id"])
            assert (ended["step"], ended["version"], ended["live"]) == (3, 1, True)
            assert ended["metrics"] == {"loss": 7.0, "valid_loss": None, "tokens": 21}
            adapter = (await client.get("/adapters/tone")).json()
            [version] = adapter["versions"]
            assert (adapter["live"], version["step"], version["durable"]) == (1, 3, True)
            assert made.names.find("tone").digest == version["digest"]
            folder = tmp_path / "adapters" / version["digest"].removeprefix("sha256:")
            assert (folder / "adapter").is_file()

    run(main())


def test_events_are_a_list_or_a_stream_that_goes_on_behind_the_last_one_read(tmp_path):
    async def main():
        async with service(tmp_path) as (made, client):
            job_id = await started(made, client)
            path = f"/finetune/{job_id}/events"
            sse = {"Accept": "text/event-stream"}

            async def follow(**headers):
                kinds = []
                async with client.stream("GET", path, headers={**sse, **headers}) as response:
                    async for line in response.aiter_lines():
                        if line.startswith("event: "):
                            kinds.append(line.removeprefix("event: "))
                return kinds

            following = asyncio.create_task(follow())
            await asyncio.sleep(0.05)
            made.worker.step(job_id, 3)
            kinds = await following
            assert kinds == ["status", "status", "step", "step", "step", "version", "done"]
            assert await follow(**{"Last-Event-ID": "4"}) == kinds[4:]
            listed = (await client.get(path, params={"after": 2, "limit": 2})).json()
            assert [each["id"] for each in listed["events"]] == [3, 4]
            assert listed["events"][0]["data"]["loss"] == 9.0
            assert listed["has_more"] is True

    run(main())


def test_a_dry_run_tells_tokens_and_keeps_nothing(tmp_path):
    async def main():
        async with service(tmp_path) as (made, client):
            response = await client.post("/finetune", json={**JOB, "dry_run": True})
            assert response.status_code == 200
            assert response.json() == {
                "tokens": 100,
                "padded_tokens": 128,
                "steps": 3,
                "estimated_s": 2.5,
                "first_rows": [{"token_ids": [0, 1], "tokens": ["a", "b"], "loss_mask": [0, 1]}],
            }
            assert (await client.get("/finetune")).json() == {"jobs": [], "has_more": False}
            await asyncio.sleep(0)
            assert made.worker.jobs == {}

    run(main())


def test_the_same_key_gives_the_same_job_and_another_body_is_409_also_after_a_restart(tmp_path):
    async def main():
        headers = {"Idempotency-Key": "k"}
        async with service(tmp_path) as (_, client):
            first, second = await asyncio.gather(
                client.post("/finetune", json=JOB, headers=headers),
                client.post("/finetune", json=JOB, headers=headers),
            )
            assert first.json()["id"] == second.json()["id"]
        async with service(tmp_path) as (_, client):
            again = await client.post("/finetune", json=JOB, headers=headers)
            assert again.json()["id"] == first.json()["id"]
            other = await client.post("/finetune", json={**JOB, "seed": 1}, headers=headers)
            assert (other.status_code, other.json()["code"]) == (409, "idempotency_mismatch")

    run(main())


def test_a_worker_that_dies_costs_a_job_nothing_and_no_step_is_stored_twice(tmp_path):
    async def main():
        async with service(tmp_path) as (made, client):
            job_id = await started(made, client, publish="every_step", validation=0.5)
            made.worker.step(job_id, 2)

            async def has_two():
                return (await job(client, job_id))["step"] == 2

            await until(has_two)
            before = (await client.get(f"/finetune/{job_id}/events")).json()["events"]
            made.restart_worker()
            await until(lambda: is_started(made, job_id))
            assert (await job(client, job_id))["status"] == "running"
            made.worker.step(job_id, 3)
            ended = await finished(client, job_id)
            assert ended["metrics"]["tokens"] == 21
            events = (await client.get(f"/finetune/{job_id}/events")).json()["events"]
            assert events[: len(before)] == before
            steps = [each["data"]["step"] for each in events if each["event"] == "step"]
            versions = [each["data"]["version"] for each in events if each["event"] == "version"]
            assert (steps, versions) == ([1, 2, 3], [1, 2, 3])

    run(main())


def test_a_service_that_is_started_again_goes_on_with_its_jobs(tmp_path):
    async def main():
        async with service(tmp_path) as (made, client):
            job_id = await started(made, client)
            made.worker.step(job_id)
        async with service(tmp_path) as (made, client):
            await until(lambda: is_started(made, job_id))
            assert made.worker.started[job_id].folder == str(tmp_path / "checkpoints" / job_id)
            made.worker.step(job_id, 3)
            assert (await finished(client, job_id))["live"] is True

    run(main())


def test_so_many_jobs_run_so_many_wait_and_one_more_is_429(tmp_path):
    async def main():
        async with service(tmp_path, running_jobs=1, queued_jobs=1) as (made, client):
            first = await started(made, client)
            second = (await client.post("/finetune", json=JOB)).json()["id"]
            refused = await client.post("/finetune", json=JOB)
            assert (refused.status_code, refused.json()["code"]) == (429, "job_limit")
            assert int(refused.headers["retry-after"]) > 0
            assert (await job(client, second))["status"] == "queued"
            assert (await client.post(f"/finetune/{first}/cancel")).json()["status"] == "cancelled"
            await until(lambda: is_started(made, second))
            assert (await job(client, second))["status"] == "running"
            listed = (await client.get("/finetune", params={"limit": 1})).json()
            assert ([each["id"] for each in listed["jobs"]], listed["has_more"]) == ([second], True)

    run(main())


@pytest.mark.parametrize(("bound", "live"), [("init", 1), (17.5, 1), (17.0, None), (16, None)])
def test_a_version_becomes_live_if_its_validation_loss_is_low_enough(tmp_path, bound, live):
    async def main():
        async with service(tmp_path) as (made, client):
            promote = {"metric": "valid_loss", "less_than": bound}
            job_id = await started(made, client, validation=[{"text": "v"}], promote=promote)
            made.worker.step(job_id, 3)  # 20 before, 17 after
            assert (await finished(client, job_id))["live"] is (live is not None)
            assert (await client.get("/adapters/tone")).json()["live"] == live
            assert made.names.find("tone@1") is not None

    run(main())


def test_only_the_last_few_versions_between_stay(tmp_path):
    async def main():
        async with service(tmp_path) as (made, client):
            promote = {"metric": "valid_loss", "less_than": "init"}
            fields = {"steps": 8, "publish": "every_step", "validation": 0.5, "promote": promote}
            job_id = await started(made, client, **fields)
            made.worker.step(job_id, 8)
            await finished(client, job_id)
            versions = (await client.get("/adapters/tone")).json()["versions"]
            there = [each["version"] for each in versions if each["resident"]]
            assert there == [8, 7, 6, 5, 4]
            assert [each["parent"] for each in versions] == [7, 6, 5, 4, 3, 2, 1, None]

    run(main())


def test_live_moves_by_compare_and_swap_and_what_is_deleted_is_404(tmp_path):
    async def main():
        async with service(tmp_path) as (made, client):
            for seed in (1, 2):
                job_id = await started(made, client, seed=seed)
                made.worker.step(job_id, 3)
                await finished(client, job_id)
            conflict = await client.patch("/adapters/tone", json={"live": 1, "if_live": 1})
            assert (conflict.status_code, conflict.json()["code"]) == (409, "version_conflict")
            moved = await client.patch("/adapters/tone", json={"live": 1, "if_live": 2})
            assert moved.json()["live"] == 1
            assert made.names.find("tone").number == 1
            digest = made.names.find("tone@2").digest
            assert (await client.delete("/adapters/tone/versions/2")).status_code == 204
            assert made.names.find("tone@2") is None
            folder = tmp_path / "adapters" / digest.removeprefix("sha256:")

            async def is_gone():
                return not folder.exists()

            await until(is_gone)
            missing = await client.get("/adapters/tone/versions/2")
            assert (missing.status_code, missing.json()["code"]) == (404, "adapter_not_found")
            assert (await client.delete("/adapters/tone")).status_code == 204
            assert (await client.get("/adapters/tone")).status_code == 404
            job_id = await started(made, client)
            made.worker.step(job_id, 3)
            assert (await finished(client, job_id))["version"] == 3

    run(main())


def test_a_file_goes_in_and_the_same_bytes_come_out(tmp_path):
    async def main():
        headers = {"Content-Type": "application/octet-stream", "Idempotency-Key": "u"}
        async with service(tmp_path) as (_, client):
            path = "/adapters/tone?format=peft"
            for _ in range(2):
                sent = await client.put(path, content=b"weights", headers=headers)
                assert (sent.status_code, sent.json()["version"]) == (201, 1)
            weights = await client.get("/adapters/tone/versions/1/weights?format=peft")
            assert weights.content == b"weights"
            assert weights.headers["content-disposition"].endswith('"tone-1.safetensors"')
            del headers["Idempotency-Key"]
            bad = await client.put(path, content=b"bad", headers=headers)
            assert (bad.status_code, bad.json()["code"]) == (422, "invalid_field")
            as_json = await client.put(path, json={})
            assert as_json.status_code == 415
            assert list((tmp_path / "passing").iterdir()) == []

    run(main())


def test_large_bodies_beyond_what_is_held_at_once_are_429_until_there_is_room(tmp_path):
    size = 2**20
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}

    async def main():
        limits = {"body_bytes": size // 2, "held_body_bytes": 3 * size // 2}
        async with service(tmp_path, **limits) as (_, client):
            is_sent, go_on = asyncio.Event(), asyncio.Event()

            async def slowly():
                yield b"w" * (size - 1)
                is_sent.set()
                await go_on.wait()
                yield b"w"

            async def put(content):
                path = "/adapters/tone?format=peft"
                return await client.put(path, content=content, headers=headers)

            sending = asyncio.create_task(put(slowly()))
            await is_sent.wait()
            refused = await put(b"w" * size)
            small = {"Content-Type": "application/octet-stream"}
            path = "/adapters/small?format=peft"
            taken = await client.put(path, content=b"w", headers=small)
            go_on.set()
            statuses = (await sending).status_code, taken.status_code
            assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
            assert refused.headers["retry-after"] == "1"
            assert statuses == (201, 201)
            assert (await put(b"w" * size)).status_code == 201

    run(main())


def test_a_job_goes_on_from_a_version_with_its_form_and_keeps_it_from_being_deleted(tmp_path):
    async def main():
        headers = {"Content-Type": "application/octet-stream"}
        async with service(tmp_path) as (made, client):
            await client.put("/adapters/old?format=peft", content=b"w", headers=headers)
            job_id = await started(made, client, init="old@1")
            assert made.worker.jobs[job_id].hyperparameters.form.rank == 4
            assert made.worker.jobs[job_id].init == made.names.find("old@1").digest
            busy = await client.delete("/adapters/old")
            assert (busy.status_code, busy.json()["code"]) == (409, "adapter_busy")
            unknown = await client.post("/finetune", json={**JOB, "init": "old@2"})
            assert (unknown.status_code, unknown.json()["code"]) == (404, "adapter_not_found")

    run(main())


def test_no_room_for_the_record_is_507_and_no_room_for_the_end_pauses_the_job(tmp_path):
    async def main():
        async with service(tmp_path) as (made, client):
            job_id = await started(made, client)
            made.worker.save_failure = "storage_full"
            made.worker.step(job_id, 3)
            paused = await finished(client, job_id, "paused")
            assert paused["finished"] is None
            await made.store.read(lambda db: db.execute("PRAGMA max_page_count = 1"))
            full = await client.post("/finetune", json={**JOB, "data": [{"text": "x" * 60_000}]})
            assert (full.status_code, full.json()["code"]) == (507, "storage_full")

    run(main())


def test_a_version_of_another_model_is_409_once_that_is_served(tmp_path):
    async def main():
        headers = {"Content-Type": "application/octet-stream"}
        async with service(tmp_path) as (made, client):
            await client.put("/adapters/old?format=peft", content=b"w", headers=headers)
            made.restart_worker("sha256:" + "2" * 64)
            body = {"prompt": "1", "model": "gemma:old"}
            answer = await client.post("/generate", json=body)
            assert (answer.status_code, answer.json()["code"]) == (409, "adapter_mismatch")
            assert PRESET in (await client.get("/adapters/old")).text

    run(main())


def test_jobs_wait_for_the_model_that_they_were_made_for_and_take_nobody_s_place(tmp_path):
    async def main():
        async with service(tmp_path, running_jobs=1) as (made, client):
            begun = await started(made, client)
            made.worker.step(begun)
            waiting = (await client.post("/finetune", json={**JOB, "seed": 1})).json()["id"]
            made.restart_worker("sha256:" + "2" * 64)
            other = await started(made, client, seed=2)
            assert set(made.worker.started) == {other}
            await finished(client, begun, "paused")
            assert (await job(client, waiting))["status"] == "queued"
            metrics = (await client.get("/metrics")).text
            assert 'gemma_train_jobs{state="paused"} 1.0' in metrics
            assert "gemma_storage_paused_jobs 0.0" in metrics
            made.worker.step(other, 3)
            await finished(client, other)
        async with service(tmp_path, running_jobs=1) as (made, client):
            for job_id in (begun, waiting):
                await until(lambda job_id=job_id: is_started(made, job_id))
                assert set(made.worker.started) == {job_id}
                made.worker.step(job_id, 3)
                assert (await finished(client, job_id))["error"] is None

    run(main())


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"adapter": "Tone"}, "/adapter"),
        ({"data": []}, "/data"),
        ({"data": [{"text": "a"}, {"text": 3}]}, "/data/1/text"),
        ({"data": [{"prompt": "a"}]}, "/data/0"),
        ({"data": [{"text": "a"}, {"text": ""}]}, "/data/1"),
        ({"data": [{"token_ids": [1], "loss_mask": [1, 0]}]}, "/data/0/loss_mask"),
        ({"data": [{"token_ids": [1, True]}]}, "/data/0/token_ids/1"),
        ({"data": [{"messages": [{"role": "tool", "content": ""}]}]}, "/data/0/messages/0/role"),
        ({"validation": 0.6}, "/validation"),
        ({"epochs": 1}, "/steps"),
        ({"rank": 17}, "/rank"),
        ({"alpha": 4}, "/alpha"),
        ({"targets": ["query", "query"]}, "/targets"),
        ({"learning_rate": 0}, "/learning_rate"),
        ({"max_length": 65}, "/max_length"),
        ({"max_length": 513}, "/max_length"),
        ({"publish": {"every": 0}}, "/publish/every"),
        ({"publish": {"every": 2, "steps": 1}}, "/publish/steps"),
        ({"publish": {}}, "/publish/every"),
        ({"publish": "often"}, "/publish"),
        ({"publish": None}, "/publish"),
        ({"promote": {"metric": "valid_loss", "less_than": "init"}}, "/promote"),
        ({"promote": {"metric": "valid_loss", "less_than": "first"}}, "/promote/less_than"),
        ({"promote": {"metric": "valid_loss", "less_than": 10**400}}, "/promote/less_than"),
        ({"promote": {"metric": "loss", "less_than": 1}}, "/promote/metric"),
        ({"init": "tone"}, "/init"),
        ({"steps": 10_001}, "/steps"),
        ({"metadata": {"a": [1]}}, "/metadata/a"),
        ({"unknown": 1}, "/unknown"),
    ],
)
def test_what_is_out_of_range_is_422_with_a_pointer(tmp_path, fields, pointer):
    async def main():
        async with service(tmp_path) as (_, client):
            response = await client.post("/finetune", json={**JOB, **fields})
            assert (response.status_code, response.json()["code"]) == (422, "invalid_field")
            assert [each["pointer"] for each in response.json()["errors"]] == [pointer]
            assert json.loads((await client.get("/finetune")).text)["jobs"] == []

    run(main())


def test_a_client_may_wait_for_the_end(tmp_path):
    async def main():
        async with service(tmp_path) as (made, client):
            headers = {"Prefer": "wait=0"}
            early = await client.post("/finetune", json=JOB, headers=headers)
            assert (early.status_code, early.headers["preference-applied"]) == (202, "wait=0")
            headers = {"Prefer": "respond-async, wait=20"}
            posting = asyncio.create_task(
                client.post("/finetune", json={**JOB, "seed": 9}, headers=headers)
            )

            async def are_started():
                return len(made.worker.started) == 2

            await until(are_started)
            for job_id in list(made.worker.started):
                made.worker.step(job_id, 3)
            late = await posting
            assert (late.status_code, late.json()["status"]) == (200, "succeeded")

    run(main())
