"""`GemmaCausalLM` in Keras' hands: score, evaluate, fit and LoRA against keras-hub 0.32.

| arrays | tolerance |
|---|---|
| score.logits, .logits_half1, .loss, .logits_nomask | 2e-4 |
| evaluate.* | 1e-4 |
| train.* histories | 1e-4 |
| train.lora.*.{a1,b1,a5,b5}, train.full.* | 1e-4 |
| train.lora.logits5 | 5e-3 (weights within 1e-5 give 2.5e-3 at one of 64 positions) |
"""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from model.causal_lm import GemmaCausalLM
from model.gemma.backbone import Backbone
from model.gemma.keras_lora import TARGETS
from model.keras_tokenizer import GemmaTokenizer
from model.preprocessor import GemmaCausalLMPreprocessor
from model.presets.keras_directory import KerasPreset
from tests import goldens

SETS = pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])


def fresh(name, sequence_length=16):
    """A model of its own, as training changes it."""
    preset = KerasPreset.open(goldens.preset_directory(name))
    backbone = Backbone(preset.config, {key: jnp.asarray(a) for key, a in preset.arrays()})
    tokenizer = GemmaTokenizer(preset.tokenizer_proto())
    return GemmaCausalLM(backbone, GemmaCausalLMPreprocessor(tokenizer, sequence_length))


def with_given_a(model, name):
    """LoRA of rank 4 on query and value, starting where keras-hub's run started."""
    model.backbone.enable_lora(4)
    for layer in range(model.backbone.config.num_layers):
        for target in ("query", "value"):
            holder = model.backbone.lora_layers[f"decoder_block_{layer}/attention/{target}/kernel"]
            holder.lora_kernel_a.assign(goldens.arrays(name)[f"train.lora.{layer}.{target}.a0"])
    return model


def lora_arrays(model):
    found = {}
    for key, holder in model.backbone.lora_layers.items():
        block, _, target, _ = key.split("/")
        place = f"{block.removeprefix('decoder_block_')}.{target}"
        found[f"{place}.a"] = np.asarray(holder.lora_kernel_a)
        found[f"{place}.b"] = np.asarray(holder.lora_kernel_b)
    return found


@SETS
def test_score_equals_keras_hub(name):
    given = goldens.arrays(name)
    model = GemmaCausalLM(goldens.backbone(name))
    ids, mask = given["fwd.token_ids"], given["fwd.padding_mask"]
    close = {"atol": 2e-4, "rtol": 0}
    np.testing.assert_allclose(model.score(ids, mask), given["score.logits"], **close)
    np.testing.assert_allclose(model.score(ids), given["score.logits_nomask"], **close)
    loss = model.score(ids, mask, "loss", target_ids=given["score.target_ids"])
    np.testing.assert_allclose(loss, given["score.loss"], **close)
    halved = model.score(
        ids, mask, layer_intercept_fn=lambda x, layer: x * 0.5 if layer == 1 else x
    )
    np.testing.assert_allclose(halved, given["score.logits_half1"], **close)


def test_a_gradient_through_score_is_that_of_finite_differences():
    model = GemmaCausalLM(goldens.backbone("gemma1_tiny"))
    ids = np.array([[2, 40, 77, 91]])
    targets = np.array([[40, 77, 91, 1]])
    direction = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 32)), jnp.float32)

    @jax.jit
    def total_loss(step):
        def shift(x, layer):
            return x + step * direction if layer == -1 else x

        return model.score(ids, None, "loss", shift, targets).sum()

    gradient = jax.grad(total_loss)(0.0)
    step = 1e-3
    difference = (total_loss(step) - total_loss(-step)) / (2 * step)
    assert float(gradient) == pytest.approx(float(difference), rel=2e-2)


def test_score_refuses_what_it_cannot_do():
    model = GemmaCausalLM(goldens.backbone("gemma1_tiny"))
    with pytest.raises(ValueError, match="'logits' or 'loss', got 'perplexity'"):
        model.score([[1, 2]], scoring_mode="perplexity")
    with pytest.raises(ValueError, match="needs target_ids"):
        model.score([[1, 2]], scoring_mode="loss")
    with pytest.raises(ValueError, match=r"got shape \(2,\)"):
        model.score([1, 2])
    with pytest.raises(ValueError, match=r"token_ids has 512 in row 0, column 1; .* \[0, 512\)"):
        model.score([[1, 512]])
    with pytest.raises(ValueError, match="target_ids has -1 in row 0, column 0"):
        model.score([[1]], scoring_mode="loss", target_ids=[[-1]])
    with pytest.raises(ValueError, match=r"padding_mask has shape \(1, 1\), token_ids \(1, 2\)"):
        model.score([[1, 2]], padding_mask=[[1]])


@SETS
def test_evaluate_divides_as_keras_hub_does(name):
    given, case = goldens.arrays(name), goldens.cases(name)["evaluate"]
    model = GemmaCausalLM(goldens.backbone(name))
    x = {"token_ids": given["eval.token_ids"], "padding_mask": given["eval.padding_mask"]}
    y, weights = given["eval.y"], given["eval.sw"]
    one = model.evaluate(x, y, sample_weight=weights, batch_size=4, verbose=0)
    two = model.evaluate(x, y, sample_weight=weights, batch_size=3, verbose=0)
    plain = model.evaluate(x, y, batch_size=4, verbose=0)
    np.testing.assert_allclose(one, case["one_batch_of_4"], atol=1e-4)
    np.testing.assert_allclose(two, case["batches_of_3_then_1"], atol=1e-4)
    np.testing.assert_allclose(plain, case["no_sample_weight"], atol=1e-4)


def assert_history(found, expected):
    assert found.keys() == expected.keys() == {"loss", "sparse_categorical_accuracy"}
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, atol=1e-4)


@SETS
def test_lora_training_on_texts_reproduces_keras_hub(name):
    given, case = goldens.arrays(name), goldens.cases(name)["train"]
    expected = case["lora"]
    model = with_given_a(fresh(name), name)
    model.compile(optimizer=keras.optimizers.SGD(expected["learning_rate"]))
    strings = case["strings"]

    before = model.evaluate(strings, batch_size=4, verbose=0)
    first = model.fit(strings, batch_size=4, epochs=1, verbose=0)
    after_one = lora_arrays(model)
    rest = model.fit(strings, batch_size=4, epochs=4, verbose=0)
    after_five = lora_arrays(model)

    np.testing.assert_allclose(before, expected["evaluate_before"], atol=1e-4)
    assert_history(
        {key: first.history[key] + rest.history[key] for key in first.history}, expected["history"]
    )
    for place, array in after_one.items():
        np.testing.assert_allclose(array, given[f"train.lora.{place}1"], atol=1e-4)
    for place, array in after_five.items():
        np.testing.assert_allclose(array, given[f"train.lora.{place}5"], atol=1e-4)
    after = model.evaluate(strings, batch_size=4, verbose=0)
    np.testing.assert_allclose(after, expected["evaluate_after"], atol=1e-4)
    logits = model.predict(strings, batch_size=4, verbose=0)
    np.testing.assert_allclose(logits, given["train.lora.logits5"], atol=5e-3)


@SETS
def test_training_all_weights_reproduces_keras_hub(name):
    given, case = goldens.arrays(name), goldens.cases(name)["train"]
    expected = case["full"]
    model = fresh(name)
    model.compile(optimizer=keras.optimizers.SGD(expected["learning_rate"]))
    history = model.fit(case["strings"], batch_size=4, epochs=3, verbose=0)
    assert_history(history.history, expected["history"])
    after = model.evaluate(case["strings"], batch_size=4, verbose=0)
    np.testing.assert_allclose(after, expected["evaluate_after"], atol=1e-4)
    weights = model.backbone.gemma_weights
    close = {"atol": 1e-4, "rtol": 0}
    np.testing.assert_allclose(weights.embeddings, given["train.full.embeddings3"], **close)
    np.testing.assert_allclose(weights.final_norm, given["train.full.final_scale3"], **close)
    linear = np.asarray(weights.blocks[0].ffw_linear).T
    np.testing.assert_allclose(linear, given["train.full.ffw_linear0_3"], **close)


@SETS
def test_the_default_optimizer_is_that_of_keras_hub(name):
    case = goldens.cases(name)["train"]
    model = fresh(name)
    history = model.fit(case["strings"], batch_size=4, epochs=3, verbose=0)
    expected = case["default_compile"]
    assert_history(history.history, expected["history"])
    after = model.evaluate(case["strings"], batch_size=4, verbose=0)
    np.testing.assert_allclose(after, expected["evaluate_after"], atol=1e-4)


def test_lora_after_an_earlier_fit_trains_only_its_own_weights():
    model = fresh("gemma1_tiny")
    strings = goldens.cases("gemma1_tiny")["train"]["strings"]
    model.fit(strings, batch_size=4, epochs=1, verbose=0)
    model.backbone.enable_lora(4)
    with pytest.raises(ValueError, match=r"Call compile\(\) again"):
        model.fit(strings, batch_size=4, epochs=1, verbose=0)
    model.compile(optimizer=keras.optimizers.AdamW(1e-2))
    kernels = [np.asarray(w) for w in model.non_trainable_weights]
    assert len(model.trainable_weights) == 2 * 2 * 2
    history = model.fit(strings, batch_size=2, epochs=3, verbose=0, validation_data=strings[:2])
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert len(history.history["val_loss"]) == 3
    for before, after in zip(kernels, model.non_trainable_weights, strict=True):
        np.testing.assert_array_equal(before, np.asarray(after))


@pytest.mark.parametrize("target", TARGETS)
def test_lora_begins_as_nothing_and_reaches_every_target(target):
    model = GemmaCausalLM(fresh("gemma2_tiny").backbone)
    x = {"token_ids": np.array([[2, 40, 77]]), "padding_mask": np.ones((1, 3), bool)}
    base = np.asarray(model(x))
    model.backbone.enable_lora(2, target_layer_names=[target])
    np.testing.assert_array_equal(np.asarray(model(x)), base)
    for holder in model.backbone.lora_layers.values():
        holder.lora_kernel_b.assign(np.ones(holder.lora_kernel_b.shape))
    assert np.abs(np.asarray(model(x)) - base).max() > 1e-3


def test_bad_lora_arguments_say_what_is_wrong():
    backbone = fresh("gemma1_tiny").backbone
    with pytest.raises(ValueError, match="rank must be at least 1"):
        backbone.enable_lora(0)
    with pytest.raises(ValueError, match="LoRA targets are query, key"):
        backbone.enable_lora(4, target_layer_names=["querry"])
    backbone.enable_lora(4)
    with pytest.raises(ValueError, match="already enabled"):
        backbone.enable_lora(4)


def test_texts_without_a_preprocessor_are_refused():
    with pytest.raises(ValueError, match="Texts need a preprocessor"):
        GemmaCausalLM(goldens.backbone("gemma1_tiny")).fit(["a text"])
