"""Hugging Face directories: what is read from them, and what is refused before it is read."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.errors import PresetError, PresetFileInvalid, PresetFileMissing, UnsupportedPreset
from model.gemma.forward import forward
from model.gemma.weights import assemble
from model.presets.hf_directory import HuggingFacePreset
from model.presets.hf_writer import write_hugging_face
from model.presets.keras_directory import KerasPreset
from model.presets.keras_writer import write_keras_preset
from model.presets.resolve import open_preset
from model.weight_names import weight_specs
from tests.goldens import preset_directory
from tests.hf_directories import (
    GEMMA1,
    GEMMA2,
    GEMMA3_CONFIG,
    edit_config,
    gemma3_tensors,
    write_gemma3,
)

QUERY = "model.layers.1.self_attn.q_proj.weight"

compiled_forward = jax.jit(forward, static_argnums=0)


def edit_tensors(directory, **changes):
    path = directory / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, path)
    return directory


def assert_same_arrays(preset, golden):
    expected = list(KerasPreset.open(preset_directory(golden)).arrays())
    found = list(preset.arrays())
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, array), (_, other) in zip(found, expected, strict=True):
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, other, err_msg=name)


def tokenizer_of(preset):
    proto = preset.tokenizer_proto()
    assert proto is not None
    return proto


def written(directory, config, arrays):
    proto = (preset_directory("gemma2_tiny") / "assets/tokenizer/vocabulary.spm").read_bytes()
    write_hugging_face(directory, config, arrays.items(), proto)
    return directory


def logits(preset):
    arrays = {name: jnp.asarray(array) for name, array in preset.arrays()}
    token_ids = jnp.asarray([[2, 302, 332, 447, 41, 97, 5, 180]], jnp.int32)
    weights = assemble(preset.config, arrays)
    return compiled_forward(preset.config, weights, token_ids, jnp.ones((1, 8), bool)).logits


@pytest.fixture
def gemma1(tmp_path):
    return Path(shutil.copytree(GEMMA1, tmp_path / "gemma1"))


@pytest.fixture
def gemma2(tmp_path):
    return Path(shutil.copytree(GEMMA2, tmp_path / "gemma2"))


@pytest.fixture
def gemma3(tmp_path):
    return write_gemma3(tmp_path / "gemma3")


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("directory", "golden"), [(GEMMA1, "gemma1_tiny"), (GEMMA2, "gemma2_tiny")]
)
def test_the_golden_directories_hold_the_arrays_and_tokenizer_of_the_keras_presets(
    directory, golden
):
    preset = HuggingFacePreset.open(directory)
    assert_same_arrays(preset, golden)
    assert preset.tokenizer_proto() == KerasPreset.open(preset_directory(golden)).tokenizer_proto()


def test_the_golden_configs_are_those_of_the_keras_presets():
    gemma1, gemma2 = (HuggingFacePreset.open(directory).config for directory in (GEMMA1, GEMMA2))
    assert gemma1 == KerasPreset.open(preset_directory("gemma1_tiny")).config
    # The Keras preset was saved without windows, the Hugging Face one always has them.
    assert (gemma2.sliding_window_tokens, gemma2.global_layer_period) == (4096, 2)
    assert replace(gemma2, sliding_window_tokens=None, global_layer_period=1) == (
        KerasPreset.open(preset_directory("gemma2_tiny")).config
    )


def test_gemma3_text_reads_as_the_keras_preset_that_it_was_written_from(gemma3):
    preset = HuggingFacePreset.open(gemma3)
    assert preset.config == KerasPreset.open(preset_directory("gemma3_tiny")).config
    assert_same_arrays(preset, "gemma3_tiny")


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "language_model.model."])
def test_a_nested_text_config_and_every_prefix_are_understood(tmp_path, prefix):
    directory = write_gemma3(
        tmp_path / "nested",
        gemma3_tensors(prefix),
        model_type="gemma3",
        text_config=GEMMA3_CONFIG,
        vision_config=None,
    )
    assert_same_arrays(HuggingFacePreset.open(directory), "gemma3_tiny")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_floats_load_as_the_same_numbers_in_float32(gemma1, dtype):
    full = dict(HuggingFacePreset.open(gemma1).arrays())
    path = gemma1 / "model.safetensors"
    save_file({name: tensor.astype(dtype) for name, tensor in load_file(path).items()}, path)
    for name, array in HuggingFacePreset.open(gemma1).arrays():
        np.testing.assert_array_equal(array, full[name].astype(dtype).astype(np.float32))


def test_a_stored_copy_of_the_embeddings_as_head_is_not_read(gemma1):
    edit_tensors(gemma1, **{"lm_head.weight": np.ones((512, 32), np.float32)})
    assert_same_arrays(HuggingFacePreset.open(gemma1), "gemma1_tiny")


@pytest.mark.parametrize("directory", [GEMMA1, GEMMA2])
def test_a_preset_is_opened_by_the_path_of_its_directory(directory, tmp_path):
    preset = open_preset(str(directory), tmp_path / "cache")
    assert [name for name, _ in preset.arrays()] == [s.name for s in weight_specs(preset.config)]


@pytest.mark.parametrize("golden", ["gemma2_tiny", "gemma3_tiny"])
def test_a_query_scalar_of_nine_is_queries_made_four_thirds_as_long(tmp_path, golden):
    """head_dim is 16: 1/√9 is 4/3 of 1/√16, and attention is linear in the queries."""
    preset = KerasPreset.open(preset_directory(golden))
    arrays = dict(preset.arrays())
    longer = {}
    for name, array in arrays.items():
        if name.endswith("/attention/query/kernel") and not preset.config.use_query_key_norm:
            longer[name] = array * np.float32(4 / 3)
        elif name.endswith("/query_norm/scale"):
            longer[name] = (1 + array) * np.float32(4 / 3) - 1
        else:
            longer[name] = array
    edit_config(
        written(tmp_path / "nine", preset.config, arrays),
        query_pre_attn_scalar=9,
    )
    nine = HuggingFacePreset.open(tmp_path / "nine")
    sixteen = HuggingFacePreset.open(written(tmp_path / "sixteen", preset.config, longer))
    assert (nine.config.query_scale, sixteen.config.query_scale) == (1 / 3, 1 / 4)
    expected = logits(sixteen)
    np.testing.assert_allclose(logits(nine), expected, atol=2e-4, rtol=0)
    assert np.abs(logits(preset) - expected).max() > 0.1


def test_another_query_scalar_is_written_to_hugging_face_and_refused_by_keras(tmp_path):
    preset = KerasPreset.open(preset_directory("gemma2_tiny"))
    config = replace(preset.config, query_pre_attention_scalar=144.0)
    directory = written(tmp_path / "hf", config, dict(preset.arrays()))
    assert HuggingFacePreset.open(directory).config.query_pre_attention_scalar == 144.0
    with pytest.raises(
        UnsupportedPreset, match=r"cannot express query_pre_attention_scalar 144\.0"
    ):
        write_keras_preset(tmp_path / "keras", config, preset.arrays(), tokenizer_of(preset))


# --- weights that are refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({QUERY: None}, f"{QUERY} is missing"),
        ({"model.embed_tokens.weight": None}, "embed_tokens.weight is missing"),
        ({"model.layers.2.input_layernorm.weight": np.ones(32, np.float32)}, "does not belong"),
        ({"score.weight": np.ones((2, 32), np.float32)}, "score.weight.*does not belong"),
        ({"lm_head.weight": np.ones((511, 32), np.float32)}, "lm_head.weight has shape"),
        ({QUERY: np.ones((32, 64), np.float32)}, f"{QUERY} has shape"),
        ({QUERY: np.ones((64, 32), np.float64)}, f"{QUERY} has dtype 'F64'"),
        ({QUERY: np.ones((64, 32), np.int8)}, f"{QUERY} has dtype 'I8'"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(gemma1, changes, words):
    edit_tensors(gemma1, **changes)
    with pytest.raises(PresetFileInvalid, match=words) as caught:
        next(HuggingFacePreset.open(gemma1).arrays())
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 7, 8, 500, 3_000, 100_000, 170_000])
def test_a_truncated_weights_file_is_refused(gemma1, length):
    os.truncate(gemma1 / "model.safetensors", length)
    with pytest.raises(PresetFileInvalid, match=r"model\.safetensors"):
        list(HuggingFacePreset.open(gemma1).arrays())


def test_a_file_that_shrinks_while_it_is_read_is_refused(gemma1):
    arrays = HuggingFacePreset.open(gemma1).arrays()
    next(arrays)
    os.truncate(gemma1 / "model.safetensors", 80_000)
    with pytest.raises(PresetFileInvalid, match="became shorter"):
        list(arrays)


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bytes_are_refused_or_read_in_the_right_shapes(gemma1, seed):
    path = gemma1 / "model.safetensors"
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(seed)
    # Half of them in the header, where they matter.
    for offset in [*generator.integers(0, 2_000, 3), *generator.integers(0, len(content), 3)]:
        content[offset] ^= int(generator.integers(1, 256))
    path.write_bytes(content)
    reader = HuggingFacePreset.open(gemma1)
    try:
        outcome = [(name, array.shape) for name, array in reader.arrays()]
    except PresetError as error:
        outcome = str(error)
        assert "\n" not in outcome
    specs = [(spec.name, spec.shape) for spec in weight_specs(reader.config)]
    assert outcome == specs or "model.safetensors" in outcome


# --- directories that are refused ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_missing_file_is_named(gemma1, name):
    # Without any file of a tokenizer it would be a backbone alone.
    (gemma1 / "tokenizer_config.json").write_text("{}")
    (gemma1 / name).unlink()
    with pytest.raises(PresetFileMissing, match=name):
        HuggingFacePreset.open(gemma1)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_symbolic_link_is_refused_even_to_a_sound_file(gemma1, tmp_path, name):
    (gemma1 / name).rename(tmp_path / "elsewhere")
    (gemma1 / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PresetFileInvalid, match=f"{name}.*symbolic link"):
        HuggingFacePreset.open(gemma1)


@pytest.mark.parametrize(
    "shard",
    [
        "../a.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "x.bin",
        ".safetensors",
        "",
        None,
        [],
        3,
    ],
)
def test_a_shard_name_cannot_lead_out_of_the_directory(gemma2, shard):
    index = gemma2 / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(PresetFileInvalid, match="is not the name of a shard"):
        HuggingFacePreset.open(gemma2)


def test_a_missing_shard_is_named(gemma2):
    (gemma2 / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(PresetFileMissing, match="model-00002"):
        HuggingFacePreset.open(gemma2)


def test_a_tensor_in_two_shards_is_refused(gemma2):
    shutil.copy(gemma2 / "model-00001-of-00002.safetensors", gemma2 / "more.safetensors")
    index = gemma2 / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["more"] = "more.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(PresetFileInvalid, match=r"more\.safetensors.*also in model-00001"):
        next(HuggingFacePreset.open(gemma2).arrays())


def test_a_tokenizer_of_another_size_is_refused(gemma1):
    edit_config(gemma1, vocab_size=513)
    with pytest.raises(PresetFileInvalid, match=r"512 pieces.*513"):
        HuggingFacePreset.open(gemma1).tokenizer_proto()


def test_a_damaged_tokenizer_is_refused(gemma1):
    (gemma1 / "tokenizer.model").write_bytes(b"\xff" * 100)
    with pytest.raises(PresetFileInvalid, match=r"tokenizer\.model"):
        HuggingFacePreset.open(gemma1).tokenizer_proto()
