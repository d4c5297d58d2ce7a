"""GGUF presets: files that are right come back exactly, files of another model are refused."""

import os
import random
import struct
from dataclasses import replace

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from model.config import Family
from model.errors import PresetFileInvalid, UnsupportedPreset
from model.presets.gguf_file import GgufPreset
from model.presets.gguf_header import TensorType
from model.weight_names import weight_specs
from tests.gguf_files import CONFIG, Tensor, random_arrays, refusal_of, tiny_file


@pytest.mark.parametrize("version", [2, 3])
def test_float32_weights_come_back_exactly_in_the_order_of_the_specs(tmp_path, version):
    file = tiny_file()
    file.version = version
    preset = GgufPreset.open(file.write(tmp_path / "tiny.gguf"))
    arrays = list(preset.arrays())
    assert [name for name, _ in arrays] == [spec.name for spec in weight_specs(CONFIG)]
    for name, array in arrays:
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, random_arrays(CONFIG)[name], strict=True)


def test_the_config_is_that_of_the_metadata(tmp_path):
    preset = GgufPreset.open(tiny_file().write(tmp_path / "tiny.gguf"))
    assert preset.config == CONFIG
    assert preset.source_files == (tmp_path / "tiny.gguf",)


def test_tensors_may_be_stored_in_any_order(tmp_path):
    file = tiny_file()
    random.Random(3).shuffle(file.tensors)
    preset = GgufPreset.open(file.write(tmp_path / "tiny.gguf"))
    for name, array in preset.arrays():
        np.testing.assert_array_equal(array, random_arrays(CONFIG)[name])


def test_q8_0_values_are_at_most_half_a_step_off(tmp_path):
    preset = GgufPreset.open(tiny_file(TensorType.Q8_0).write(tmp_path / "tiny.gguf"))
    for name, array in preset.arrays():
        expected = random_arrays(CONFIG)[name]
        blocks = expected.reshape(-1, 32)
        # The step is a block's largest value / 127, itself rounded to float16 (11 bits).
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127 * (1 + 2**-11)
        tolerance = step / 2 + 127 * step * 2**-11
        assert (np.abs(array.reshape(-1, 32) - blocks) <= tolerance).all(), name


@pytest.mark.parametrize(
    "kernel_type", [TensorType.F16, TensorType.BF16, TensorType.Q4_0, TensorType.Q5_1]
)
def test_other_types_are_decoded_as_the_gguf_package_decodes_them(tmp_path, kernel_type):
    preset = GgufPreset.open(tiny_file(kernel_type).write(tmp_path / "tiny.gguf"))
    ggml_type = GGMLQuantizationType(kernel_type)
    for name, array in preset.arrays():
        if not name.endswith("/scale"):
            data = quantize(random_arrays(CONFIG)[name], ggml_type)
            np.testing.assert_array_equal(array, dequantize(data, ggml_type))


def test_a_large_tensor_is_put_together_from_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("model.presets.gguf_file._CHUNK_BYTES", 1_000)  # 7 rows of 128 bytes
    preset = GgufPreset.open(tiny_file().write(tmp_path / "tiny.gguf"))
    for name, array in preset.arrays():
        np.testing.assert_array_equal(array, random_arrays(CONFIG)[name])


@pytest.mark.parametrize("tensor_type", TensorType)
def test_block_sizes_are_those_of_the_gguf_package(tensor_type):
    expected = GGML_QUANT_SIZES[GGMLQuantizationType(tensor_type)]
    assert (tensor_type.block_values, tensor_type.block_bytes) == expected
    assert GGMLQuantizationType(tensor_type).name == tensor_type.name


def test_a_gemma_1_has_no_post_norms_and_no_window(tmp_path):
    config = replace(
        CONFIG,
        family=Family.GEMMA,
        use_post_attention_norm=False,
        use_post_ffw_norm=False,
        use_query_key_norm=False,
        sliding_window_tokens=None,
        global_layer_period=1,
        global_rope_theta=10_000.0,
        global_rope_scale=1.0,
    )
    file = tiny_file(config=config)
    # Files of the first months lack these.
    for key in ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor"):
        del file.metadata[f"gemma.{key}"]
    preset = GgufPreset.open(file.write(tmp_path / "tiny.gguf"))
    assert preset.config == config
    for name, array in preset.arrays():
        np.testing.assert_array_equal(array, random_arrays(config)[name])


@pytest.mark.parametrize(
    ("stored", "caps"), [({}, (50.0, 30.0)), ({"attn": 20.0, "final": 10.0}, (20.0, 10.0))]
)
def test_a_gemma_2_has_soft_caps_and_a_period_of_two(tmp_path, stored, caps):
    config = replace(
        CONFIG,
        family=Family.GEMMA2,
        use_query_key_norm=False,
        attention_soft_cap=caps[0],
        final_soft_cap=caps[1],
        global_layer_period=2,
        global_rope_theta=10_000.0,
        global_rope_scale=1.0,
    )
    file = tiny_file(config=config)
    for kind, cap in stored.items():
        file.metadata[f"gemma2.{kind}_logit_softcapping"] = cap
    assert GgufPreset.open(file.write(tmp_path / "tiny.gguf")).config == config


def test_a_link_to_a_file_is_followed(tmp_path):
    tiny_file().write(tmp_path / "blob")
    (tmp_path / "tiny.gguf").symlink_to("blob")
    assert GgufPreset.open(tmp_path / "tiny.gguf").config == CONFIG


@pytest.mark.parametrize(
    ("key", "value", "error", "expected"),
    [
        ("general.architecture", "llama", UnsupportedPreset, "'llama'"),
        ("general.architecture", 3, PresetFileInvalid, "general.architecture"),
        ("split.count", 2, UnsupportedPreset, "several parts"),
        ("split.count", [1, 2], PresetFileInvalid, "split.count"),
        ("gemma3.block_count", 10**9, PresetFileInvalid, "num_layers"),
        ("gemma3.block_count", 3, PresetFileInvalid, "blk.2.attn_norm.weight"),
        ("gemma3.block_count", 1, PresetFileInvalid, "blk.1."),
        ("gemma3.block_count", 2.0, PresetFileInvalid, "gemma3.block_count"),
        ("gemma3.embedding_length", True, PresetFileInvalid, "gemma3.embedding_length"),
        ("gemma3.embedding_length", 64, PresetFileInvalid, "token_embd.weight"),
        ("gemma3.attention.head_count_kv", [1, 1], PresetFileInvalid, "head_count_kv"),
        ("gemma3.attention.head_count", 3, PresetFileInvalid, "attn_q.weight"),
        ("gemma3.attention.value_length", 16, UnsupportedPreset, "value_length"),
        ("gemma3.attention.sliding_window", 0, PresetFileInvalid, "sliding_window_tokens"),
        ("gemma3.attention.sliding_window_pattern", 5, UnsupportedPreset, "pattern"),
        ("gemma3.attention.sliding_window_pattern", [True, False], UnsupportedPreset, "pattern"),
        ("gemma3.rope.scaling.type", "yarn", UnsupportedPreset, "yarn"),
        ("gemma3.rope.freq_base_swa", 20_000.0, UnsupportedPreset, "freq_base_swa"),
        ("gemma3.rope.freq_base", float("nan"), PresetFileInvalid, "global_rope_theta"),
        ("gemma3.rope.freq_base", struct.pack("<Id", 12, 1e300), PresetFileInvalid, "rope_theta"),
        ("gemma3.attention.layer_norm_rms_epsilon", "x", PresetFileInvalid, "epsilon"),
    ],
)
def test_metadata_that_describes_another_model_is_refused(tmp_path, key, value, error, expected):
    file = tiny_file()
    file.metadata[key] = value
    path = file.write(tmp_path / "bad.gguf")
    with pytest.raises(error, match=expected):
        GgufPreset.open(path)
    refusal_of(path)


@pytest.mark.parametrize("pattern", [6, [True, True]])
def test_the_usual_pattern_may_be_stated(tmp_path, pattern):
    file = tiny_file()
    file.metadata["gemma3.attention.sliding_window_pattern"] = pattern
    assert GgufPreset.open(file.write(tmp_path / "tiny.gguf")).config == CONFIG


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("output.weight", UnsupportedPreset),
        ("rope_freqs.weight", UnsupportedPreset),
        ("blk.0.attn_q.bias", PresetFileInvalid),
        ("blk.7.attn_q.weight", PresetFileInvalid),
    ],
)
def test_a_tensor_that_would_be_left_out_is_refused(tmp_path, name, error):
    file = tiny_file()
    file.tensors.append(Tensor(name, (8,), 0, bytes(32)))
    with pytest.raises(error, match=name):
        GgufPreset.open(file.write(tmp_path / "bad.gguf"))


@pytest.mark.parametrize("index", range(len(list(weight_specs(CONFIG)))))
def test_a_missing_tensor_is_named(tmp_path, index):
    file = tiny_file()
    name = file.tensors.pop(index).name
    assert f"'{name}' is missing" in refusal_of(file.write(tmp_path / "bad.gguf"))


def test_a_weight_that_is_not_finite_is_refused(tmp_path):
    file = tiny_file(TensorType.F16)
    tensor = file.tensors[3]
    tensor.data = np.full(2, np.inf, np.float16).tobytes() + tensor.data[4:]
    preset = GgufPreset.open(file.write(tmp_path / "bad.gguf"))
    with pytest.raises(PresetFileInvalid, match=tensor.name):
        list(preset.arrays())


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path):
    path = tiny_file().write(tmp_path / "tiny.gguf")
    preset = GgufPreset.open(path)
    os.truncate(path, path.stat().st_size - 1_000)
    with pytest.raises(PresetFileInvalid, match="became shorter"):
        list(preset.arrays())
