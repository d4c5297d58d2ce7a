"""How handles are read, and what is no handle."""

import pytest

from model.errors import PresetNotFound
from model.presets import hubs
from model.presets.hub_handles import HuggingFaceHandle, KaggleHandle, parse_handle
from model.presets.resolve import open_reader
from tests.downloads.presets import ON_HUGGING_FACE, ON_KAGGLE, ON_KAGGLE_NEWEST, below


def test_handles_are_read_part_by_part():
    assert parse_handle(ON_KAGGLE) == KaggleHandle("keras", "gemma2", "keras", "gemma2_2b_en", 3)
    assert parse_handle(ON_KAGGLE_NEWEST).version is None
    assert parse_handle("hf://a/b.c-d_e@v1.0") == HuggingFaceHandle("a", "b.c-d_e", "v1.0")
    assert parse_handle("hf://a/b") == HuggingFaceHandle("a", "b", "main")


@pytest.mark.parametrize("handle", [ON_KAGGLE, ON_KAGGLE_NEWEST, ON_HUGGING_FACE, "hf://a/b@v1"])
def test_a_handle_is_written_as_it_was_read(handle):
    assert str(parse_handle(handle)) == handle


@pytest.mark.parametrize(
    "handle",
    [
        "kaggle://keras/gemma2/keras",
        "kaggle://keras/gemma2/keras/x/3/4",
        "kaggle://keras/gemma2/keras/x/0",
        "kaggle://keras/gemma2/keras/x/-1",
        "kaggle://keras/gemma2/keras/x/latest",
        "kaggle://keras/gemma2/keras/..",
        "kaggle://keras/../keras/x",
        "kaggle:///etc/passwd/x/y",
        "kaggle://keras/gemma2/keras/x?y=z",
        "kaggle://keras/gemma2/keras/x y",
        "kaggle://keras/gemma2/keras/%2e%2e",
        "hf://gemma",
        "hf://a/b/c",
        "hf://a/..",
        "hf://../b",
        "hf://a/b@",
        "hf://a/b@../x",
        "hf://a/b@a..b",
        "hf://a/b@refs/pr/1",
        "hf://a--b/c",
        "hf://a/b\n",
        "hf://user:token@evil.example/x",
    ],
)
def test_anything_else_is_no_handle_and_touches_no_disk(handle, tmp_path):
    with pytest.raises(PresetNotFound, match="is not a handle such as"):
        hubs.fetch(handle, tmp_path / "cache")
    assert below(tmp_path) == []


@pytest.mark.parametrize("handle", ["gs://bucket/x", "modelscope://a/b", "https://a.example/b"])
def test_other_schemes_are_refused_with_what_is_read(handle, tmp_path):
    with pytest.raises(PresetNotFound, match=r"presets come from kaggle://, hf:// and local"):
        open_reader(handle, tmp_path)
