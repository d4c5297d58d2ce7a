"""``.lora.h5`` files: keras-hub's are read, ours are laid out as its own, and bad ones refused."""

import shutil

import h5py
import jax.numpy as jnp
import numpy as np
import pytest

from model.adapter_exchange.keras_file import lora_places
from model.backbone_lora import load_lora, save_lora
from model.causal_lm import GemmaCausalLM
from model.errors import PresetFileInvalid, PresetFileMissing
from model.gemma.backbone import Backbone
from model.presets.keras_directory import KerasPreset
from tests import goldens

SETS = pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])


def fresh(name):
    preset = KerasPreset.open(goldens.preset_directory(name))
    return Backbone(preset.config, {key: jnp.asarray(a) for key, a in preset.arrays()})


def golden_file(name):
    return goldens.directory(name) / "lora5.lora.h5"


def contents(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda key, item: found.update({key: item[()]}) if hasattr(item, "dtype") else None
        )
    return found


@SETS
def test_a_file_of_keras_hub_gives_the_logits_that_keras_hub_had(name):
    given = goldens.arrays(name)
    backbone = fresh(name)
    load_lora(golden_file(name), backbone)
    inputs = {
        "token_ids": given["train.x_token_ids"],
        "padding_mask": given["train.x_padding_mask"],
    }
    logits = GemmaCausalLM(backbone)(inputs)
    np.testing.assert_allclose(logits, given["train.lora.logits5"], atol=3e-4, rtol=0)


@SETS
def test_a_written_file_holds_what_keras_hub_would_write(name, tmp_path):
    backbone = fresh(name)
    load_lora(golden_file(name), backbone)
    save_lora(tmp_path / "again.lora.h5", backbone)
    expected, found = contents(golden_file(name)), contents(tmp_path / "again.lora.h5")
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)
        assert found[key].dtype == array.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["again.lora.h5"]


@SETS
def test_places_are_those_that_keras_hub_recorded(name):
    recorded = goldens.cases(name)["train"]["lora"]["lora_indices"]
    places = lora_places(goldens.backbone(name).config)
    ours = [place for place, (_, target) in places.items() if target in ("query", "value")]
    assert sorted(ours) == recorded


def test_the_places_of_gemma_3_are_those_of_keras_hub_0_32():
    # Read off Gemma3Backbone._flatten_layers: block 0 begins at 1, block 1 at 16.
    places = lora_places(goldens.backbone("gemma3_tiny").config)
    first = {target: place for place, (block, target) in places.items() if block == 0}
    assert first == {
        "ffw_linear": 2,
        "ffw_gating_2": 3,
        "ffw_gating": 4,
        "attention_output": 8,
        "value": 11,
        "key": 12,
        "query": 13,
    }
    assert places[16 + 13 - 1] == (1, "query")


@pytest.mark.parametrize("name", goldens.TINY_PRESETS)
def test_every_target_survives_a_file(name, tmp_path):
    backbone = fresh(name)
    targets = ["query", "key", "value", "attention_output", "ffw_gating", "ffw_linear"]
    backbone.enable_lora(3, target_layer_names=targets)
    rng = np.random.default_rng(0)
    for holder in backbone.lora_layers.values():
        holder.lora_kernel_b.assign(rng.normal(size=holder.lora_kernel_b.shape))
    save_lora(tmp_path / "all.lora.h5", backbone)
    other = fresh(name)
    load_lora(tmp_path / "all.lora.h5", other)
    assert other.lora_layers.keys() == backbone.lora_layers.keys()
    for key, holder in backbone.lora_layers.items():
        np.testing.assert_array_equal(holder.value, other.lora_layers[key].value)


def broken(tmp_path, change):
    path = tmp_path / "broken.lora.h5"
    shutil.copy(golden_file("gemma1_tiny"), path)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def replace(name, value):
    def change(file):
        del file[name]
        file[name] = value

    return change


def delete(name):
    return lambda file: file.__delitem__(name)


def move(source, destination):
    return lambda file: file.move(source, destination)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (delete("lora/8/vars/lora_kernel_b"), "lora/8/vars/lora_kernel_b is missing"),
        (delete("lora/vars/rank"), "lora/vars/rank is missing"),
        (delete("lora/8"), "some blocks have other targets"),
        (move("lora/8", "lora/6"), "layer '6' of this model cannot have LoRA"),
        (move("lora/8", "lora/x"), "layer 'x' of this model cannot have LoRA"),
        (replace("lora/vars/rank", np.int64(0)), r"rank must be in \[1, 1024\], got 0"),
        (replace("lora/vars/rank", np.int64(5)), "must be float32 of shape"),
        (replace("lora/8/vars/lora_kernel_b", np.zeros((4, 16))), "it is float64"),
        (replace("lora/8/vars/lora_kernel_b", h5py.SoftLink("/lora")), "not stored in this file"),
        (
            replace("lora/8/vars/lora_kernel_b", h5py.ExternalLink("/etc/passwd", "x")),
            "not stored in this file",
        ),
    ],
)
def test_a_bad_file_is_refused_by_the_name_of_what_is_wrong(tmp_path, change, message):
    path = broken(tmp_path, change)
    with pytest.raises(PresetFileInvalid, match=message):
        load_lora(path, fresh("gemma1_tiny"))


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "short.lora.h5"
    path.write_bytes(golden_file("gemma1_tiny").read_bytes()[:5000])
    with pytest.raises(PresetFileInvalid, match=r"short\.lora\.h5"):
        load_lora(path, fresh("gemma1_tiny"))


def test_a_file_of_another_model_is_refused():
    with pytest.raises(PresetFileInvalid):
        load_lora(golden_file("gemma2_tiny"), fresh("gemma1_tiny"))


def test_calls_that_cannot_work_say_why(tmp_path):
    backbone = fresh("gemma1_tiny")
    with pytest.raises(ValueError, match=r"must end in \.lora\.h5"):
        save_lora(tmp_path / "x.h5", backbone)
    with pytest.raises(ValueError, match="call enable_lora first"):
        save_lora(tmp_path / "x.lora.h5", backbone)
    with pytest.raises(PresetFileMissing):
        load_lora(tmp_path / "x.lora.h5", backbone)
    backbone.enable_lora(2)
    with pytest.raises(ValueError, match="enabled with rank 2, the file has rank 4"):
        load_lora(golden_file("gemma1_tiny"), backbone)
    other = fresh("gemma1_tiny")
    other.enable_lora(4, target_layer_names=["key"])
    with pytest.raises(ValueError, match="other targets than query, value"):
        load_lora(golden_file("gemma1_tiny"), other)
