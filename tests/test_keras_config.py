"""config.json of Keras presets: what it means, and what is refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from model.config import Family
from model.errors import PresetFileInvalid, UnsupportedPreset
from model.presets.keras_config import read_config

GOLDENS = Path(__file__).parent / "goldens"
GEMMA1 = GOLDENS / "gemma1_tiny" / "preset"
GEMMA2 = GOLDENS / "gemma2_tiny" / "preset"
GEMMA3 = Path(__file__).parents[1] / "model" / "presets" / "tiny"


@pytest.fixture
def preset(tmp_path):
    shutil.copy(GEMMA1 / "config.json", tmp_path)
    return tmp_path


def edit_config(preset, **changes):
    path = preset / "config.json"
    document = json.loads(path.read_text())
    document["config"] |= changes
    path.write_text(json.dumps(document))
    return path


def test_the_three_families_are_told_apart():
    families = [read_config(d / "config.json").family for d in (GEMMA1, GEMMA2, GEMMA3)]
    assert families == [Family.GEMMA, Family.GEMMA2, Family.GEMMA3]


def test_only_the_older_backbone_halves_intermediate_dim():
    assert read_config(GEMMA1 / "config.json").feed_forward_dim == 80  # 160 in the file
    assert read_config(GEMMA3 / "config.json").feed_forward_dim == 64  # 64 in the file


def test_gemma2_windows_are_local_in_even_layers(preset):
    path = edit_config(preset, use_sliding_window_attention=True, sliding_window_size=7)
    config = read_config(path)
    assert config.sliding_window_tokens == 7
    assert [config.is_local(layer) for layer in range(4)] == [True, False, True, False]


def test_gemma3_windows_are_local_in_five_layers_of_six():
    config = read_config(GEMMA3 / "config.json")
    assert [layer for layer in range(14) if not config.is_local(layer)] == [5, 11]
    assert (config.global_rope_theta, config.global_rope_scale) == (1e6, 8.0)


def test_the_epsilon_of_the_config_reaches_the_final_norm_only(preset):
    config = read_config(edit_config(preset, layer_norm_epsilon=1e-3))
    assert (config.norm_epsilon, config.final_norm_epsilon) == (1e-6, 1e-3)


def test_missing_newer_keys_have_the_defaults_of_keras_hub(preset):
    path = preset / "config.json"
    document = json.loads(path.read_text())
    before = read_config(path)
    required = ("vocabulary_size", "num_layers", "num_query_heads", "num_key_value_heads")
    required += ("hidden_dim", "intermediate_dim", "head_dim")
    document["config"] = {key: document["config"][key] for key in required}
    document["registered_name"] = "keras_nlp>GemmaBackbone"
    document["module"] = "os"
    path.write_text(json.dumps(document))
    assert read_config(path) == before


def test_an_unknown_key_is_logged_and_changes_nothing(preset, caplog):
    before = read_config(preset / "config.json")
    with caplog.at_level(logging.WARNING):
        after = read_config(edit_config(preset, use_new_thing=True))
    assert after == before
    assert "use_new_thing" in caplog.text


# --- configs that are refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "changes", "error", "words"),
    [
        (GEMMA1, {"num_layers": 10**9}, PresetFileInvalid, "num_layers"),
        (GEMMA1, {"vocabulary_size": 10**12}, PresetFileInvalid, "vocabulary_size"),
        (GEMMA1, {"hidden_dim": -1}, PresetFileInvalid, "hidden_dim"),
        (GEMMA1, {"hidden_dim": 32.0}, PresetFileInvalid, "hidden_dim"),
        (GEMMA1, {"hidden_dim": True}, PresetFileInvalid, "hidden_dim"),
        (GEMMA1, {"head_dim": None}, PresetFileInvalid, "head_dim"),
        (GEMMA1, {"num_key_value_heads": 3}, PresetFileInvalid, "num_key_value_heads"),
        (GEMMA1, {"layer_norm_epsilon": 10**400}, PresetFileInvalid, "layer_norm_epsilon"),
        (GEMMA1, {"use_post_ffw_norm": 1}, PresetFileInvalid, "use_post_ffw_norm"),
        (GEMMA1, {"dtype": "int8_from_float32"}, UnsupportedPreset, "quantised"),
        (GEMMA1, {"dtype": {"class_name": "DTypePolicyMap"}}, PresetFileInvalid, "DTypePolicyMap"),
        (GEMMA1, {"dtype": ["float32"]}, UnsupportedPreset, "quantised"),
        (GEMMA3, {"vision_encoder": {"class_name": "X"}}, UnsupportedPreset, "gemma3_4b_text"),
        (GEMMA3, {"use_bidirectional_attention": True}, UnsupportedPreset, "causal"),
        (GEMMA3, {"is_embedding_model": True}, UnsupportedPreset, "causal"),
        (GEMMA3, {"local_rope_scaling_factor": 2.0}, UnsupportedPreset, "local_rope"),
    ],
)
def test_a_config_that_is_not_served_is_refused_with_its_reason(
    tmp_path, base, changes, error, words
):
    shutil.copy(base / "config.json", tmp_path)
    with pytest.raises(error, match=words) as caught:
        read_config(edit_config(tmp_path, **changes))
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", PresetFileInvalid, "JSON"),
        ("[]", PresetFileInvalid, "one JSON object"),
        ('{"a": 1, "a": 2}', PresetFileInvalid, "twice"),
        ('{"a": NaN}', PresetFileInvalid, "NaN"),
        ("[" * 100_000, PresetFileInvalid, "JSON"),
        (" " * (1 << 20) + "{}", PresetFileInvalid, "larger than"),
        ('{"a": ' + "9" * 5_000 + "}", PresetFileInvalid, "JSON"),
        ('{"registered_name": "keras_hub>GemmaBackbone"}', PresetFileInvalid, '"config"'),
        ('{"registered_name": "Functional", "config": {}}', UnsupportedPreset, "Functional"),
        (
            '{"registered_name": "keras_hub>PaliGemmaBackbone", "config": {}}',
            UnsupportedPreset,
            "'keras_hub>PaliGemmaBackbone'; only .* served. Use a text preset .* gemma3_1b",
        ),
        ('{"registered_name": ["Lambda"], "config": {}}', UnsupportedPreset, "Lambda"),
        ('{"model_type": "gemma2"}', UnsupportedPreset, "Hugging Face.*not to a Keras preset"),
    ],
)
def test_a_file_that_is_no_keras_config_is_refused(tmp_path, text, error, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(error, match=words) as caught:
        read_config(path)
    assert "config.json" in str(caught.value)
