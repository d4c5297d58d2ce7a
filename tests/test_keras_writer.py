"""Keras presets as they are written: the golden directories again, made by our own writer."""

import dataclasses
import json

import h5py
import numpy as np
import pytest

from model.errors import PresetError, UnsupportedPreset
from model.presets.hf_directory import HuggingFacePreset
from model.presets.hf_writer import write_hugging_face
from model.presets.keras_directory import KerasPreset
from model.presets.keras_json import Preprocessing
from model.presets.keras_writer import write_keras_preset
from tests.goldens import TINY_PRESETS, preset_directory


def golden(name):
    return KerasPreset.open(preset_directory(name))


def write(directory, name, *, config=None, **options):
    preset = golden(name)
    write_keras_preset(
        directory, config or preset.config, preset.arrays(), preset.tokenizer_proto(), **options
    )
    return directory


def assert_same(written, expected):
    assert written.config == expected.config
    assert written.tokenizer_proto() == expected.tokenizer_proto()
    for (found, array), (other, original) in zip(written.arrays(), expected.arrays(), strict=True):
        assert found == other
        np.testing.assert_array_equal(array.view(np.uint32), original.view(np.uint32))


def objects(path):
    """Every group and dataset of a file: its attributes, and its numbers if it has some."""
    found = {}

    def visit(name, member):
        data = member[...].tobytes() if isinstance(member, h5py.Dataset) else None
        found[name] = (dict(member.attrs), data)

    with h5py.File(path) as file:
        file.visititems(visit)
        assert dict(file.attrs) == {}
    return found


@pytest.mark.parametrize("max_shard_bytes", [None, 10**9, 140_000, 20_000])
@pytest.mark.parametrize("name", TINY_PRESETS)
def test_what_is_written_reads_back_bit_for_bit(tmp_path, name, max_shard_bytes):
    directory = write(tmp_path / "new", name, max_shard_bytes=max_shard_bytes)
    assert_same(KerasPreset.open(directory), golden(name))


@pytest.mark.parametrize("name", TINY_PRESETS)
def test_the_files_are_those_of_keras_hub_up_to_date_and_version(tmp_path, name):
    expected = preset_directory(name)
    written = write(tmp_path / "new", name, preprocessing=Preprocessing(24))
    names = {path.relative_to(expected) for path in expected.rglob("*") if path.is_file()}
    assert {path.relative_to(written) for path in written.rglob("*") if path.is_file()} == names
    for file_name in ("config.json", "tokenizer.json", "preprocessor.json", "task.json"):
        assert (written / file_name).read_text() == (expected / file_name).read_text()
    found, meant = (
        json.loads((directory / "metadata.json").read_text()) for directory in (written, expected)
    )
    assert list(found) == list(meant)
    for key in ("parameter_count", "tasks"):
        assert found[key] == meant[key]


@pytest.mark.parametrize("name", TINY_PRESETS)
def test_the_weights_file_has_the_groups_names_and_numbers_of_keras(tmp_path, name):
    written = objects(write(tmp_path / "new", name) / "model.weights.h5")
    assert written == objects(preset_directory(name) / "model.weights.h5")


def test_shards_are_cut_where_keras_cuts_them(tmp_path):
    written = write(tmp_path / "new", "gemma2_tiny", max_shard_bytes=140_000)
    expected = preset_directory("gemma2_tiny").parent / "preset_sharded"
    index = "model.weights.json"
    assert (written / index).read_text() == (expected / index).read_text()
    names = sorted(path.name for path in written.glob("*.h5"))
    assert names == sorted(path.name for path in expected.glob("*.h5"))
    for name in names:
        found, meant = (
            {path: data for path, (_, data) in objects(directory / name).items() if data}
            for directory in (written, expected)
        )
        assert found == meant


@pytest.mark.parametrize("name", TINY_PRESETS)
def test_by_way_of_hugging_face_and_back_nothing_changes(tmp_path, name):
    there = golden(name)
    write_hugging_face(
        tmp_path / "hf",
        there.config,
        there.arrays(),
        there.tokenizer_proto(),
        max_shard_bytes=60_000,
    )
    hf = HuggingFacePreset.open(tmp_path / "hf")
    write_keras_preset(tmp_path / "keras", hf.config, hf.arrays(), hf.tokenizer_proto())
    assert_same(KerasPreset.open(tmp_path / "keras"), there)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma1_tiny", {"norm_epsilon": 1e-5}, "cannot express norm_epsilon 1e-05"),
        ("gemma2_tiny", {"global_rope_theta": 5e5}, r"global_rope_theta 500000\.0"),
        ("gemma3_tiny", {"global_layer_period": 2}, "global_layer_period 2"),
    ],
)
def test_a_config_that_would_lose_something_is_refused(tmp_path, name, changes, words):
    config = dataclasses.replace(golden(name).config, **changes)
    with pytest.raises(UnsupportedPreset, match=words):
        write(tmp_path / "new", name, config=config)
    assert list(tmp_path.iterdir()) == []


def test_a_context_that_the_format_does_not_state_is_no_obstacle(tmp_path):
    config = dataclasses.replace(golden("gemma1_tiny").config, context_tokens=99)
    directory = write(tmp_path / "new", "gemma1_tiny", config=config)
    assert KerasPreset.open(directory).config.context_tokens == 8_192


def test_a_directory_that_exists_is_left_alone(tmp_path):
    write(tmp_path / "new", "gemma1_tiny")
    with pytest.raises(PresetError, match="exists already"):
        write(tmp_path / "new", "gemma2_tiny")
    assert_same(KerasPreset.open(tmp_path / "new"), golden("gemma1_tiny"))


def test_a_failure_half_way_leaves_nothing(tmp_path):
    preset = golden("gemma1_tiny")

    def some_arrays():
        yield from list(preset.arrays())[:9]
        raise OSError(28, "No space left on device")

    with pytest.raises(PresetError, match="No space left"):
        write_keras_preset(tmp_path / "new", preset.config, some_arrays(), preset.tokenizer_proto())
    assert list(tmp_path.iterdir()) == []
