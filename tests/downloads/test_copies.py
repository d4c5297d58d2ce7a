"""When the hub is asked, and when the copy that is here is enough."""

import pytest

from model.errors import PresetDownloadFailed
from model.presets import hubs
from model.presets.hf_directory import HuggingFacePreset
from model.presets.resolve import open_reader
from tests.downloads.presets import (
    GEMMA2_HF,
    GEMMA2_KERAS,
    HANDLES,
    ON_HUGGING_FACE,
    ON_KAGGLE,
    ON_KAGGLE_NEWEST,
    assert_same_preset,
    golden_of,
)
from tests.fakes.loopback_hubs import COMMIT, Model
from tests.goldens import directory


@pytest.mark.parametrize("handle", HANDLES)
def test_a_hub_that_is_not_there_is_named(handle, served, cache):
    served(Model({})).close()
    host = "127.0.0.1" if handle.startswith("hf://") else "localhost"
    with pytest.raises(PresetDownloadFailed, match=rf"cannot be reached \({host}\).*its path"):
        hubs.fetch(handle, cache)


def test_offline_by_setting_says_which_setting(served, cache, monkeypatch):
    server = served(Model.of(GEMMA2_HF))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PresetDownloadFailed, match="HF_HUB_OFFLINE"):
        hubs.fetch(ON_HUGGING_FACE, cache)
    assert server.requests == []


@pytest.mark.parametrize("handle", [ON_KAGGLE, f"{ON_HUGGING_FACE}@{COMMIT}"])
def test_a_version_that_is_here_is_served_without_a_question(handle, served, cache):
    server = served(Model.of(golden_of(handle)[0]))
    first = hubs.fetch(handle, cache)
    server.requests.clear()
    assert hubs.fetch(handle, cache) == first
    assert server.requests == []


@pytest.mark.parametrize("handle", [ON_KAGGLE_NEWEST, ON_HUGGING_FACE])
def test_the_newest_version_that_is_here_costs_one_question(handle, served, cache):
    server = served(Model.of(golden_of(handle)[0]))
    first = hubs.fetch(handle, cache)
    server.requests.clear()
    assert hubs.fetch(handle, cache) == first
    (request,) = server.requests
    assert request.method == "HEAD" or request.path.endswith("/GetModelInstance")


@pytest.mark.parametrize("handle", [ON_KAGGLE_NEWEST, ON_HUGGING_FACE])
def test_without_the_hub_a_complete_copy_is_used_and_the_log_says_so(handle, served, cache, caplog):
    model = Model.of(golden_of(handle)[0])
    server = served(model)
    first = hubs.fetch(handle, cache)
    model.status = 503
    assert hubs.fetch(handle, cache) == first
    assert f"(HTTP 503); the complete copy in {first} is used" in caplog.text
    caplog.clear()
    server.close()
    assert hubs.fetch(handle, cache) == first
    assert f"; the complete copy in {first} is used" in caplog.text


@pytest.mark.parametrize("handle", [ON_KAGGLE_NEWEST, ON_HUGGING_FACE])
def test_without_the_hub_an_incomplete_copy_is_not_used(handle, served, cache):
    source, shard = golden_of(handle)
    server = served(Model.of(source))
    first = hubs.fetch(handle, cache)
    server.close()
    whole = (first / shard).read_bytes()
    (first / shard).unlink()
    assert not hubs.is_cached(handle, cache)
    (first / shard).write_bytes(whole[:-1])
    assert not hubs.is_cached(handle, cache)
    with pytest.raises(PresetDownloadFailed, match="cannot be reached"):
        hubs.fetch(handle, cache)
    (first / shard).write_bytes(whole)
    assert hubs.is_cached(handle, cache)
    for marker in ("", "{", "[]", '{"revision": 1}', '{"revision": "3", "files": [1]}'):
        (first / ".complete.json").write_text(marker)
        assert hubs.cached_bytes(handle, cache) is None


def test_a_refusal_is_not_covered_up_by_an_old_copy(served, cache):
    model = Model.of(GEMMA2_HF)
    served(model)
    hubs.fetch(ON_HUGGING_FACE, cache)
    model.status = 403
    with pytest.raises(PresetDownloadFailed, match="HTTP 403"):
        hubs.fetch(ON_HUGGING_FACE, cache)


def test_a_branch_that_moved_is_followed_and_files_that_stayed_are_kept(served, cache):
    model = Model.of(GEMMA2_HF)
    server = served(model)
    hubs.fetch(ON_HUGGING_FACE, cache)
    server.requests.clear()
    model.commit = "f" * 40
    model.files["config.json"] = model.files["config.json"].replace(b"{", b"{\n", 1)
    found = hubs.fetch(ON_HUGGING_FACE, cache)
    assert (found / "config.json").read_bytes() == model.files["config.json"]
    assert server.files_asked_for == ["config.json"]


def test_shards_of_an_older_commit_do_not_hide_the_one_file_of_the_newer(served, cache):
    gemma1 = directory("gemma1_tiny") / "hf"
    model = Model.of(gemma1)
    served(model)
    hubs.fetch(ON_HUGGING_FACE, cache)
    model.commit, model.files = "f" * 40, Model.of(GEMMA2_HF).files
    assert_same_preset(open_reader(ON_HUGGING_FACE, cache), HuggingFacePreset.open(GEMMA2_HF))


def test_a_newer_version_on_kaggle_is_another_directory(served, cache):
    model = Model.of(GEMMA2_KERAS)
    server = served(model)
    third = hubs.fetch(ON_KAGGLE_NEWEST, cache)
    assert hubs.fetch(ON_KAGGLE, cache) == third
    model.version = 12
    twelfth = hubs.fetch(ON_KAGGLE_NEWEST, cache)
    assert (third.name, twelfth.name) == ("3", "12")
    server.close()
    # The newest by number; "12" sorts before "3" as text.
    assert hubs.cached_directory(ON_KAGGLE_NEWEST, cache) == twelfth
