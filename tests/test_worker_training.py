"""Jobs and versions in a real worker process, on integers: killed, full disks, who else is served.

What a job ends with is worked out by `tests.fakes.arithmetic_trainer.number_after`, without a
trainer.
"""

import json
import math
import random
import resource
import shutil
import time
from dataclasses import replace

import pytest

from model.slots import AdapterForm
from model.training import TrainingPlan, TrainingRow
from service.protocol.messages import (
    Accepted,
    AdapterSource,
    Failed,
    Finished,
    Generate,
    Piece,
    SamplingParameters,
    StopRules,
)
from service.protocol.training import (
    AdapterExported,
    AdapterFailed,
    AdapterImported,
    AdapterSaved,
    AddAdapter,
    CancelJob,
    ExportAdapter,
    ForgetAdapter,
    Form,
    HaltJobs,
    IdsRow,
    ImportAdapter,
    JobEnded,
    JobEval,
    JobPaused,
    JobPrepared,
    JobRefused,
    JobsHalted,
    JobStep,
    JobVersion,
    SaveAdapter,
    StartJob,
    TextRow,
)
from service.worker.adapter_store import digest_of
from service.worker.checkpoints import newest_checkpoint
from service.worker.training_plan import MAX_STEPS
from tests.fakes.arithmetic_engine import EXIT
from tests.fakes.arithmetic_trainer import (
    LOSS_NOT_FINITE,
    RAISE,
    RAISE_AT_BEGIN,
    adapter_bytes,
    number_after,
)
from tests.worker_process import FORM, prepare, running_worker

ROWS = tuple(IdsRow((0, number, 2 * number)) for number in range(1, 8))


def generate(request_id, *prompts, adapter=None, max_tokens=1):
    return Generate(
        request_id=request_id,
        tenant="default",
        deadline=math.inf,
        adapter=adapter,
        prompts=prompts,
        num_choices=1,
        sampling=SamplingParameters(0.0, 0, 1.0, 0),
        stop=StopRules(max_tokens, 0, (), (), ignore_eos=True),
        num_logprobs=None,
    )


def first_token(worker, request_id, adapter):
    """What follows [1, 2]."""
    worker.send(generate(request_id, (1, 2), adapter=adapter))
    [token] = worker.wait(Piece, lambda piece: piece.request_id == request_id).token_ids
    worker.wait(Finished)
    return token


def plan_of(command, num_steps):
    rows = [
        TrainingRow(row.token_ids, (False,) + (True,) * (len(row.token_ids) - 1))
        for row in command.rows
    ]
    told = command.hyperparameters
    return TrainingPlan(
        command.job_id, tuple(rows), (), num_steps, "keras", 8, 8.0, ("query", "value"),
        told.batch_size, told.learning_rate, "constant", 0, 0.0, None, told.seed,
    )  # fmt: skip


def last_digest(command, num_steps, first=0):
    """Of the version that a job ends with that began with a number, worked out by hand."""
    form = AdapterForm(FORM.layout, FORM.rank, FORM.alpha, FORM.targets)
    plan = replace(plan_of(command, num_steps), initial=adapter_bytes(form, first))
    return digest_of(adapter_bytes(form, number_after(plan)))


def trained(worker, command, folder, publish_every=1000):
    """Lets a job run to its end; its last version."""
    worker.send(command)
    worker.wait(JobPrepared)
    worker.send(StartJob(command.job_id, str(folder), publish_every, MAX_STEPS))
    worker.wait(JobEnded)
    return worker.events_of(JobVersion)[-1]


def test_a_job_trains_and_every_version_answers_as_soon_as_it_is_told(tmp_path):
    command = prepare("a", *ROWS, steps=9, validation=(IdsRow((0, 5)),))
    with running_worker() as worker:
        worker.send(command)
        prepared = worker.wait(JobPrepared)
        # Seven rows of three tokens in steps of two: 7 rows an epoch of 4 steps, and one more step.
        assert (prepared.num_steps, prepared.num_tokens) == (9, 3 * (7 + 7 + 2))
        assert prepared.num_padded_tokens == 8 * (7 + 7 + 2)
        assert [row.loss_mask for row in prepared.first_rows] == [(0, 1, 1)] * 4
        worker.send(StartJob("a", str(tmp_path / "a"), 4, MAX_STEPS))
        for number, step in enumerate((4, 8, 9)):
            version = worker.had(JobVersion, lambda event, step=step: event.step == step)
            assert version.is_last == (step == 9)
            number_then = number_after(plan_of(command, 9), step)
            assert first_token(worker, f"r{number}", version.digest) == (3 + number_then) % 1000
        assert worker.ended("a") == JobEnded("a", "succeeded", 9)
        assert [step.step for step in worker.events_of(JobStep)] == list(range(1, 10))
        assert [each.step for each in worker.events_of(JobEval)] == [0, 4, 8, 9]
        assert first_token(worker, "base", None) == 3


def test_a_job_killed_at_three_moments_ends_with_the_bytes_of_one_that_was_not(tmp_path):
    command = prepare("a", *ROWS, steps=60, seed=3)
    expected = last_digest(command, 60)
    environment = {"ARITHMETIC_SLICE_SECONDS": "0.004"}
    with running_worker(**environment) as worker:
        assert trained(worker, command, tmp_path / "whole").digest == expected
    draw = random.Random(7)
    resumed_at = []
    for _ in range(3):
        with running_worker(**environment) as worker:
            worker.send(command)
            worker.wait(JobPrepared)
            worker.send(StartJob("a", str(tmp_path / "killed"), 1000, MAX_STEPS))
            resumed_at.append(worker.wait(JobStep).step)
            time.sleep(draw.uniform(0.02, 0.12))
            worker.kill()
    with running_worker(**environment) as worker:
        assert trained(worker, command, tmp_path / "killed").digest == expected
        resumed_at.append(worker.events_of(JobStep)[0].step)
    assert resumed_at == sorted(set(resumed_at)), "each goes on from a later checkpoint"


def test_a_step_says_how_many_rows_it_had(tmp_path):
    # Seven rows, three a step: two whole steps and what is left.
    command = prepare("a", *ROWS, steps=7, batch_size=3)
    with running_worker() as worker:
        trained(worker, command, tmp_path / "a")
        assert [each.num_rows for each in worker.events_of(JobStep)] == [3, 3, 1, 3, 3, 1, 3]


def test_what_a_step_led_to_is_told_again_from_the_last_step_that_is_remembered(tmp_path):
    command = prepare("a", *ROWS, steps=9, validation=(IdsRow((0, 5)),))
    # Seven rows, two a step: an epoch ends with steps 4 and 8.
    with running_worker(ARITHMETIC_SLICE_SECONDS="0.02") as worker:
        worker.send(command)
        worker.wait(JobPrepared)
        worker.send(StartJob("a", str(tmp_path / "a"), 2, 0))
        worker.wait(JobEnded)
        told = [each for each in worker.events if isinstance(each, JobStep | JobEval | JobVersion)]
    older, newer = sorted(int(path.stem) for path in (tmp_path / "a").glob("*.checkpoint"))
    for remembered, first in ((newer, newer), (newer - 1, older), (older - 1, 0)):
        folder = tmp_path / str(remembered)
        shutil.copytree(tmp_path / "a", folder)
        with running_worker() as worker:
            worker.send(command)
            worker.wait(JobPrepared)
            worker.send(StartJob("a", str(folder), 2, remembered))
            worker.wait(JobEnded)
            again = worker.events_of(JobStep | JobEval | JobVersion)
        since = [each for each in told if each.step >= first]
        assert same(again) == same(
            each for each in since if each.step > first or not isinstance(each, JobStep)
        )


def same(events):
    """What is the same whenever it is told, in whatever order a step's version and loss are."""
    facts = {JobStep: "loss", JobEval: "valid_loss", JobVersion: "digest"}
    return {(type(each), each.step, getattr(each, facts[type(each)])) for each in events}


def test_four_jobs_together_end_as_each_alone(tmp_path):
    commands = [prepare(f"j{number}", *ROWS[number:], steps=12, seed=number) for number in range(4)]
    with running_worker() as worker:
        worker.send(*commands)
        for _ in commands:
            worker.wait(JobPrepared)
        worker.send(
            *(StartJob(each.job_id, str(tmp_path / each.job_id), 0, MAX_STEPS) for each in commands)
        )
        for _ in commands:
            worker.wait(JobEnded)
        found = {each.job_id: each.digest for each in worker.events_of(JobVersion)}
        assert any(step.rows_shared for step in worker.events_of(JobStep))
    assert found == {each.job_id: last_digest(each, 12) for each in commands}


def test_a_job_goes_on_from_a_version_and_one_of_another_form_is_refused(tmp_path):
    command = prepare("a", *ROWS, steps=3)
    with running_worker() as worker:
        version = trained(worker, command, tmp_path / "a")
        further = prepare("b", *ROWS, steps=2, init=version.digest)
        again = trained(worker, further, tmp_path / "b")
        assert again.digest == last_digest(further, 2, number_after(plan_of(command, 3)))
        other = prepare("c", *ROWS, init=version.digest, form=Form("peft", 8, 8.0, FORM.targets))
        worker.send(other, prepare("d", *ROWS, init="sha256:none"))
        refused = worker.wait(JobRefused)
        assert (refused.code, refused.errors[0].pointer) == ("invalid_field", "/init")
        assert "keras, rank 8" in refused.errors[0].detail
        assert worker.wait(JobRefused).code == "adapter_not_found"


def test_a_version_is_saved_found_again_and_forgotten(tmp_path):
    command = prepare("a", *ROWS, steps=3)
    number = number_after(plan_of(command, 3))
    with running_worker() as worker:
        digest = trained(worker, command, tmp_path / "a").digest
        worker.send(SaveAdapter("s", digest, str(tmp_path / "adapters" / "one")))
        source = worker.wait(AdapterSaved).source
        assert source.digest == digest
        worker.send(SaveAdapter("x", "sha256:none", str(tmp_path / "none")))
        assert worker.wait(AdapterFailed).code == "adapter_not_found"
        worker.send(ForgetAdapter(digest), generate("r", (1, 2), adapter=digest))
        assert worker.wait(Failed).code == "model_not_found"
    with running_worker() as worker:
        worker.send(AddAdapter(source))
        assert first_token(worker, "r", digest) == (3 + number) % 1000
    (tmp_path / "adapters" / "one" / "adapter.safetensors").write_bytes(b"{}")
    with running_worker() as worker:
        worker.send(AddAdapter(source), generate("r", (1, 2), adapter=digest))
        failed = worker.wait(Failed)
        assert (failed.code, "has changed" in failed.detail) == ("model_not_found", True)
        assert first_token(worker, "base", None) == 3


def test_a_request_keeps_a_version_that_is_forgotten_until_it_ends(tmp_path):
    command = prepare("a", *ROWS, steps=2)
    number = number_after(plan_of(command, 2))
    with running_worker(ARITHMETIC_STEP_SECONDS="0.02", load={"num_slots": 1}) as worker:
        digest = trained(worker, command, tmp_path / "a").digest
        # The second one waits for the slot when the version is forgotten.
        worker.send(generate("one", (1, 2), adapter=digest, max_tokens=10))
        worker.send(generate("two", (1, 2), adapter=digest, max_tokens=2))
        worker.wait(Accepted, lambda event: event.request_id == "two")
        worker.send(ForgetAdapter(digest))
        worker.wait(Finished, lambda event: event.request_id == "two")
        pieces = [p for p in worker.events_of(Piece) if p.request_id == "two"]
        assert pieces[0].token_ids[0] == (3 + number) % 1000
        worker.send(generate("late", (1, 2), adapter=digest))
        assert worker.wait(Failed).code == "model_not_found"


def test_files_of_others_come_in_and_go_out(tmp_path):
    (tmp_path / "in").write_text("peft 77")
    (tmp_path / "bad").write_text("nonsense")
    with running_worker() as worker:
        worker.send(ImportAdapter("i", str(tmp_path / "in"), "peft"))
        imported = worker.wait(AdapterImported)
        assert imported.form.layout == "peft"
        assert first_token(worker, "r", imported.digest) == 80
        worker.send(ExportAdapter("o", imported.digest, str(tmp_path / "out"), "peft"))
        assert worker.wait(AdapterExported).num_bytes == (tmp_path / "out").stat().st_size == 8
        for wrong in (
            ImportAdapter("b", str(tmp_path / "bad"), "keras"),
            ExportAdapter("f", imported.digest, str(tmp_path / "out"), "keras"),
        ):
            worker.send(wrong)
            assert worker.wait(AdapterFailed).code == "invalid_field"


def test_a_version_whose_file_has_changed_is_not_taken_for_what_was_named(tmp_path):
    (tmp_path / "tone.lora.h5").write_text("5")
    (tmp_path / "own").write_bytes(
        own := adapter_bytes(AdapterForm("keras", 8, 8.0, ("query",)), 7)
    )
    brought = AdapterSource(digest_of(b"5"), str(tmp_path / "tone.lora.h5"))
    stored = AdapterSource(digest_of(own), str(tmp_path / "own"))
    out = str(tmp_path / "out")
    with running_worker(load={"adapters": (brought,)}) as worker:
        worker.send(AddAdapter(stored))
        for source, number in ((brought, "5"), (stored, "7")):
            worker.send(ExportAdapter("before", source.digest, out, "keras"))
            worker.wait(AdapterExported)
            assert (tmp_path / "out").read_text() == f"keras {number}\n"
        (tmp_path / "tone.lora.h5").write_text("6")
        (tmp_path / "own").write_bytes(own.replace(b"7", b"8"))
        for source in (brought, stored):
            worker.send(ExportAdapter("after", source.digest, out, "keras"))
            failed = worker.wait(AdapterFailed)
            assert (failed.code, "has changed" in failed.detail) == ("adapter_not_found", True)
            worker.send(prepare("a", *ROWS, init=source.digest))
            refused = worker.wait(JobRefused)
            assert (refused.code, refused.errors[0].pointer) == ("adapter_mismatch", "/init")


def test_a_cancelled_job_ends_once_and_one_that_was_only_prepared_is_forgotten(tmp_path):
    with running_worker(ARITHMETIC_SLICE_SECONDS="0.01") as worker:
        worker.send(prepare("a", *ROWS, steps=1000), prepare("b", *ROWS))
        worker.wait(JobPrepared, lambda event: event.job_id == "b")
        worker.send(StartJob("a", str(tmp_path / "a"), 0, MAX_STEPS), CancelJob("b"))
        worker.wait(JobStep)
        worker.send(CancelJob("a"), CancelJob("a"), CancelJob("none"))
        ended = worker.wait(JobEnded)
        assert (ended.end, ended.code) == ("cancelled", "cancelled")
        worker.send(StartJob("b", str(tmp_path / "b"), 0, MAX_STEPS))
        assert worker.wait(JobEnded).end == "failed"
        assert len(worker.events_of(JobEnded)) == 2
        assert worker.events_of(JobVersion) == []


def test_a_loss_that_is_no_number_fails_the_job_and_no_other(tmp_path):
    with running_worker() as worker:
        bad = prepare("a", *ROWS, IdsRow((0, LOSS_NOT_FINITE)), steps=20)
        worker.send(bad, prepare("b", *ROWS, steps=20))
        worker.wait(JobPrepared, lambda event: event.job_id == "b")
        worker.send(*(StartJob(each, str(tmp_path / each), 1, MAX_STEPS) for each in "ab"))
        ends = {event.job_id: event for event in (worker.wait(JobEnded), worker.wait(JobEnded))}
        assert (ends["a"].end, ends["a"].code) == ("failed", "non_finite_loss")
        assert ends["b"].end == "succeeded"
        assert not any(each.is_last for each in worker.events_of(JobVersion) if each.job_id == "a")


def test_a_slice_that_raises_ends_the_jobs_that_were_in_it_and_the_worker_goes_on(tmp_path):
    command = prepare("c", *ROWS, steps=3)
    with running_worker() as worker:
        bad = prepare("a", *ROWS, IdsRow((0, RAISE)), steps=50)
        worker.send(bad, prepare("b", *ROWS, steps=10_000))
        worker.wait(JobPrepared, lambda event: event.job_id == "b")
        worker.send(*(StartJob(each, str(tmp_path / each), 0, MAX_STEPS) for each in "ab"))
        ends = {event.job_id: event for event in (worker.wait(JobEnded), worker.wait(JobEnded))}
        assert {(end.end, end.code) for end in ends.values()} == {("failed", "internal")}
        assert first_token(worker, "r", None) == 3
        # Nothing of them is left in the trainer.
        assert trained(worker, command, tmp_path / "c").digest == last_digest(command, 3)
        assert len(worker.events_of(JobEnded)) == 3


def test_a_job_that_cannot_begin_fails_and_no_other(tmp_path):
    with running_worker() as worker:
        worker.send(prepare("a", IdsRow((0, RAISE_AT_BEGIN))), prepare("b", *ROWS, steps=3))
        worker.wait(JobPrepared, lambda event: event.job_id == "b")
        worker.send(*(StartJob(each, str(tmp_path / each), 0, MAX_STEPS) for each in "ab"))
        ends = {event.job_id: event for event in (worker.wait(JobEnded), worker.wait(JobEnded))}
        assert (ends["a"].end, ends["a"].code) == ("failed", "internal")
        assert ends["b"].end == "succeeded"


def test_a_job_without_room_for_its_checkpoint_is_paused_and_goes_on_when_there_is_some(tmp_path):
    command = prepare("a", *ROWS, steps=30)
    with running_worker(ARITHMETIC_SLICE_SECONDS="0.003") as worker:
        worker.send(command)
        worker.wait(JobPrepared)
        # No file may grow beyond a byte: what a full disk is to a write.
        unlimited = resource.RLIM_INFINITY
        resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (1, unlimited))
        worker.send(StartJob("a", str(tmp_path / "a"), 0, MAX_STEPS))
        paused = worker.wait(JobPaused)
        assert "no room" in paused.detail
        assert worker.events_of(JobEnded) == []
        num_steps = len(worker.events_of(JobStep))
        assert first_token(worker, "r", None) == 3
        resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
        worker.wait(JobEnded)
        steps = [each.step for each in worker.events_of(JobStep)]
        assert 0 < num_steps < 30
        assert steps == list(range(1, 31)), "no step is lost, and none is made twice"
        assert worker.events_of(JobVersion)[-1].digest == last_digest(command, 30)


def is_of(job_id):
    return lambda event: event.job_id == job_id


@pytest.mark.parametrize("is_full", [False, True])
def test_halted_jobs_train_no_more_and_what_they_were_at_is_on_the_disk(tmp_path, is_full):
    commands = [prepare(f"j{number}", *ROWS, steps=5000, seed=number) for number in range(3)]
    load = {"checkpoint_seconds": 0.0 if is_full else 3600.0}
    with running_worker(load=load, ARITHMETIC_SLICE_SECONDS="0.003") as worker:
        worker.send(*commands)
        for _ in commands:
            worker.wait(JobPrepared)
        if is_full:
            limits = (1, resource.RLIM_INFINITY)
            resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, limits)
        worker.send(
            *(StartJob(f"j{number}", str(tmp_path / f"j{number}"), 0, 0) for number in (0, 1))
        )
        kind = JobPaused if is_full else JobStep
        assert {worker.had(kind, is_of(each)).job_id for each in ("j0", "j1")} == {"j0", "j1"}
        worker.send(HaltJobs("halt"), StartJob("j2", str(tmp_path / "j2"), 0, 0))
        assert worker.wait(JobsHalted).request_id == "halt"
        last = {told.job_id: told.step for told in worker.events_of(JobStep)}
        assert first_token(worker, "r", None) == 3
        time.sleep(0.1)
        worker.send(HaltJobs("again"))
        worker.wait(JobsHalted)
    assert {told.job_id: told.step for told in worker.events_of(JobStep)} == last
    assert worker.events_of(JobEnded) == []
    found = {
        path.name: json.loads(content)["step"]
        for path in tmp_path.iterdir()
        if (content := newest_checkpoint(path, MAX_STEPS))
    }
    assert found == ({} if is_full else last)


def test_a_folder_that_cannot_be_written_fails_the_job(tmp_path):
    (tmp_path / "file").write_text("")
    with running_worker() as worker:
        worker.send(prepare("a", *ROWS, steps=5))
        worker.wait(JobPrepared)
        worker.send(StartJob("a", str(tmp_path / "file" / "a"), 0, MAX_STEPS))
        ended = worker.wait(JobEnded)
        assert (ended.end, ended.code) == ("failed", "storage_error")


def test_requests_are_admitted_at_once_while_a_large_job_is_prepared():
    text = " ".join(str(number % 7) for number in range(20))
    rows = tuple(TextRow(text) for _ in range(10_000))
    waits = []
    with running_worker() as worker:
        worker.send(prepare("a", *rows))
        while not worker.events_of(JobPrepared):
            began = time.monotonic()
            worker.send(generate(f"r{len(waits)}", (1, 2)))
            worker.wait(Accepted)
            waits.append(time.monotonic() - began)
            worker.wait(Finished)
    assert len(waits) > 10
    # The first one waits for the frame; half of the others at least see nothing of the job.
    assert sorted(waits)[len(waits) // 2] < 0.01


def test_what_kills_the_worker_while_it_trains_and_serves_loses_no_checkpoint(tmp_path):
    command = prepare("a", *ROWS, steps=40, seed=1)
    with running_worker(ARITHMETIC_SLICE_SECONDS="0.004") as worker:
        worker.send(command)
        worker.wait(JobPrepared)
        worker.send(StartJob("a", str(tmp_path / "a"), 0, MAX_STEPS))
        worker.wait(JobStep, lambda event: event.step == 10)
        worker.send(generate("r", (1, EXIT)))
        assert worker.process.wait(10) == 3
    with running_worker() as worker:
        assert trained(worker, command, tmp_path / "a").digest == last_digest(command, 40)
        assert worker.events_of(JobStep)[0].step > 5


def test_without_room_for_adapters_nothing_is_trained():
    with running_worker(load={"adapter_slots": 0}) as worker:
        worker.send(prepare("a", *ROWS))
        assert worker.wait(JobRefused).code == "invalid_field"


def test_a_source_that_is_told_at_the_start_is_there(tmp_path):
    (tmp_path / "tone.lora.h5").write_text("5")
    source = AdapterSource(digest_of(b"5"), str(tmp_path / "tone.lora.h5"))
    with running_worker(load={"adapters": (source,)}) as worker:
        assert first_token(worker, "r", source.digest) == 8
        further = trained(worker, prepare("a", *ROWS, steps=1, init=source.digest), tmp_path / "a")
        assert first_token(worker, "s", further.digest) != 8
