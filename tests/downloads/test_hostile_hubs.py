"""Hubs that send more, other or larger things than a preset has, and disks that are full."""

import pytest

from model.errors import PresetDownloadFailed, PresetFileInvalid, UnsupportedPreset
from model.presets import hubs
from tests.downloads.presets import (
    GEMMA2_HF,
    GEMMA2_KERAS,
    HANDLES,
    ON_HUGGING_FACE,
    ON_KAGGLE,
    below,
    golden_of,
    part_of,
)
from tests.fakes.loopback_hubs import Model


@pytest.mark.parametrize(
    ("handle", "name"), [(ON_KAGGLE, "../../x"), (ON_HUGGING_FACE, "../../x"), (ON_KAGGLE, "/x")]
)
def test_no_name_in_an_index_is_asked_for_or_made_before_it_is_checked(
    handle, name, served, cache, tmp_path
):
    source, shard = golden_of(handle)
    suffix = ".safetensors" if handle.startswith("hf://") else ".weights.h5"
    index = "model.safetensors.index.json" if handle.startswith("hf://") else "model.weights.json"
    model = Model.of(source)
    model.files[index] = model.files[index].replace(shard.encode(), (name + suffix).encode())
    server = served(model)
    with pytest.raises(PresetFileInvalid, match="is not the name of a shard"):
        hubs.fetch(handle, cache)
    # The config and the index, and no shard at all.
    assert set(server.files_asked_for) == {"config.json", index}
    assert {path.split("/")[0] for path in below(tmp_path)} == {"cache"}
    assert not [path for path in below(cache) if path.endswith(suffix)]


@pytest.mark.parametrize("handle", HANDLES)
def test_a_config_of_50_megabytes_is_refused_before_it_is_sent(handle, served, cache):
    model = Model.of(golden_of(handle)[0])
    model.files["config.json"] += b" " * 50_000_000
    server = served(model)
    with pytest.raises(PresetFileInvalid, match=r"config.json .*at most 1,048,576 are read"):
        hubs.fetch(handle, cache)
    assert server.files_asked_for == []


def test_a_config_that_is_larger_than_described_is_not_kept(served, cache):
    model = Model.of(GEMMA2_KERAS)
    model.described_bytes["config.json"] = len(model.files["config.json"])
    model.files["config.json"] += b" " * 5_000_000
    served(model)
    with pytest.raises((PresetFileInvalid, PresetDownloadFailed), match=r"1,048,576"):
        hubs.fetch(ON_KAGGLE, cache)
    assert not hubs.is_cached(ON_KAGGLE, cache)


@pytest.mark.parametrize("handle", HANDLES)
def test_a_model_that_is_not_served_is_refused_before_its_weights_are_asked_for(
    handle, served, cache
):
    model = Model.of(golden_of(handle)[0])
    model.files["config.json"] = b'{"model_type": "llama", "architectures": []}'
    server = served(model)
    with pytest.raises(UnsupportedPreset, match="'llama'; only gemma"):
        hubs.fetch(handle, cache)
    assert server.files_asked_for == ["config.json"]


@pytest.mark.parametrize("handle", HANDLES)
def test_what_does_not_fit_on_the_disk_is_not_begun(handle, served, cache):
    source, shard = golden_of(handle)
    model = Model.of(source)
    model.described_bytes[shard] = 10**18
    server = served(model)
    with pytest.raises(PresetDownloadFailed, match=r"needs 1,000,000,000,\d{3},\d{3},\d{3} more"):
        hubs.fetch(handle, cache)
    assert shard not in server.files_asked_for


@pytest.mark.parametrize("handle", HANDLES)
def test_a_disk_that_is_full_amid_a_transfer_says_how_much_is_missing_where(handle, served, cache):
    source, shard = golden_of(handle)
    model = Model.of(source)
    served(model)
    part = part_of(handle, shard, model, cache)
    # A device on which every write finds the disk full.
    part.symlink_to("/dev/full")
    with pytest.raises(PresetDownloadFailed, match=rf"needs [\d,]+ more bytes in {part.parent}, "):
        hubs.fetch(handle, cache)


def test_a_cache_that_cannot_be_written_is_named(served, tmp_path):
    served(Model.of(GEMMA2_HF))
    (tmp_path / "file").touch()
    with pytest.raises(PresetDownloadFailed, match=r"file/downloads: Not a directory"):
        hubs.fetch(ON_HUGGING_FACE, tmp_path / "file")
