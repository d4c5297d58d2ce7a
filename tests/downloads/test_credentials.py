"""Tokens reach the hub and nobody else; a refusal says how to log in."""

import pytest

from model.errors import PresetDownloadFailed
from model.presets import hubs
from tests.downloads.presets import GEMMA2_KERAS, ON_HUGGING_FACE, ON_KAGGLE, golden_of
from tests.fakes.loopback_hubs import STORAGE, Model

SECRET = "s3cr3t-t0k3n"


@pytest.mark.parametrize(
    ("handle", "variables", "expected"),
    [
        (ON_KAGGLE, {"KAGGLE_API_TOKEN": SECRET}, f"Bearer {SECRET}"),
        # base64 of "me:key".
        (ON_KAGGLE, {"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "key"}, "Basic bWU6a2V5"),
        (ON_HUGGING_FACE, {"HF_TOKEN": SECRET}, f"Bearer {SECRET}"),
    ],
)
def test_credentials_of_the_environment_reach_the_hub_and_no_other_host(
    handle, variables, expected, served, cache, monkeypatch
):
    server = served(Model.of(golden_of(handle)[0]))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hubs.fetch(handle, cache)
    elsewhere = [r for r in server.requests if STORAGE in r.path or "/cdn/" in r.path]
    assert len(elsewhere) >= 3
    assert {r.authorization for r in elsewhere} == {None}
    assert {r.authorization for r in server.requests if r not in elsewhere} == {expected}


@pytest.mark.parametrize(
    ("handle", "file", "text"),
    [
        (ON_KAGGLE, ".kaggle/access_token", SECRET),
        (ON_HUGGING_FACE, ".cache/huggingface/token", SECRET),
    ],
)
def test_the_token_files_of_both_libraries_are_found(handle, file, text, served, cache, home):
    server = served(Model.of(golden_of(handle)[0]))
    (home / file).parent.mkdir(parents=True)
    (home / file).write_text(text)
    hubs.fetch(handle, cache)
    assert server.requests[0].authorization == f"Bearer {SECRET}"


def test_a_login_in_this_process_reaches_the_hub(served, cache):
    from kagglehub import config

    server = served(Model.of(GEMMA2_KERAS))
    config.set_kaggle_api_token(SECRET)
    try:
        hubs.fetch(ON_KAGGLE, cache)
    finally:
        config.clear_kaggle_credentials()
    assert server.requests[0].authorization == f"Bearer {SECRET}"


def test_credentials_that_cannot_be_read_are_named_and_not_quoted(served, cache, home):
    server = served(Model.of(GEMMA2_KERAS))
    (home / ".kaggle").mkdir()
    (home / ".kaggle" / "kaggle.json").write_text(f'{{"username": "me", "key": "{SECRET}"')
    with pytest.raises(PresetDownloadFailed, match=r"Kaggle cannot be read.*kaggle.json") as caught:
        hubs.fetch(ON_KAGGLE, cache)
    assert SECRET not in str(caught.value)
    assert server.requests == []


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("handle", "page", "variable", "error_code"),
    [
        (ON_KAGGLE, "https://www.kaggle.com/models/keras/gemma2", "KAGGLE_API_TOKEN", None),
        (ON_HUGGING_FACE, "https://huggingface.co/google/gemma-2-2b", "HF_TOKEN", "GatedRepo"),
    ],
)
def test_a_refusal_says_where_the_terms_are_and_how_to_log_in(
    handle, page, variable, error_code, status, served, cache, monkeypatch, caplog
):
    model = Model.of(golden_of(handle)[0])
    model.status, model.error_code = status, error_code
    served(model)
    monkeypatch.setenv(variable, SECRET)
    with pytest.raises(PresetDownloadFailed, match=f"HTTP {status}") as caught:
        hubs.fetch(handle, cache)
    message = str(caught.value)
    assert page in message
    assert variable in message
    assert "\n" not in message
    assert SECRET not in message + caplog.text
