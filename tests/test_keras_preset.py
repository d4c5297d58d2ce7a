"""Keras preset directories: what is read from them, and what is refused before it is read."""

import json
import os
import shutil
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from model.config import Family
from model.errors import PresetError, PresetFileInvalid, PresetFileMissing, UnsupportedPreset
from model.gemma.forward import forward
from model.gemma.weights import assemble
from model.presets.keras_directory import KerasPreset
from model.presets.resolve import open_preset
from model.weight_names import weight_specs
from tests import goldens

GOLDENS = Path(__file__).parent / "goldens"
GEMMA1 = GOLDENS / "gemma1_tiny" / "preset"
GEMMA1_BFLOAT16 = GOLDENS / "gemma1_tiny" / "preset_bf16"
GEMMA2 = GOLDENS / "gemma2_tiny" / "preset"
GEMMA2_SHARDED = GOLDENS / "gemma2_tiny" / "preset_sharded"
GEMMA3 = Path(__file__).parents[1] / "model" / "presets" / "tiny"

BLOCK = "layers/gemma_decoder_block_1"
QUERY = f"{BLOCK}/attention/query_dense/vars/0"
QUERY_SHAPE = (4, 32, 16)


@pytest.fixture
def preset(tmp_path):
    return Path(shutil.copytree(GEMMA1, tmp_path / "preset"))


@pytest.fixture
def sharded(tmp_path):
    return Path(shutil.copytree(GEMMA2_SHARDED, tmp_path / "sharded"))


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", [GEMMA1, GEMMA1_BFLOAT16, GEMMA2, GEMMA2_SHARDED, GEMMA3])
def test_arrays_have_the_names_order_and_shapes_of_the_config(directory):
    preset = KerasPreset.open(directory)
    arrays = list(preset.arrays())
    specs = list(weight_specs(preset.config))
    assert [(name, array.shape) for name, array in arrays] == [(s.name, s.shape) for s in specs]
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for _, array in arrays)


def test_kernels_are_out_by_in_with_heads_folded_into_rows():
    arrays = dict(KerasPreset.open(GEMMA1).arrays())
    n, d, h, f = 3, 31, 15, 79
    with h5py.File(GEMMA1 / "model.weights.h5") as file:
        block = file[BLOCK]
        attention = block["attention"]
        expected = {
            "attention/query/kernel": attention["query_dense/vars/0"][n, d, h],
            "attention/attention_output/kernel": attention["output_dense/vars/0"][n, h, d],
            "ffw_gating_2/kernel": block["gating_ffw_2/vars/0"][d, f],
            "ffw_linear/kernel": block["ffw_linear/vars/0"][f, d],
        }
    found = {
        "attention/query/kernel": (n * 16 + h, d),
        "attention/attention_output/kernel": (d, n * 16 + h),
        "ffw_gating_2/kernel": (f, d),
        "ffw_linear/kernel": (d, f),
    }
    for name, index in found.items():
        assert arrays[f"decoder_block_1/{name}"][index] == expected[name], name


def test_shards_hold_what_the_single_file_holds():
    single, sharded = (dict(KerasPreset.open(d).arrays()) for d in (GEMMA2, GEMMA2_SHARDED))
    assert single.keys() == sharded.keys()
    for name in single:
        np.testing.assert_array_equal(single[name], sharded[name])


def test_bfloat16_loads_as_the_same_numbers_in_float32():
    full = dict(KerasPreset.open(GEMMA1).arrays())
    for name, array in KerasPreset.open(GEMMA1_BFLOAT16).arrays():
        rounded = full[name].astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(array, rounded)


def test_float16_loads_as_the_same_numbers_in_float32(preset):
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        half = file[QUERY][...].astype(np.float16)
        del file[QUERY]
        file[QUERY] = half
    query = dict(KerasPreset.open(preset).arrays())["decoder_block_1/attention/query/kernel"]
    np.testing.assert_array_equal(query[5], half[0, :, 5].astype(np.float32))


def test_an_old_preset_without_task_and_preprocessor_files_is_read_as_a_new_one(preset):
    """As keras_nlp wrote them: config, weights, tokenizer.json and its vocabulary, nothing else."""
    for name in ("task.json", "preprocessor.json", "metadata.json"):
        (preset / name).unlink()
    for name in ("config.json", "tokenizer.json"):
        path = preset / name
        path.write_text(path.read_text().replace("keras_hub", "keras_nlp"))
    old, new = KerasPreset.open(preset), KerasPreset.open(GEMMA1)
    assert "keras_nlp>GemmaBackbone" in (preset / "config.json").read_text()
    assert old.config == new.config
    assert old.tokenizer_proto() == new.tokenizer_proto()
    arrays = dict(new.arrays())
    for name, array in old.arrays():
        np.testing.assert_array_equal(array, arrays[name])


def test_a_preset_saved_with_lora_on_is_the_model_after_training(preset):
    """keras-hub 0.32 saves kernel + A · B as the kernel, no other dataset, and counts A and B."""
    given = goldens.arrays("gemma1_tiny")
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        for layer in range(2):
            block = f"layers/gemma_decoder_block{f'_{layer}' if layer else ''}"
            for name in ("query", "value"):
                a, b = (given[f"train.lora.{layer}.{name}.{part}5"] for part in "ab")
                kernel = file[f"{block}/attention/{name}_dense/vars/0"]
                kernel[...] += a @ b
    metadata = json.loads((preset / "metadata.json").read_text())
    metadata["parameter_count"] += 2 * (4 * 32 * 4 + 4 * 16 + 1 * 32 * 4 + 4 * 16)
    (preset / "metadata.json").write_text(json.dumps(metadata))
    reader = KerasPreset.open(preset)
    result = jax.jit(forward, static_argnums=0)(
        reader.config,
        assemble(reader.config, {name: jnp.asarray(array) for name, array in reader.arrays()}),
        jnp.asarray(given["train.x_token_ids"], jnp.int32),
        jnp.asarray(given["train.x_padding_mask"]).astype(bool),
    )
    np.testing.assert_allclose(result.logits, given["train.lora.logits5"], atol=3e-4, rtol=0)


def test_a_task_of_gemma3_is_read_by_its_backbone():
    task = json.loads((GEMMA3 / "task.json").read_text())
    assert task["registered_name"] == "keras_hub>Gemma3CausalLM"
    assert task["config"]["preprocessor"]["class_name"] == "Gemma3CausalLMPreprocessor"
    preset = KerasPreset.open(GEMMA3)
    assert preset.config.family is Family.GEMMA3
    proto = (GEMMA3 / "assets/tokenizer/vocabulary.spm").read_bytes()
    assert preset.tokenizer_proto() == proto


def test_a_keras_archive_is_refused_with_what_to_use_instead(tmp_path):
    archive = tmp_path / "gemma.keras"
    archive.write_bytes(b"PK")
    with pytest.raises(UnsupportedPreset, match=r"can hold code\. Use a Keras preset") as caught:
        open_preset(str(archive), tmp_path / "cache")
    assert "gemma.keras" in str(caught.value)


# --- weights that are refused --------------------------------------------------------------------


def as_external_link(file):
    file[QUERY] = h5py.ExternalLink("/etc/passwd", "/x")


def as_soft_link(file):
    file[QUERY] = h5py.SoftLink("/layers/gemma_decoder_block/attention/query_dense/vars/0")


def as_virtual(file):
    layout = h5py.VirtualLayout(QUERY_SHAPE, "f4")
    layout[...] = h5py.VirtualSource("/etc/passwd", "x", QUERY_SHAPE)
    file.create_virtual_dataset(QUERY, layout)


def as_external_storage(file):
    file.create_dataset(QUERY, QUERY_SHAPE, "f4", external=[("/etc/passwd", 0, 8192)])


def as_compressed(file):
    file.create_dataset(QUERY, data=np.zeros(QUERY_SHAPE, "f4"), compression="gzip")


def as_chunked(file):
    file.create_dataset(QUERY, data=np.zeros(QUERY_SHAPE, "f4"), chunks=(1, 32, 16))


def as_declared_but_not_stored(file):
    file.create_dataset(QUERY, QUERY_SHAPE, "f4")


def as_declared_exabyte(file):
    file.create_dataset(QUERY, (1 << 30, 1 << 30), "f4")


def as_wrong_shape(file):
    file[QUERY] = np.zeros((4, 16, 32), "f4")


def as_float64(file):
    file[QUERY] = np.zeros(QUERY_SHAPE, "f8")


def as_big_endian(file):
    file[QUERY] = np.zeros(QUERY_SHAPE, ">f4")


def as_text(file):
    file[QUERY] = ["a", "b"]


def as_int8_without_scales(file):
    file[QUERY] = np.ones(QUERY_SHAPE, "i1")


def as_compound(file):
    file[QUERY] = np.zeros(QUERY_SHAPE, [("a", "u1"), ("b", "u1")])


def as_unlabelled_opaque(file):
    file[QUERY] = np.zeros(QUERY_SHAPE, "V2")


def as_float32_with_attribute(file):
    file[QUERY] = np.zeros(QUERY_SHAPE, "f4")
    file[QUERY].attrs["scale"] = 2.0


def as_empty(file):
    file[QUERY] = h5py.Empty("f4")


def as_named_type(file):
    file[QUERY] = np.dtype("f4")


def as_nothing(file):
    pass


@pytest.mark.parametrize(
    "replace", [value for name, value in sorted(globals().items()) if name.startswith("as_")]
)
def test_a_dataset_that_is_not_plain_data_is_refused_by_name(preset, replace):
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        del file[QUERY]
        replace(file)
    with pytest.raises(PresetFileInvalid) as caught:
        next(KerasPreset.open(preset).arrays())
    assert "model.weights.h5" in str(caught.value)
    assert QUERY in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", [f"{BLOCK}/attention/query_dense/vars/1", "layers/lambda/vars/0", f"{BLOCK}/x\ny/0"]
)
def test_a_dataset_too_many_is_refused(preset, name):
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        file[name] = np.zeros(3, "f4")
    with pytest.raises(PresetFileInvalid, match=r"model\.weights\.h5") as caught:
        next(KerasPreset.open(preset).arrays())
    assert "\n" not in str(caught.value)


def test_a_group_that_contains_itself_is_refused(preset):
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        file["layers/again"] = file["layers"]
    with pytest.raises(PresetFileInvalid, match="more groups"):
        next(KerasPreset.open(preset).arrays())


@pytest.mark.parametrize("length", [0, 1, 8, 95, 96, 2_048, 30_000, 124_072, 248_143])
def test_a_truncated_weights_file_is_refused(preset, length):
    path = preset / "model.weights.h5"
    os.truncate(path, length)
    with pytest.raises(PresetFileInvalid, match=r"model\.weights\.h5"):
        list(KerasPreset.open(preset).arrays())


@pytest.mark.parametrize("seed", range(60))
def test_flipped_bytes_are_refused_or_read_in_the_right_shapes(preset, seed):
    path = preset / "model.weights.h5"
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(seed)
    for offset in generator.integers(0, len(content), size=200):
        content[offset] ^= int(generator.integers(1, 256))
    path.write_bytes(content)
    reader = KerasPreset.open(preset)
    try:
        outcome = [(name, array.shape) for name, array in reader.arrays()]
    except PresetError as error:
        outcome = str(error)
    specs = [(spec.name, spec.shape) for spec in weight_specs(reader.config)]
    assert outcome == specs or "model.weights.h5" in outcome


# --- directories that are refused ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5", "vocabulary.spm"])
def test_a_missing_file_is_named(preset, name):
    next(preset.rglob(name)).unlink()
    with pytest.raises(PresetFileMissing, match=name):
        KerasPreset.open(preset)


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5", "vocabulary.spm"])
def test_a_symbolic_link_is_refused_even_to_a_sound_file(preset, tmp_path, name):
    path = next(preset.rglob(name))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PresetFileInvalid, match=f"{name}.*symbolic link"):
        KerasPreset.open(preset)


def test_a_linked_folder_is_refused_too(preset, tmp_path):
    (preset / "assets").rename(tmp_path / "elsewhere")
    (preset / "assets").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PresetFileInvalid, match="symbolic link"):
        KerasPreset.open(preset).tokenizer_proto()


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5", "vocabulary.spm"])
def test_a_pipe_is_refused_without_waiting_for_a_writer(preset, name):
    path = next(preset.rglob(name))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(PresetFileInvalid, match=f"{name} is not a regular file"):
        KerasPreset.open(preset)


def test_a_tokenizer_of_another_size_is_refused(preset):
    config = preset / "config.json"
    config.write_text(
        config.read_text().replace('"vocabulary_size": 512', '"vocabulary_size": 513')
    )
    with pytest.raises(PresetFileInvalid, match=r"512 pieces.*513"):
        KerasPreset.open(preset).tokenizer_proto()


def test_a_damaged_tokenizer_is_refused(preset):
    (preset / "assets/tokenizer/vocabulary.spm").write_bytes(b"\xff" * 100)
    with pytest.raises(PresetFileInvalid, match=r"vocabulary\.spm"):
        KerasPreset.open(preset).tokenizer_proto()


@pytest.mark.parametrize(
    "shard", ["../model_00001.weights.h5", "/etc/passwd", "a/b.weights.h5", "x.h5", "", None, 3, {}]
)
def test_a_shard_name_cannot_lead_out_of_the_directory(sharded, shard):
    index = sharded / "model.weights.json"
    index.write_text(json.dumps({"weight_map": {"/layers/x/vars": shard}}))
    with pytest.raises(PresetFileInvalid, match=r"model\.weights\.json"):
        KerasPreset.open(sharded)


def test_a_linked_shard_is_refused(sharded, tmp_path):
    shard = sharded / "model_00001.weights.h5"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PresetFileInvalid, match=r"model_00001.*symbolic link"):
        KerasPreset.open(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model_00002.weights.h5").unlink()
    with pytest.raises(PresetFileMissing, match="model_00002"):
        KerasPreset.open(sharded)


def test_a_weight_in_two_shards_is_refused(sharded):
    shutil.copy(sharded / "model_00000.weights.h5", sharded / "more.weights.h5")
    index = sharded / "model.weights.json"
    document = json.loads(index.read_text())
    document["weight_map"]["/layers/x/vars"] = ["more.weights.h5"]
    index.write_text(json.dumps(document))
    with pytest.raises(PresetFileInvalid, match=r"more\.weights\.h5.*also in model_00000"):
        next(KerasPreset.open(sharded).arrays())
