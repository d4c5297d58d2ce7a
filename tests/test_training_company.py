"""What happens to one job is no other's business: failures, memory, requests and measuring."""

import jax
import numpy as np
import pytest

from model.adapter_file import read_adapter, write_adapter
from model.finetune.micro_batch import MicroBatches
from model.finetune.trainer import SlicedTrainer
from model.lora_adapter import LoraAdapter, LoraForm
from model.training import EvalDone, JobDone, JobFailed, StepDone
from tests import goldens, plain_gemma
from tests.adapters import drawn_adapter
from tests.test_engine import continue_alone, random_tokens
from tests.test_scores import logprobs_of, residuals_of
from tests.training_jobs import events_of, plan_of, rows_of, trained


@pytest.fixture(scope="module")
def engine(engine_of):
    return engine_of("gemma2_tiny")


A = plan_of("a", num_steps=3)
B = plan_of("b", rows=rows_of(5, 30, 2), layout="peft", rank=3, num_steps=4, batch_size=2)


@pytest.fixture(scope="module")
def alone(engine):
    return {**trained(engine.trainer, A), **trained(engine.trainer, B)}


def ends_of(events):
    return {event.job: event for event in events if isinstance(event, JobDone | JobFailed)}


# --- who has no rows --------------------------------------------------------------------------


def test_a_job_without_rows_in_a_micro_batch_keeps_every_bit_optimizer_included(engine):
    trainer = engine.trainer
    # Its rows need another program, so it shares nothing with the other job.
    apart = plan_of("apart", rows=rows_of(2, 200, 5), num_steps=40, batch_size=1)
    trainer.begin(apart)
    while not any(isinstance(event, StepDone) for event in trainer.advance()):
        pass
    first = trainer.checkpoint("apart")
    trainer.begin(plan_of("other", num_steps=10))
    others = 0
    while others < 10:
        kept = trainer.checkpoint("apart")
        events = trainer.advance()
        others += sum(isinstance(each, StepDone) and each.job == "other" for each in events)
        if not any(event.job == "apart" for event in events):
            assert trainer.checkpoint("apart") == kept
    assert trainer.checkpoint("apart") != first, "it went on beside the other"
    trainer.drop("apart")
    trainer.drop("other")


# --- what is not finite, and what has no room -------------------------------------------------


def too_large(engine, form):
    adapter = drawn_adapter(engine._config, form)
    pairs = {
        place: (a * np.float32(1e30), b * np.float32(1e30))
        for place, (a, b) in adapter.pairs.items()
    }
    return write_adapter(LoraAdapter(form, pairs))


def test_a_loss_that_is_not_finite_fails_its_job_alone_and_its_neighbours_have_their_bytes(
    engine, alone
):
    form = LoraForm("keras", 4, 4.0, ("query", "value"))
    bad = plan_of("bad", initial=too_large(engine, form))
    events, files = events_of(engine.trainer, bad, A, B)
    assert {job: type(end) for job, end in ends_of(events).items()} == {
        "bad": JobFailed,
        "a": JobDone,
        "b": JobDone,
    }
    failed = ends_of(events)["bad"]
    assert (failed.code, "step 1" in failed.detail) == ("non_finite_loss", True)
    assert files["bad"] == bad.initial
    assert {job: files[job] for job in alone} == alone


def test_a_job_that_leaves_the_numbers_keeps_what_its_last_good_step_left(engine, alone):
    # A step of AdamW goes about the whole rate: after the first, products overflow.
    fields = {"learning_rate": 3e38}
    bad = plan_of("bad", **fields)
    one_step = trained(engine.trainer, plan_of("one", num_steps=1, **fields))["one"]
    events, files = events_of(engine.trainer, A, bad)
    failed = ends_of(events)["bad"]
    assert (failed.code, "step 2" in failed.detail) == ("non_finite_loss", True)
    assert [each.step for each in events if isinstance(each, StepDone) and each.job == "bad"] == [1]
    assert files["bad"] == one_step
    assert files["a"] == alone["a"]


NO_ROOM = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


@pytest.mark.parametrize(
    ("name", "error", "code"),
    [
        ("train_forward[256]", NO_ROOM, "out_of_memory"),
        ("train_head", MemoryError(), "out_of_memory"),
        ("train_backward[256]", NO_ROOM, "out_of_memory"),
        ("train_head", jax.errors.JaxRuntimeError("INTERNAL: it broke"), "internal"),
        ("train_backward[256]", ValueError("a bug"), "internal"),
    ],
)
def test_a_micro_batch_that_breaks_fails_those_who_were_in_it_and_nobody_else(
    engine, alone, name, error, code
):
    is_broken = False

    def broken(*given):
        if is_broken:
            raise error
        return engine._programs[name](*given)

    batches = MicroBatches(
        engine._config, engine._weights, engine._traits, {**engine._programs, name: broken},
        max_rank=8, is_native=engine._kernels.is_native,
    )  # fmt: skip
    trainer = SlicedTrainer(engine._config, batches, max_rank=8)
    long = plan_of("long", rows=rows_of(2, 200, 5), num_steps=2)
    trainer.begin(long)
    is_broken = True
    events = list(trainer.advance())
    while not events:
        events += trainer.advance()
    is_broken = False
    assert [type(event) for event in events] == [JobFailed]
    assert (events[0].job, events[0].code) == ("long", code)
    assert trainer.num_jobs == 0
    assert read_adapter(trainer.adapter("long"), engine._config).form.rank == 4
    trainer.drop("long")
    assert trained(trainer, A, B) == alone
    assert trained(trainer, long) == trained(engine.trainer, long)


# --- requests between two slices --------------------------------------------------------------


def test_requests_between_two_slices_change_no_bit_of_a_job_and_jobs_none_of_theirs(engine, alone):
    prompt = random_tokens(30)

    def requested():
        tokens, logprobs = continue_alone(engine, prompt, 3)
        scores = logprobs_of(engine, residuals_of(engine, prompt[:-1]), prompt[1:])
        return tokens, logprobs, scores

    expected = requested()
    found = []
    files = trained(engine.trainer, A, B, between=lambda: found.append(requested()))
    assert files == alone
    assert len(found) > 3
    assert all(each == expected for each in found)


# --- measuring --------------------------------------------------------------------------------


def test_validation_is_measured_before_the_first_step_after_each_epoch_and_at_the_end(engine):
    # Two steps an epoch, and one more.
    validation = (*rows_of(2, 12, 7), *rows_of(1, 150, 8))
    plan = plan_of("v", num_steps=5, validation=validation, batch_size=4)
    events, files = events_of(engine.trainer, plan)
    assert [(type(each), getattr(each, "step", None)) for each in events] == [
        (EvalDone, 0), (StepDone, 1), (StepDone, 2), (EvalDone, 2), (StepDone, 3), (StepDone, 4),
        (EvalDone, 4), (StepDone, 5), (EvalDone, 5), (JobDone, None),
    ]  # fmt: skip
    measured = [each.valid_loss for each in events if isinstance(each, EvalDone)]
    backbone = goldens.backbone("gemma2_tiny")
    adapter = read_adapter(files["v"], backbone.config)
    nothing = {place: (a, np.zeros_like(b)) for place, (a, b) in adapter.pairs.items()}
    with jax.enable_x64(True):
        for found, pairs in ((measured[0], nothing), (measured[-1], adapter.pairs)):
            loss = plain_gemma.mean_loss(
                backbone.config, backbone.gemma_weights, validation, adapter.form, pairs
            )
            assert found == pytest.approx(float(loss), rel=1e-6)
    without = plan_of("v", num_steps=5, batch_size=4)
    assert trained(engine.trainer, without) == files, "what is measured teaches nothing"


def test_a_last_step_that_ends_an_epoch_is_measured_once(engine):
    plan = plan_of("v", num_steps=2, validation=rows_of(1, 12, 7))
    events, _ = events_of(engine.trainer, plan)
    assert [each.step for each in events if isinstance(each, EvalDone)] == [0, 2]
