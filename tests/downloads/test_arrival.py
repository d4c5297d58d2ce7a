"""What a download brings: the preset that the hub has, and nothing else."""

import pytest

from model.presets import hubs
from model.presets.hf_directory import HuggingFacePreset
from model.presets.keras_directory import KerasPreset
from model.presets.resolve import open_reader
from tests.downloads.presets import (
    GEMMA1_KERAS,
    GEMMA2_HF,
    GEMMA2_KERAS,
    HANDLES,
    ON_KAGGLE,
    assert_same_preset,
    below,
    golden_of,
)
from tests.fakes.loopback_hubs import Model


@pytest.mark.parametrize("handle", HANDLES)
def test_a_downloaded_preset_is_the_one_that_the_hub_has_and_nothing_else(handle, served, cache):
    source, _ = golden_of(handle)
    model = Model.of(source)
    model.files |= {"pytorch_model.bin": b"pickle", "README.md": b"#", "evil.py": b"import os"}
    server = served(model)
    reader = open_reader(handle, cache)
    assert_same_preset(reader, open_reader(str(source), cache))
    downloaded = reader.source_files[0].parent
    assert all(path.lstat().st_mode & 0o170000 == 0o100000 for path in reader.source_files)
    for name in below(source):
        assert (downloaded / name).read_bytes() == (source / name).read_bytes()
    assert sorted(set(server.files_asked_for)) == below(source)
    assert hubs.cached_bytes(handle, cache) == sum(p.stat().st_size for p in source.rglob("*.*"))


def test_one_weights_file_is_as_good_as_shards(served, cache):
    served(Model.of(GEMMA1_KERAS))
    assert_same_preset(open_reader(ON_KAGGLE, cache), KerasPreset.open(GEMMA1_KERAS))


def test_a_hugging_face_repository_may_hold_a_keras_preset(served, cache):
    served(Model.of(GEMMA2_KERAS))
    assert_same_preset(open_reader("hf://keras/gemma2", cache), KerasPreset.open(GEMMA2_KERAS))


def test_a_kaggle_model_may_hold_a_hugging_face_directory(served, cache):
    served(Model.of(GEMMA2_HF))
    handle = "kaggle://google/gemma-2/transformers/gemma-2-2b/1"
    assert_same_preset(open_reader(handle, cache), HuggingFacePreset.open(GEMMA2_HF))


@pytest.mark.parametrize("handle", HANDLES)
def test_progress_grows_to_the_bytes_of_all_files(handle, served, cache):
    source, _ = golden_of(handle)
    served(Model.of(source))
    calls = []
    hubs.fetch(handle, cache, lambda *call: calls.append(call))
    # Config and index come before it is known what else is needed.
    early = {"config.json", "model.weights.json", "model.safetensors.index.json"}
    total = sum((source / name).stat().st_size for name in below(source) if name not in early)
    assert {(phase, whole) for phase, _, whole in calls} == {("download", float(total))}
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] == total


@pytest.mark.parametrize("handle", HANDLES)
def test_nothing_is_written_at_home_and_nothing_is_printed(handle, served, cache, home, capfd):
    served(Model.of(golden_of(handle)[0]))
    hubs.fetch(handle, cache)
    assert below(home) == []
    assert capfd.readouterr() == ("", "")
