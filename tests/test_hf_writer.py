"""Hugging Face directories as they are written: nothing lost, and whole or not there."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from model.errors import PresetError, PresetFileInvalid, UnsupportedPreset
from model.presets.hf_directory import HuggingFacePreset
from model.presets.hf_writer import write_hugging_face
from model.presets.keras_directory import KerasPreset
from tests.goldens import TINY_PRESETS, preset_directory


def golden(name):
    return KerasPreset.open(preset_directory(name))


def write(directory, name, *, config=None, proto=None, **options):
    preset = golden(name)
    write_hugging_face(
        directory,
        config or preset.config,
        preset.arrays(),
        preset.tokenizer_proto() if proto is None else proto,
        **options,
    )
    return directory


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 100_000])
@pytest.mark.parametrize("name", TINY_PRESETS)
def test_what_is_written_reads_back_bit_for_bit(tmp_path, name, max_shard_bytes):
    written = HuggingFacePreset.open(write(tmp_path / "new", name, max_shard_bytes=max_shard_bytes))
    expected = golden(name)
    assert written.config == expected.config
    assert written.tokenizer_proto() == expected.tokenizer_proto()
    for (found, array), (other, original) in zip(written.arrays(), expected.arrays(), strict=True):
        assert found == other
        np.testing.assert_array_equal(array.view(np.uint32), original.view(np.uint32))


def test_the_safetensors_library_reads_the_file_and_the_golden_tensors_in_it(tmp_path):
    hf = preset_directory("gemma1_tiny").parent / "hf"
    found = load_file(write(tmp_path / "new", "gemma1_tiny") / "model.safetensors")
    expected = load_file(hf / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])
def test_config_json_says_what_the_golden_one_says(tmp_path, name):
    expected = json.loads((preset_directory(name).parent / "hf" / "config.json").read_text())
    found = json.loads((write(tmp_path / "new", name) / "config.json").read_text())
    differing = {key for key, value in expected.items() if found.get(key) != value}
    # The Keras preset of Gemma 2 was saved without windows, so there is one that hides nothing.
    assert differing == ({"sliding_window"} if name == "gemma2_tiny" else set())


def test_gemma3_says_which_layers_are_local_and_how_positions_are_scaled(tmp_path):
    document = json.loads((write(tmp_path / "new", "gemma3_tiny") / "config.json").read_text())
    assert document["architectures"] == ["Gemma3ForCausalLM"]
    assert document["model_type"] == "gemma3_text"
    assert [t == "full_attention" for t in document["layer_types"]] == [False] * 5 + [True, False]
    assert document["sliding_window"] == 4
    assert (document["rope_theta"], document["rope_local_base_freq"]) == (1e6, 1e4)
    assert document["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert document["query_pre_attn_scalar"] == 16


def test_bfloat16_rounds_once_and_halves_the_file(tmp_path):
    wide = write(tmp_path / "wide", "gemma1_tiny")
    narrow = write(tmp_path / "narrow", "gemma1_tiny", dtype="bfloat16")
    assert json.loads((narrow / "config.json").read_text())["torch_dtype"] == "bfloat16"
    full = dict(HuggingFacePreset.open(wide).arrays())
    for name, array in HuggingFacePreset.open(narrow).arrays():
        rounded = full[name].astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(array, rounded)
    wide_bytes, narrow_bytes = (
        (directory / "model.safetensors").stat().st_size for directory in (wide, narrow)
    )
    assert narrow_bytes < 0.52 * wide_bytes


def test_shards_stay_below_the_limit_and_the_index_names_every_tensor(tmp_path):
    directory = write(tmp_path / "new", "gemma2_tiny", max_shard_bytes=100_000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    sizes = [sum(t.nbytes for t in load_file(directory / name).values()) for name in shards]
    assert max(sizes) <= 100_000
    assert sum(sizes) == index["metadata"]["total_size"] == 4 * 94_320
    for shard in shards:
        for tensor in load_file(directory / shard):
            assert index["weight_map"][tensor] == shard


def test_the_tokenizer_config_names_pieces_that_exist(tmp_path):
    document = json.loads(
        (write(tmp_path / "new", "gemma3_tiny") / "tokenizer_config.json").read_text()
    )
    assert document["tokenizer_class"] == "GemmaTokenizer"
    assert (document["bos_token"], document["eos_token"]) == ("<bos>", "<eos>")
    assert document["additional_special_tokens"] == ["<start_of_turn>", "<end_of_turn>"]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma1_tiny", {"final_soft_cap": 30.0}, r"cannot express final_soft_cap 30\.0"),
        ("gemma1_tiny", {"sliding_window_tokens": 8}, "sliding_window_tokens 8"),
        ("gemma2_tiny", {"final_norm_epsilon": 1e-3}, r"final_norm_epsilon 0\.001"),
        ("gemma2_tiny", {"use_post_ffw_norm": False}, "use_post_ffw_norm False"),
        ("gemma3_tiny", {"use_query_key_norm": False}, "use_query_key_norm False"),
    ],
)
def test_a_config_that_would_lose_something_is_refused(tmp_path, name, changes, words):
    config = dataclasses.replace(golden(name).config, **changes)
    with pytest.raises(UnsupportedPreset, match=words):
        write(tmp_path / "new", name, config=config)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_exists_is_left_alone(tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(PresetError, match="exists already"):
        write(tmp_path / "new", "gemma1_tiny")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_failure_half_way_leaves_nothing(tmp_path):
    preset = golden("gemma1_tiny")

    def some_arrays():
        arrays = preset.arrays()
        yield next(arrays)
        raise OSError(28, "No space left on device")

    with pytest.raises(PresetError, match="No space left"):
        write_hugging_face(tmp_path / "new", preset.config, some_arrays(), preset.tokenizer_proto())
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PresetError, match="cannot be written: "):
        write(tmp_path / "file" / "new", "gemma1_tiny")


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    with pytest.raises(PresetFileInvalid, match="not a SentencePiece model"):
        write(tmp_path / "new", "gemma1_tiny", proto=b"\xff" * 50)
