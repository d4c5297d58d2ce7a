"""config.json of Hugging Face directories: what it means, and what is refused."""

import logging
import shutil
from pathlib import Path

import pytest

from model.config import Family
from model.errors import PresetFileInvalid, UnsupportedPreset
from model.presets.hf_directory import HuggingFacePreset
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


# --- configs that are refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "changes", "error", "words"),
    [
        ("gemma1", {"model_type": "llama"}, UnsupportedPreset, "model_type is 'llama'"),
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
        (
            "gemma2",
            {"query_pre_attn_scalar": 144},
            UnsupportedPreset,
            "query_pre_attn_scalar is 14",
        ),
        ("gemma2", {"layer_types": ["full_attention"]}, UnsupportedPreset, "layer_types"),
        ("gemma2", {"layer_types": "sliding"}, UnsupportedPreset, "layer_types"),
        ("gemma2", {"sliding_window": 0}, PresetFileInvalid, "sliding_window"),
        ("gemma3", {"rope_local_base_freq": 5e5}, UnsupportedPreset, "rope_local_base_freq is 5"),
        ("gemma3", {"rope_scaling": {"rope_type": "yarn"}}, UnsupportedPreset, "yarn"),
        ("gemma3", {"rope_scaling": {"beta": 1}}, UnsupportedPreset, r"rope_scaling\.beta"),
        ("gemma3", {"rope_parameters": {"rope_theta": 3.0}}, UnsupportedPreset, "rope_parameters"),
        ("gemma3", {"sliding_window_pattern": 0}, PresetFileInvalid, "global_layer_period"),
        ("gemma3", {"vision_config": {}}, UnsupportedPreset, "vision_config"),
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
