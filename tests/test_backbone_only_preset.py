"""Presets without a tokenizer: a backbone saved alone. Ids are served, and `/info` says so."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from model.errors import PresetFileInvalid, PresetFileMissing, RequestInvalid
from model.ids_only import IdsOnly
from model.presets.hf_directory import HuggingFacePreset
from model.presets.keras_directory import KerasPreset
from model.presets.resolve import open_preset
from model.slots import TextCodec
from tests import goldens, hf_directories
from tests.service_process import eventually, running_service
from tests.test_company import SERVED_AS_LOADED

GEMMA1 = goldens.preset_directory("gemma1_tiny")
# What keras-hub 0.32 writes for a backbone; a task without a preprocessor adds task.json.
BACKBONE_FILES = ("config.json", "metadata.json", "model.weights.h5")


def save_backbone(directory, *more):
    directory.mkdir()
    for name in (*BACKBONE_FILES, *more):
        shutil.copy(GEMMA1 / name, directory)
    return directory


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("task.json",)])
def test_a_backbone_alone_has_the_weights_and_no_tokenizer(tmp_path, more):
    preset = KerasPreset.open(save_backbone(tmp_path / "backbone", *more))
    assert preset.tokenizer_proto() is None
    assert [path.name for path in preset.source_files] == ["config.json", "model.weights.h5"]
    whole = dict(KerasPreset.open(GEMMA1).arrays())
    for name, array in preset.arrays():
        np.testing.assert_array_equal(array, whole[name])


def test_a_hugging_face_directory_without_any_tokenizer_file_is_a_backbone_alone(tmp_path):
    directory = Path(shutil.copytree(hf_directories.GEMMA1, tmp_path / "hf"))
    (directory / "tokenizer.model").unlink()
    preset = HuggingFacePreset.open(directory)
    assert preset.tokenizer_proto() is None
    assert [path.name for path in preset.source_files] == ["config.json", "model.safetensors"]
    assert len(list(preset.arrays())) == len(list(KerasPreset.open(GEMMA1).arrays()))


@pytest.mark.parametrize("trace", ["tokenizer.json", "preprocessor.json", "assets/"])
def test_a_keras_preset_that_lost_its_vocabulary_is_no_backbone_alone(tmp_path, trace):
    directory = save_backbone(tmp_path / "lost")
    if trace.endswith("/"):
        (directory / trace).mkdir()
    else:
        shutil.copy(GEMMA1 / trace, directory)
    with pytest.raises(PresetFileMissing, match=r"vocabulary\.spm is missing"):
        KerasPreset.open(directory)


@pytest.mark.parametrize(
    "trace", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_hugging_face_directory_that_lost_its_vocabulary_is_no_backbone_alone(tmp_path, trace):
    directory = Path(shutil.copytree(hf_directories.GEMMA1, tmp_path / "hf"))
    (directory / "tokenizer.model").rename(directory / trace)
    with pytest.raises(PresetFileMissing, match=r"tokenizer\.model is missing"):
        HuggingFacePreset.open(directory)


def test_a_link_in_the_place_of_a_tokenizer_is_refused_and_not_taken_for_none(tmp_path):
    directory = save_backbone(tmp_path / "linked")
    (directory / "assets").symlink_to(GEMMA1 / "assets")
    with pytest.raises(PresetFileInvalid, match="symbolic link"):
        KerasPreset.open(directory).tokenizer_proto()


def test_a_converted_backbone_has_no_tokenizer_either(tmp_path):
    directory = save_backbone(tmp_path / "backbone")
    for _ in ("converted", "found converted"):
        assert open_preset(str(directory), tmp_path / "cache").tokenizer_proto() is None


# --- ids without text ----------------------------------------------------------------------------


def test_ids_without_a_tokenizer_have_no_text_and_no_meaning():
    codec = IdsOnly(512)
    assert isinstance(codec, TextCodec)
    assert (codec.vocabulary_size, codec.bos_id, codec.stop_ids) == (512, None, ())
    assert [codec.piece(id_) for id_ in (0, 1, 511)] == ["", "", ""]
    assert [codec.piece_bytes(id_) for id_ in (0, 1, 511)] == [b"", b"", b""]


def test_no_text_can_be_encoded_without_a_tokenizer():
    with pytest.raises(RequestInvalid, match="no tokenizer; send token ids"):
        IdsOnly(512).encode("The keeper")


# --- served --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory, cache_dir):
    directory = tmp_path_factory.mktemp("backbone_only")
    preset = save_backbone(directory / "backbone")
    options = [*SERVED_AS_LOADED, f"--cache-dir={cache_dir}"]
    with running_service(
        directory / "data",
        "--engine=model.engine:load",
        f"--preset={preset}",
        *options,
        is_ready=False,
        JAX_PLATFORMS="cpu",
    ) as running:
        assert eventually(running.is_ready, 120), running.log
        yield running


def golden_rows(tag):
    """Prompt and completion of each row of a greedy case."""
    given = goldens.arrays("gemma1_tiny")
    for row, is_prompt in enumerate(given[f"gen.{tag}.in_padding_mask"].astype(bool)):
        num_prompt_tokens = int(is_prompt.sum())
        is_output = given[f"gen.{tag}.padding_mask"][row].astype(bool)
        token_ids = given[f"gen.{tag}.token_ids"][row][is_output].tolist()
        yield token_ids[:num_prompt_tokens], token_ids[num_prompt_tokens:]


@pytest.mark.parametrize(
    ("tag", "stop_token_ids"), [("greedy_none", []), ("greedy_auto", [1])], ids=["none", "eos"]
)
def test_ids_are_continued_as_by_keras_hub_with_the_tokenizer(service, tag, stop_token_ids):
    """Without stop ids of the request, a completion goes on past eos: nobody knows its id."""
    for prompt, completion in golden_rows(tag):
        room = 24 - len(prompt)
        answer = service.generate(prompt, max_tokens=room, stop_token_ids=stop_token_ids)
        assert answer.status_code == 200, answer.text
        [output] = answer.json()["outputs"]
        assert output["token_ids"] == completion
        assert output["text"] == ""
        assert output["finish_reason"] == ("stop" if len(completion) < room else "length")


def test_log_probabilities_come_with_ids_and_empty_tokens(service):
    [output] = service.generate([2, 302, 332], max_tokens=1, logprobs=2).json()["outputs"]
    [token] = output["logprobs"]
    assert token["id"] == output["token_ids"][0] == token["top"][0]["id"]
    assert (token["token"], token["bytes"]) == ("", [])


def test_a_text_prompt_is_refused_by_its_place(service):
    response = service.generate("The keeper", max_tokens=1)
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert error["pointer"] == "/prompt"
    assert error["detail"] == "This preset has no tokenizer; send token ids."


def test_one_text_among_several_prompts_is_refused_by_its_number(service):
    response = service.generate([[2, 302, 332], "The keeper"], max_tokens=1)
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert error["pointer"] == "/prompt/1"


def test_a_stop_string_is_refused_for_it_would_never_be_seen(service):
    response = service.generate([2, 302, 332], max_tokens=1, stop=["\n"])
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert error["pointer"] == "/stop"
    assert error["detail"] == "This preset has no tokenizer; use stop_token_ids."


def test_info_and_the_log_say_that_there_is_no_tokenizer(service):
    info = service.get("/info").json()
    assert info["has_tokenizer"] is False
    assert info["vocabulary_size"] == 512
    assert "The preset has no tokenizer" in service.log


def test_an_engine_with_a_tokenizer_says_so(engine_of):
    assert engine_of("gemma1_tiny").info.has_tokenizer is True
