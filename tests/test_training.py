"""The trainer of an engine: goldens of Keras, the same bits in any company, and after a stop."""

import numpy as np
import pytest

from model.adapter_file import read_adapter, write_adapter
from model.finetune.optimizers import Floats
from model.finetune.pairs import first_adapter
from model.finetune.trainer import SlicedTrainer, _micro_batches
from model.gemma.keras_lora import TARGETS
from model.lora_adapter import LoraAdapter, LoraForm
from model.training import JobDone, StepDone, TrainingRow
from tests import goldens
from tests.training_jobs import plan_of, rows_of, trained


class Sgd:
    """Plain descent, as in the golden runs."""

    num_moments = 0

    def move(
        self,
        weight: Floats,
        gradient: Floats,
        moments: tuple[Floats, ...],
        *,
        step: int,
        learning_rate: float,
        weight_decay: float,
    ) -> tuple[Floats, tuple[Floats, ...]]:
        return weight - np.float32(learning_rate) * gradient, ()


# Both paths of the products.
@pytest.fixture(scope="module", params=[("gemma2_tiny", "auto"), ("gemma3_tiny", "xla")])
def engine(engine_of, request):
    return engine_of(*request.param)


PLANS = (
    plan_of("a"),
    plan_of("b", layout="peft", rank=8, alpha=16.0, seed=5, rows=rows_of(7, 40, 3)),
    plan_of("c", rank=2, targets=("ffw_linear", "key"), rows=rows_of(3, 16, 4), batch_size=1),
    plan_of(
        "d",
        layout="peft",
        rank=3,
        alpha=1.5,
        targets=("attention_output", "ffw_gating", "ffw_gating_2", "query"),
        rows=(*rows_of(2, 120, 6), *rows_of(2, 30, 7), *rows_of(1, 300, 8)),
    ),
)


def test_jobs_that_share_micro_batches_end_with_the_bits_that_they_have_alone(engine):
    together = trained(engine.trainer, *PLANS)
    alone = {plan.job: trained(engine.trainer, plan)[plan.job] for plan in PLANS}
    assert [job for job in alone if alone[job] != together[job]] == []


def test_nothing_compiles_for_a_job_once_an_engine_is_loaded(engine):
    before = engine.num_compilations
    for number, target in enumerate(TARGETS):
        trained(engine.trainer, plan_of(str(number), targets=(target,), rank=2 + number % 3))
    assert engine.num_compilations == before


def test_a_job_that_is_stopped_after_every_step_ends_with_the_same_bits(engine, monkeypatch):
    # A slice is one piece, so that none of them is a whole step.
    monkeypatch.setattr("model.finetune.trainer._SLICE_SECONDS", 1e-4)
    trainer, plan = engine.trainer, PLANS[1]
    [whole] = trained(trainer, plan).values()
    kept = None
    for done in range(plan.num_steps):
        assert trainer.begin(plan, kept) == done
        while not any(isinstance(event, StepDone) for event in trainer.advance()):
            pass
        kept = trainer.checkpoint("b")
        # What it began of the next step is lost with it.
        trainer.advance()
        if done + 1 < plan.num_steps:
            assert trainer.checkpoint("b") == kept
        trainer.drop("b")
    assert trainer.begin(plan, kept) == plan.num_steps
    assert [type(event) for event in trainer.advance()] == [JobDone]
    assert trainer.adapter("b") == whole
    trainer.drop("b")


@pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])
def test_five_steps_of_plain_descent_are_those_of_keras_hub(engine_of, name):
    engine = engine_of(name)
    given, case = goldens.arrays(name), goldens.cases(name)["train"]["lora"]
    # Keras divides by all positions, the trainer by those with a weight.
    share = float(np.mean(given["train.sw"]))
    rows = []
    for ids, mask, weights in zip(
        given["train.x_token_ids"], given["train.x_padding_mask"], given["train.sw"], strict=True
    ):
        labels = given["train.y"][len(rows)]
        count = int(mask.sum())
        more = [int(labels[count - 1])] if weights[count - 1] else []
        token_ids = (*map(int, ids[:count]), *more)
        is_trained = (False, *(bool(each) for each in weights[: len(token_ids) - 1]))
        rows.append(TrainingRow(token_ids, is_trained))
    form = LoraForm("keras", 4, 4.0, ("query", "value"))
    empty = first_adapter(engine._config, form, 0)
    pairs = {
        (layer, target): (given[f"train.lora.{layer}.{target}.a0"], b)
        for (layer, target), (_, b) in empty.pairs.items()
    }
    trainer = SlicedTrainer(engine._config, engine._batches, max_rank=8, optimizer=Sgd())
    plan = plan_of(
        "golden",
        rows=tuple(rows),
        num_steps=5,
        batch_size=4,
        grad_clip=None,
        learning_rate=case["learning_rate"] * share,
        initial=write_adapter(LoraAdapter(form, pairs)),
    )
    trainer.begin(plan)
    losses = []
    while trainer.num_jobs:
        for event in trainer.advance():
            if isinstance(event, StepDone):
                losses.append(event.loss)
                adapter = read_adapter(trainer.adapter("golden"), engine._config)
                if event.step in (1, 5):
                    for (layer, target), (a, b) in adapter.pairs.items():
                        place = f"train.lora.{layer}.{target}"
                        np.testing.assert_allclose(a, given[f"{place}.a{event.step}"], atol=1e-4)
                        np.testing.assert_allclose(b, given[f"{place}.b{event.step}"], atol=1e-4)
    np.testing.assert_allclose(np.multiply(losses, share), case["history"]["loss"], atol=1e-4)


def test_an_estimate_counts_the_sizes_that_rows_have():
    # Three rows of 16 places in one micro-batch of 128; one of 300 in one of 512.
    short, long = rows_of(3, 14), rows_of(1, 300)
    num_short, num_long = (sum(sum(row.is_trained) for row in rows) for rows in (short, long))
    assert _micro_batches(short) == [(128, num_short)]
    assert _micro_batches([*short, *long]) == [(128, num_short), (512, num_long)]
