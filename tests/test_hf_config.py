"""config.json of Hugging Face directories: what it means, and what is refused."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest

from model.config import Family
from model.errors import PresetFileInvalid, UnsupportedPreset
from model.presets.hf_config import read_config
from model.presets.hf_directory import HuggingFacePreset
from model.presets.table import BUILTIN_PRESETS
from model.weight_names import num_parameters
from tests.hf_directories import GEMMA1, GEMMA2, edit_config, write_gemma3


@pytest.fixture
def gemma1(tmp_path):
    return Path(shutil.copytree(GEMMA1, tmp_path / "gemma1"))


@pytest.fixture
def gemma2(tmp_path):
    return Path(shutil.copytree(GEMMA2, tmp_path / "gemma2"))


@pytest.fixture
def gemma3(tmp_path):
    return write_gemma3(tmp_path / "gemma3")


def test_a_nested_text_config_has_the_defaults_of_transformers(tmp_path):
    # As google/gemma-3-4b-it has it, less the vision part.
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    directory = write_gemma3(tmp_path / "nested", model_type="gemma3", text_config=text)
    config = HuggingFacePreset.open(directory).config
    assert (config.num_query_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.sliding_window_tokens, config.global_layer_period) == (1024, 6)
    assert (config.global_rope_theta, config.global_rope_scale) == (1e6, 8.0)
    assert (config.vocabulary_size, config.context_tokens) == (262_208, 131_072)


def test_rope_parameters_are_the_newer_spelling_of_the_same_facts(gemma3):
    before = HuggingFacePreset.open(gemma3).config
    edit_config(
        gemma3,
        rope_scaling=None,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000},
        },
        layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    )
    assert HuggingFacePreset.open(gemma3).config == before


@pytest.mark.parametrize("layer_types", [["full_attention"] * 7])
def test_layers_that_are_all_global_have_no_window(gemma3, layer_types):
    config = HuggingFacePreset.open(edit_config(gemma3, layer_types=layer_types)).config
    assert (config.sliding_window_tokens, config.global_layer_period) == (None, 1)


def test_gemma2_has_the_soft_caps_of_its_config(gemma2):
    config = HuggingFacePreset.open(edit_config(gemma2, attn_logit_softcapping=None)).config
    assert (config.attention_soft_cap, config.final_soft_cap) == (None, 30.0)
    assert config.family is Family.GEMMA2


def test_epsilon_and_context_reach_the_config(gemma1):
    edit_config(gemma1, rms_norm_eps=1e-5, max_position_embeddings=1234)
    config = HuggingFacePreset.open(gemma1).config
    assert (config.norm_epsilon, config.final_norm_epsilon) == (1e-5, 1e-5)
    assert config.context_tokens == 1234


def test_an_unknown_key_is_logged(gemma1, caplog):
    with caplog.at_level(logging.WARNING):
        HuggingFacePreset.open(edit_config(gemma1, new_thing=True))
    assert "new_thing" in caplog.text


# As google/gemma-2-27b, google/gemma-3-270m and google/gemma-3-1b-it publish them, less what has no
# effect on the logits.
GEMMA2_27B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
GEMMA3_270M = GEMMA3_1B | {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
}


@pytest.mark.parametrize(
    ("document", "num_known"),
    # The counts that keras-hub publishes (spec 5.1 and 9.1).
    [(GEMMA2_27B, 27_227_128_320), (GEMMA3_1B, 999_885_952), (GEMMA3_270M, 268_098_176)],
    ids=["gemma-2-27b", "gemma-3-1b", "gemma-3-270m"],
)
def test_published_configs_have_as_many_parameters_as_the_models(tmp_path, document, num_known):
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert num_parameters(read_config(tmp_path / "config.json")) == num_known


def test_queries_of_the_27b_model_are_scaled_by_its_own_number(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA2_27B))
    config = read_config(tmp_path / "config.json")
    assert config.query_pre_attention_scalar == 144
    assert config.query_scale == pytest.approx(1 / 12)


def test_a_number_equal_to_head_dim_is_the_default(gemma2):
    assert HuggingFacePreset.open(gemma2).config.query_pre_attention_scalar is None


def test_a_vision_model_as_published_is_refused_with_the_name_of_a_text_variant(tmp_path):
    """As google/gemma-3-4b-it has it."""
    document = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {"hidden_size": 2560, "model_type": "gemma3_text", "num_hidden_layers": 34},
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedPreset, match=r"Kaggle, such as gemma3_4b_text") as caught:
        read_config(tmp_path / "config.json")
    named = set(re.findall(r"gemma3_\w+", str(caught.value)))
    assert named == {"gemma3_4b_text", "gemma3_instruct_4b_text"}
    assert named <= BUILTIN_PRESETS.keys()


# --- configs that are refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "changes", "error", "words"),
    [
        ("gemma1", {"model_type": "llama"}, UnsupportedPreset, "'llama'; only gemma.*Use a text"),
        ("gemma1", {"model_type": "paligemma"}, UnsupportedPreset, "'paligemma'; only gemma"),
        ("gemma3", {"model_type": "gemma3n_text"}, UnsupportedPreset, "'gemma3n_text'; only gemma"),
        ("gemma1", {"model_type": ["gemma"]}, PresetFileInvalid, "model_type must be a text"),
        ("gemma1", {"hidden_size": None}, PresetFileInvalid, "hidden_size"),
        ("gemma1", {"hidden_size": 32.0}, PresetFileInvalid, "hidden_size"),
        ("gemma1", {"num_hidden_layers": 10**9}, PresetFileInvalid, "num_layers"),
        ("gemma1", {"num_key_value_heads": 3}, PresetFileInvalid, "num_key_value_heads"),
        ("gemma1", {"rms_norm_eps": "small"}, PresetFileInvalid, "rms_norm_eps"),
        ("gemma1", {"rope_theta": 500000.0}, UnsupportedPreset, r"rope_theta is 500000\.0"),
        ("gemma1", {"rope_scaling": {"type": "linear", "factor": 2}}, UnsupportedPreset, "factor"),
        ("gemma1", {"rope_scaling": [1]}, PresetFileInvalid, "rope_scaling"),
        ("gemma1", {"hidden_act": "relu"}, UnsupportedPreset, "hidden_act is 'relu'"),
        ("gemma1", {"hidden_activation": "gelu"}, UnsupportedPreset, "hidden_activation"),
        ("gemma1", {"attention_bias": True}, UnsupportedPreset, "attention_bias is True"),
        ("gemma1", {"tie_word_embeddings": False}, UnsupportedPreset, "tie_word_embeddings"),
        ("gemma1", {"quantization_config": {"bits": 4}}, UnsupportedPreset, "quantised"),
        ("gemma1", {"use_bidirectional_attention": True}, UnsupportedPreset, "bidirectional"),
        ("gemma2", {"query_pre_attn_scalar": 0}, PresetFileInvalid, "query_pre_attention_scalar"),
        ("gemma2", {"query_pre_attn_scalar": "x"}, PresetFileInvalid, "query_pre_attn_scalar must"),
        ("gemma2", {"layer_types": ["full_attention"]}, UnsupportedPreset, "layer_types"),
        ("gemma2", {"layer_types": "sliding"}, UnsupportedPreset, "layer_types"),
        ("gemma2", {"sliding_window": 0}, PresetFileInvalid, "sliding_window"),
        ("gemma3", {"rope_local_base_freq": 5e5}, UnsupportedPreset, "rope_local_base_freq is 5"),
        ("gemma3", {"rope_scaling": {"rope_type": "yarn"}}, UnsupportedPreset, "yarn"),
        ("gemma3", {"rope_scaling": {"beta": 1}}, UnsupportedPreset, r"rope_scaling\.beta"),
        ("gemma3", {"rope_parameters": {"rope_theta": 3.0}}, UnsupportedPreset, "rope_parameters"),
        ("gemma3", {"sliding_window_pattern": 0}, PresetFileInvalid, "global_layer_period"),
        ("gemma3", {"vision_config": {}}, UnsupportedPreset, "vision_config.*only text models"),
        ("gemma3", {"model_type": "gemma3"}, PresetFileInvalid, "text_config"),
        (
            "gemma3",
            {"model_type": "gemma3", "text_config": {}, "vision_config": {"hidden_size": 1}},
            UnsupportedPreset,
            "vision_config.*only text models",
        ),
    ],
)
def test_a_config_that_is_not_served_is_refused_with_its_reason(
    request, base, changes, error, words
):
    directory = edit_config(request.getfixturevalue(base), **changes)
    with pytest.raises(error, match=words) as caught:
        HuggingFacePreset.open(directory)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)
