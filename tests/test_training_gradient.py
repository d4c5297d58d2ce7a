"""Losses and gradients of packed micro-batches: `jax.grad` of plain forward passes, and scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.adapter_file import write_adapter
from model.finetune.checkpoint import read_checkpoint
from model.finetune.optimizers import Floats
from model.finetune.pairs import first_adapter
from model.finetune.trainer import SlicedTrainer
from model.lora_adapter import LoraForm
from model.score_slots import ScoreChunk
from model.training import EvalDone, StepDone
from tests import goldens, plain_gemma
from tests.adapters import drawn_adapter
from tests.test_scores import logprobs_of, read
from tests.training_jobs import events_of, plan_of, rows_of

ALL = (
    *("attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"),
    *("key", "query", "value"),
)
FORMS = (LoraForm("keras", 3, 3.0, ALL), LoraForm("peft", 4, 8.0, ALL))
# Sixteen tokens and less, and more; the first two sizes share a micro-batch, the last is alone.
ROWS = (*rows_of(3, 14, 1), *rows_of(2, 40, 2), *rows_of(1, 140, 3))


class Keeping:
    """Moves nothing: the gradient becomes what is kept."""

    num_moments = 1

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
        return weight, (gradient,)


def trainer_of(engine, optimizer=None):
    return SlicedTrainer(engine._config, engine._batches, max_rank=8, optimizer=optimizer)


# Of each tensor's norm. The first of these random presets has logits at the ends of its soft cap,
# where float32 loses digits of the slope: `jax.grad` in float32 is 6e-5 away from float64 there,
# and 2e-5 on the second; measured here are 8e-5 and 2e-5.
@pytest.mark.parametrize(("name", "tolerance"), [("gemma2_tiny", 1.5e-4), ("gemma3_tiny", 4e-5)])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.layout)
def test_a_packed_step_has_the_gradient_of_a_plain_forward_pass(engine_of, name, tolerance, form):
    backbone, trainer = goldens.backbone(name), trainer_of(engine_of(name), Keeping())
    config, weights = backbone.config, backbone.gemma_weights
    adapter = drawn_adapter(config, form, seed=4, scale=0.05)
    fields = {"layout": form.layout, "rank": form.rank, "alpha": form.alpha, "targets": ALL}
    own = plan_of(
        "own", rows=ROWS, batch_size=6, num_steps=1, grad_clip=None, seed=3,
        initial=write_adapter(adapter), **fields,
    )  # fmt: skip
    # Its rows stand between those above: had they part in the gradient, it would show.
    other = plan_of("other", rows=rows_of(5, 15, 9), batch_size=5, num_steps=1, **fields)
    trainer.begin(own)
    trainer.begin(other)
    events = []
    while trainer.num_jobs:
        events += trainer.advance()
    [done] = [each for each in events if isinstance(each, StepDone) and each.job == "own"]
    assert done.rows_shared > 0
    _, kept, _ = read_checkpoint(trainer.checkpoint("own"), config, 1)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda each: jnp.asarray(each, jnp.float64), dict(adapter.pairs))
        loss, gradient = jax.value_and_grad(
            lambda pairs: plain_gemma.mean_loss(config, weights, ROWS, form, pairs)
        )(wide)
        expected = {
            f"{layer}.{target}.{name}": np.asarray(array)
            for (layer, target), pair in gradient.items()
            for name, array in zip("ab", pair, strict=True)
        }
    assert done.loss == pytest.approx(float(loss), rel=1e-6)
    total = np.sqrt(sum(np.sum(np.square(each)) for each in expected.values()))
    assert done.grad_norm == pytest.approx(total, rel=tolerance)
    assert kept.keys() == expected.keys()
    errors = {
        name: float(np.linalg.norm(found - expected[name]) / np.linalg.norm(expected[name]))
        for name, (found,) in kept.items()
    }
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("rank", [None, 5], ids=["base", "adapter"])
@pytest.mark.parametrize("name", goldens.TINY_PRESETS)
def test_the_loss_of_a_step_is_that_of_scores(engine_of, name, rank):
    engine = engine_of(name)
    config = engine._config
    form = LoraForm("keras", rank or 2, float(rank or 2), ("ffw_linear", "key", "query"))
    # The B of a job that begins is zero: its first loss is the base's.
    adapter = first_adapter(config, form, 1)
    slot = 0
    if rank:
        adapter, slot = drawn_adapter(config, form, scale=0.05), 2
        engine.put_adapter(slot, adapter.for_bank(config))
    plan = plan_of(
        "a", rows=ROWS, validation=ROWS[:2], batch_size=6, num_steps=1, rank=form.rank,
        targets=form.targets, initial=write_adapter(adapter),
    )  # fmt: skip
    events, _ = events_of(engine.trainer, plan)
    [first, _] = [each.valid_loss for each in events if isinstance(each, EvalDone)]
    [step] = [each.loss for each in events if isinstance(each, StepDone)]
    assert first == pytest.approx(scored(engine, ROWS[:2], slot), abs=5e-5)
    assert step == pytest.approx(scored(engine, ROWS, slot), abs=5e-5)


def scored(engine, rows, slot):
    """The mean of minus the log-probabilities that `/score` gives."""
    found = []
    for row in rows:
        wanted = tuple(place - 1 for place, is_trained in enumerate(row.is_trained) if is_trained)
        chunk = ScoreChunk(0, row.token_ids[:-1], 0, wanted, adapter=slot)
        targets = [row.token_ids[place + 1] for place in wanted]
        found += logprobs_of(engine, read(engine, chunk), targets)
    return -float(np.mean(found))
