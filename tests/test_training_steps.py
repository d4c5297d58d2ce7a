"""What a step is, worked out by hand: AdamW, the course of the rate, clipping, order of rows."""

import math

import numpy as np
import pytest

from model.finetune.optimizers import AdamW, clip_factor, learning_rate, norm
from model.finetune.row_order import ends_epoch, rows_of_step
from model.training import StepDone, TrainingRow
from tests.training_jobs import events_of, plan_of, rows_of


def floats(*numbers):
    return np.array(numbers, np.float32)


def test_the_first_step_of_adamw_goes_the_whole_rate_against_the_sign_of_the_gradient():
    # The means are the gradient and its square again, so each number moves by the rate.
    weight, moments = AdamW().move(
        floats(1.0, 2.0), floats(0.5, -0.25), (floats(0.0, 0.0),) * 2,
        step=1, learning_rate=0.1, weight_decay=0.0,
    )  # fmt: skip
    np.testing.assert_allclose(weight, [0.9, 2.1], rtol=1e-6)
    np.testing.assert_allclose(moments[0], [0.05, -0.025], rtol=1e-6)
    np.testing.assert_allclose(moments[1], [0.00025, 0.0000625], rtol=1e-5)


def test_the_second_step_of_adamw_by_hand():
    # First:  0.9 · 0.05 + 0.1 · 1 = 0.145; over 1 - 0.9² = 0.19 it is 0.763158.
    # Second: 0.999 · 0.00025 + 0.001 · 1 = 0.00124975; over 0.001999 it is 0.625188.
    # 0.763158 / √0.625188 = 0.965176, and the decay adds 0.01 · 0.9.
    weight, moments = AdamW().move(
        floats(0.9), floats(1.0), (floats(0.05), floats(0.00025)),
        step=2, learning_rate=0.1, weight_decay=0.01,
    )  # fmt: skip
    np.testing.assert_allclose(moments[0], [0.145], rtol=1e-6)
    np.testing.assert_allclose(moments[1], [0.00124975], rtol=1e-6)
    np.testing.assert_allclose(weight, [0.9 - 0.1 * (0.965176 + 0.009)], rtol=1e-6)


def test_decay_shrinks_a_weight_whose_gradient_is_zero_by_rate_times_decay():
    zeros = (floats(0.0, 0.0),) * 2
    weight, _ = AdamW().move(
        floats(2.0, -4.0), floats(0.0, 0.0), zeros, step=1, learning_rate=0.5, weight_decay=0.1
    )
    np.testing.assert_allclose(weight, [1.9, -3.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        # Half a wave: (1 + cos(π k / 4)) / 2.
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_the_rate_rises_in_equal_parts_and_then_stays_or_goes_down(schedule, rates):
    plan = plan_of("a", num_steps=6, learning_rate=1.0, schedule=schedule, warmup_steps=2)
    assert [learning_rate(plan, step) for step in range(1, 7)] == pytest.approx(rates)


def test_a_warm_up_of_all_steps_ends_at_the_highest_rate():
    plan = plan_of("a", num_steps=4, learning_rate=0.8, schedule="cosine", warmup_steps=4)
    rates = [learning_rate(plan, step) for step in range(1, 5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_a_gradient_is_clipped_by_the_norm_of_all_arrays_together():
    assert norm({"a": floats(3.0, 0.0), "b": floats(-4.0)}) == 5.0
    assert clip_factor(5.0, 2.0) == 0.4
    assert clip_factor(5.0, 5.0) == clip_factor(5.0, None) == clip_factor(0.0, 1.0) == 1.0


def test_the_norm_of_what_is_too_large_to_square_in_float32_is_right():
    assert norm({"a": floats(3e30), "b": floats(4e30)}) == pytest.approx(5e30, rel=1e-6)


# --- the order of rows ------------------------------------------------------------------------


def test_each_epoch_takes_every_row_once_and_its_last_step_what_is_left():
    plan = plan_of("a", rows=rows_of(7, 14), num_steps=9, batch_size=3)
    taken = [rows_of_step(plan, step) for step in range(1, 10)]
    assert [len(rows) for rows in taken] == [3, 3, 1] * 3
    epochs = [[*taken[first], *taken[first + 1], *taken[first + 2]] for first in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has an order of its own"
    assert [step for step in range(1, 10) if ends_epoch(plan, step)] == [3, 6, 9]


def test_the_order_of_rows_depends_on_the_seed_and_the_epoch_and_on_nothing_else():
    def order(epoch, **changes):
        plan = plan_of("a", **{"rows": rows_of(7, 14), "num_steps": 100, **changes})
        steps = -(-7 // plan.batch_size)
        numbers = range(1 + epoch * steps, 1 + (epoch + 1) * steps)
        return [row for number in numbers for row in rows_of_step(plan, number)]

    expected = [order(epoch) for epoch in range(3)]
    for changes in (
        {"batch_size": 1},
        {"batch_size": 7},
        {"rows": rows_of(7, 200, 9)},
        {"num_steps": 21, "learning_rate": 1.0, "rank": 1, "layout": "peft"},
    ):
        assert [order(epoch, **changes) for epoch in range(3)] == expected
    assert [order(epoch, seed=2) for epoch in range(3)] != expected


# --- what a job will take ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(engine_of):
    return engine_of("gemma2_tiny")


def row(length):
    return TrainingRow((2,) + (20,) * (length - 1), (False,) + (True,) * (length - 1))


@pytest.mark.parametrize(
    ("lengths", "batch_size", "num_steps", "padded"),
    [
        # Eight rows of at most 16 fill a micro-batch of 128, in each of three epochs.
        ([16] * 8, 8, 3, 3 * 128),
        # One by one each has a micro-batch.
        ([16] * 8, 1, 8, 8 * 128),
        # 32 + 64 + 32 fill one; 17 tokens take 32, so a fourth row begins another.
        ([17, 33, 32], 4, 1, 128),
        ([17, 33, 32, 2], 4, 1, 256),
        # Rows of more than 128 tokens share with nobody.
        ([129, 10, 512, 257, 200], 5, 2, 2 * (128 + 256 + 256 + 512 + 512)),
    ],
)
def test_an_estimate_counts_tokens_as_they_are_and_as_they_are_padded(
    engine, lengths, batch_size, num_steps, padded
):
    rows = tuple(map(row, lengths))
    plan = plan_of("a", rows=rows, batch_size=batch_size, num_steps=num_steps)
    estimate = engine.trainer.estimate(plan)
    epochs = num_steps / -(-len(rows) // batch_size)
    assert estimate.num_tokens == sum(lengths) * epochs
    assert estimate.num_padded_tokens == padded
    assert estimate.seconds > 0


def test_an_estimate_of_a_million_steps_counts_all_of_them_at_once(engine):
    # 33 steps an epoch: a million steps are 30,303 epochs and the first step of one more.
    rows = tuple(row(2 + number % 15) for number in range(330))
    plan = plan_of("a", rows=rows, batch_size=10, num_steps=1_000_000)
    estimate = engine.trainer.estimate(plan)
    of_last = sum(len(rows[index].token_ids) for index in rows_of_step(plan, 1_000_000))
    in_epoch = sum(len(each.token_ids) for each in rows)
    assert estimate.num_tokens == 30_303 * in_epoch + of_last


def test_an_estimate_has_the_time_of_every_measurement(engine):
    def measuring(num_steps, rows):
        plan = plan_of("a", num_steps=num_steps, validation=rows)
        without = plan_of("a", num_steps=num_steps)
        both = engine.trainer.estimate(plan), engine.trainer.estimate(without)
        assert both[0].num_tokens == both[1].num_tokens
        return both[0].seconds - both[1].seconds

    # Two steps an epoch. Eight rows of sixteen tokens fill a micro-batch.
    rows = (row(16),) * 8
    once = measuring(2, rows) / 2
    assert once > 0
    assert measuring(1, rows) == pytest.approx(2 * once)
    assert measuring(5, rows) == pytest.approx(4 * once)
    assert measuring(4, rows * 3) == pytest.approx(3 * 3 * once)


def test_the_steps_of_a_job_tell_what_the_estimate_counted(engine):
    plan = plan_of("a", rows=rows_of(5, 20), batch_size=2, num_steps=6, schedule="linear")
    events, _ = events_of(engine.trainer, plan)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert sum(step.num_tokens for step in steps) == engine.trainer.estimate(plan).num_tokens
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    rates = [1e-2 * (6 - done) / 6 for done in range(6)]
    assert [step.learning_rate for step in steps] == pytest.approx(rates)
