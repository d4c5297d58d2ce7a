"""Backbone and task as Keras models: construction, configs, policies, presets."""

import io
import json

import jax
import keras
import numpy as np
import pytest

import model
from model import (
    CausalLM,
    Gemma3Backbone,
    GemmaBackbone,
    GemmaCausalLM,
    GemmaCausalLMPreprocessor,
    GemmaTokenizer,
)
from model.errors import (
    PresetError,
    PresetFileInvalid,
    PresetFileMissing,
    PresetNotFound,
    UnsupportedPreset,
)
from model.gemma.backbone import Backbone
from model.keras_backbone import KerasBackbone
from model.preset_source import open_source
from model.presets.table import BUILTIN_PRESETS
from tests import goldens

# The smallest models of keras-hub's own tests (spec 8.2), whose numbers are known.
GEMMA1 = {
    "vocabulary_size": 20,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 1,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "head_dim": 4,
}
GEMMA2 = {
    **GEMMA1,
    "num_key_value_heads": 2,
    "sliding_window_size": 5,
    "attention_logit_soft_cap": 50,
    "final_logit_soft_cap": 30,
    "query_head_dim_normalize": False,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
}
GEMMA3 = {
    **GEMMA1,
    "image_size": None,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": 4,
    "global_rope_scaling_factor": 8.0,
}
CLASSES = {"gemma1": (GemmaBackbone, GEMMA1), "gemma2": (GemmaBackbone, GEMMA2)}
CLASSES["gemma3"] = (Gemma3Backbone, GEMMA3)
EACH = pytest.mark.parametrize("kind", CLASSES)


def rows(length=5):
    return {"token_ids": np.ones((2, length), int), "padding_mask": np.ones((2, length), bool)}


def test_everything_that_a_keras_user_imports_is_there():
    for name in model.__all__:
        assert getattr(model, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'BertBackbone'"):
        _ = model.BertBackbone


def test_the_smallest_backbone_has_the_parameters_and_layers_of_keras_hub():
    backbone = GemmaBackbone(**GEMMA1)
    assert backbone.count_params() == 3216
    assert len(backbone.layers) == 6
    assert backbone.get_layer("decoder_block_1").count_params() == (3216 - 20 * 16 - 16) // 2


@EACH
def test_a_config_goes_through_json_and_back(kind):
    cls, arguments = CLASSES[kind]
    backbone = cls(**arguments)
    config = json.loads(json.dumps(backbone.get_config()))
    again = cls.from_config(config)
    assert again.get_config() == backbone.get_config()
    assert again.config == backbone.config
    expected = {**arguments, "query_head_dim_normalize": True}
    assert expected.items() <= config.items()


@EACH
def test_a_query_scale_of_its_own_is_in_the_config_and_refused_by_the_keras_format(kind, tmp_path):
    cls, arguments = CLASSES[kind]
    backbone = cls(**arguments, query_pre_attention_scalar=9.0)
    assert backbone.config.query_scale == 1 / 3
    again = cls.from_config(json.loads(json.dumps(backbone.get_config())))
    assert again.config == backbone.config
    with pytest.raises(UnsupportedPreset, match=r"query_pre_attention_scalar 9\.0"):
        backbone.save_to_preset(tmp_path / "saved")
    assert "query_pre_attention_scalar" not in cls(**arguments).get_config()


@pytest.mark.parametrize("name", ["top_k", "TopKSampler", "keras_hub>TopKSampler"])
def test_a_sampler_is_compiled_from_a_config(name):
    task = GemmaCausalLM(GemmaBackbone(**GEMMA1))
    task.compile(sampler={"class_name": name, "config": {"k": 3, "seed": 4}})
    assert (type(task.sampler).__name__, task.sampler.k, task.sampler.seed) == ("TopKSampler", 3, 4)


@EACH
def test_a_backbone_takes_any_length_and_shows_its_layers(kind):
    cls, arguments = CLASSES[kind]
    backbone = cls(**arguments)
    for length in (2, 5):
        assert backbone(rows(length)).shape == (2, length, 16)
    assert backbone.predict(rows(), verbose=0).shape == (2, 5, 16)
    written = io.StringIO()
    backbone.summary(print_fn=written.write)
    assert "decoder_block_1" in written.getvalue()
    assert backbone.token_embedding(np.zeros((2, 3), int)).shape == (2, 3, 16)


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_a_policy_reaches_every_layer(policy):
    backbone = GemmaBackbone(**GEMMA2, dtype=policy)
    expected = keras.DTypePolicy(policy)
    assert backbone(rows()).dtype == expected.compute_dtype
    assert {w.dtype for w in backbone.weights} == {expected.variable_dtype}
    assert {layer.compute_dtype for layer in backbone.layers if layer.weights} == {"bfloat16"}
    task = GemmaCausalLM(backbone)
    # As in keras-hub: a mixed policy multiplies with the float32 table in a model's own call.
    own_call = "float32" if policy == "mixed_bfloat16" else "bfloat16"
    assert task(rows()).dtype == own_call
    assert task.score(np.ones((2, 5), int)).dtype == "bfloat16"
    assert GemmaBackbone.from_config(backbone.get_config()).dtype_policy == expected


def test_the_global_policy_holds_where_none_is_given():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert GemmaBackbone(**GEMMA1).compute_dtype == "bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_heads": 4}, TypeError, "has no argument num_heads. Heads are num_query_heads"),
        ({"head_dim": 3}, PresetFileInvalid, "head_dim must be even"),
        ({"dropout": 0.1}, ValueError, "dropout must be 0, got 0.1"),
    ],
)
def test_a_bad_argument_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        GemmaBackbone(**{**GEMMA1, **changes})


def test_missing_heads_are_named():
    with pytest.raises(TypeError, match="'num_query_heads', 'num_key_value_heads', and 'head_dim'"):
        GemmaBackbone(vocabulary_size=20, num_layers=2, hidden_dim=16, intermediate_dim=32)


def test_a_backbone_is_part_of_a_larger_keras_model():
    backbone = GemmaBackbone(**GEMMA1)
    pooled = keras.layers.GlobalAveragePooling1D()(backbone.output)
    classifier = keras.Model(backbone.input, keras.layers.Dense(3, "softmax")(pooled))
    classifier.compile("adam", "sparse_categorical_crossentropy")
    history = classifier.fit(rows(), np.array([0, 2]), epochs=2, verbose=0)
    assert history.history["loss"][1] < history.history["loss"][0]


def test_weights_saved_with_lora_are_those_of_a_model_without(tmp_path):
    backbone = GemmaBackbone(**GEMMA1)
    backbone.enable_lora(2)
    for holder in backbone.lora_layers.values():
        holder.lora_kernel_b.assign(np.ones(holder.lora_kernel_b.shape))
    backbone.save_weights(tmp_path / "merged.weights.h5")
    plain = GemmaBackbone(**GEMMA1, seed=5)
    plain.load_weights(tmp_path / "merged.weights.h5")
    np.testing.assert_allclose(plain(rows()), backbone(rows()), atol=1e-5)
    # Loaded into a model with LoRA, the addition begins anew.
    backbone.load_weights(tmp_path / "merged.weights.h5")
    np.testing.assert_allclose(backbone(rows()), plain(rows()), atol=1e-5)


def test_random_weights_have_the_spread_of_keras_hub_and_draws_of_their_own():
    sizes = {**GEMMA1, "vocabulary_size": 3000, "hidden_dim": 64, "head_dim": 16}
    weights = GemmaBackbone(**sizes).gemma_weights
    assert np.std(weights.embeddings) == pytest.approx(3000**-0.5, rel=0.02)
    key, value = np.asarray(weights.blocks[0].key), np.asarray(weights.blocks[0].value)
    limit = (6 / (64 + 16)) ** 0.5
    assert np.abs(key).max() == pytest.approx(limit, rel=0.01)
    assert abs(np.corrcoef(key.ravel(), value.ravel())[0, 1]) < 0.1
    other = GemmaBackbone(**sizes, seed=1).gemma_weights
    assert not np.array_equal(other.blocks[0].key, key)


@pytest.mark.parametrize("name", BUILTIN_PRESETS)
def test_every_published_name_has_its_parameters_without_a_file(name):
    """Shapes alone: nothing is allocated."""
    counted = []

    def build():
        task = CausalLM.from_preset(name, load_weights=False, dtype="bfloat16")
        counted.append(task.count_params())

    jax.eval_shape(build)
    assert counted == [BUILTIN_PRESETS[name].num_parameters]


def test_the_names_of_the_page_are_listed():
    assert len(CausalLM.presets) == 33
    assert {"gemma_2b_en", "shieldgemma_27b_en", "gemma3_270m"} <= GemmaCausalLM.presets.keys()


def test_arguments_replace_those_of_the_preset_without_weights():
    small = GemmaCausalLM.from_preset("gemma_2b_en", load_weights=False, num_layers=1, hidden_dim=8)
    assert len(small.backbone.transformer_layers) == 1
    assert small.backbone.config.hidden_dim == 8
    with pytest.raises(ValueError, match="num_layers cannot differ"):
        GemmaCausalLM.from_preset("tiny", num_layers=1)


@pytest.fixture
def written(tmp_path):
    """gemma2_tiny, saved by us after LoRA was enabled and changed."""
    task = GemmaCausalLM.from_preset(str(goldens.preset_directory("gemma2_tiny")))
    task.backbone.enable_lora(2)
    for holder in task.backbone.lora_layers.values():
        holder.lora_kernel_b.assign(np.full(holder.lora_kernel_b.shape, 0.01))
    task.preprocessor.sequence_length = 12
    task.save_to_preset(tmp_path / "saved", max_shard_size=0.0001)
    return task, tmp_path / "saved"


def test_what_is_saved_loads_to_equal_logits(written):
    task, directory = written
    assert (directory / "model.weights.json").exists()
    again = CausalLM.from_preset(str(directory))
    assert type(again) is GemmaCausalLM
    assert type(again.backbone) is GemmaBackbone
    assert again.preprocessor.sequence_length == 12
    np.testing.assert_array_equal(again(rows()), task(rows()))
    assert again.generate("The keeper") == task.generate("The keeper")
    tokenizer = GemmaTokenizer.from_preset(str(directory))
    assert tokenizer.get_vocabulary() == task.preprocessor.tokenizer.get_vocabulary()
    preprocessor = GemmaCausalLMPreprocessor.from_preset(str(directory), add_end_token=False)
    assert (preprocessor.sequence_length, preprocessor.add_end_token) == (12, False)
    with pytest.raises(PresetError, match="exists already"):
        task.save_to_preset(directory)


def test_a_hugging_face_export_loads_to_equal_logits(written, tmp_path):
    task, _ = written
    task.export_to_transformers(tmp_path / "hf")
    again = GemmaCausalLM.from_preset(str(tmp_path / "hf"))
    np.testing.assert_array_equal(again(rows()), task(rows()))


def test_a_half_precision_model_is_saved_in_half_precision(tmp_path):
    task = GemmaCausalLM.from_preset("tiny", dtype="bfloat16")
    task.save_to_preset(tmp_path / "half", max_shard_size=None)
    whole = (goldens.preset_directory("gemma3_tiny") / "model.weights.h5").stat().st_size
    assert (tmp_path / "half" / "model.weights.h5").stat().st_size < 0.8 * whole
    again = GemmaCausalLM.from_preset(str(tmp_path / "half"), dtype="bfloat16")
    np.testing.assert_array_equal(again(rows()), task(rows()))


def test_a_backbone_alone_is_saved_and_loaded(tmp_path):
    backbone = KerasBackbone.from_preset("tiny")
    assert type(backbone) is Gemma3Backbone
    backbone.save_to_preset(tmp_path / "backbone")
    again = Gemma3Backbone.from_preset(str(tmp_path / "backbone"))
    np.testing.assert_array_equal(again(rows()), backbone(rows()))
    task = GemmaCausalLM.from_preset(str(tmp_path / "backbone"))
    assert task.preprocessor is None
    with pytest.raises(PresetFileMissing, match="has no tokenizer"):
        GemmaTokenizer.from_preset(str(tmp_path / "backbone"))
    with pytest.raises(ValueError, match="has a tokenizer; this model has none"):
        task.export_to_transformers(tmp_path / "hf")


def test_lora_files_go_through_the_backbone(tmp_path):
    name = "gemma1_tiny"
    backbone = GemmaBackbone.from_preset(str(goldens.preset_directory(name)))
    backbone.load_lora_weights(goldens.directory(name) / "lora5.lora.h5")
    backbone.save_lora_weights(tmp_path / "again.lora.h5")
    other = GemmaBackbone.from_preset(str(goldens.preset_directory(name)))
    other.load_lora_weights(tmp_path / "again.lora.h5")
    np.testing.assert_array_equal(other(rows()), backbone(rows()))


def test_another_class_than_the_preset_is_refused_by_name():
    with pytest.raises(ValueError, match="of Gemma3Backbone, not of GemmaBackbone"):
        GemmaBackbone.from_preset("tiny")


@pytest.mark.parametrize(
    ("preset", "error", "message"),
    [
        ("bert_base_en", PresetNotFound, "no preset 'bert_base_en'"),
        ("snaggle://a/b", PresetError, "snaggle"),
    ],
)
def test_a_preset_that_cannot_be_is_refused(preset, error, message):
    with pytest.raises(error, match=message):
        CausalLM.from_preset(preset)


def test_a_class_in_place_of_a_name_is_refused():
    with pytest.raises(ValueError, match="must be a string, got type"):
        open_source(GemmaCausalLM, load_weights=True)


def test_a_preset_of_any_kind_is_read_in_this_process(tmp_path):
    directory = goldens.directory("gemma2_tiny") / "hf"
    from_hf = GemmaCausalLM.from_preset(str(directory))
    from_keras = GemmaCausalLM.from_preset(str(goldens.preset_directory("gemma2_tiny")))
    np.testing.assert_array_equal(from_hf(rows()), from_keras(rows()))
    assert from_hf.preprocessor.sequence_length == 1024
    assert from_keras.preprocessor.sequence_length == 24


def test_the_lora_tutorial_runs():
    """Load, generate, enable LoRA, AdamW without decay on norms, one epoch, generate again."""
    task = GemmaCausalLM.from_preset(str(goldens.preset_directory("gemma1_tiny")))
    prompt = "Instruction:\nWhat is it?\n\nResponse:\n"
    before = task.generate(prompt, max_length=48)
    assert before.startswith(prompt)
    task.backbone.enable_lora(rank=4)
    assert len(task.trainable_weights) == 2 * 2 * 2
    task.preprocessor.sequence_length = 64
    optimizer = keras.optimizers.AdamW(learning_rate=5e-2, weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    task.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=optimizer,
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    data = [f"Instruction:\nWhat is {n}?\n\nResponse:\nthe boat" for n in range(24)]
    history = task.fit(data, epochs=1, batch_size=1, verbose=0)
    assert isinstance(history, keras.callbacks.History)
    task.compile(sampler="greedy")
    after = task.generate(prompt, max_length=48)
    assert after != before
    trained = Backbone.gemma_weights.fget(task.backbone)
    assert np.isfinite(np.asarray(trained.blocks[0].query)).all()
