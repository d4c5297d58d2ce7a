"""What a hub does not have is named."""

import pytest

from model.errors import PresetFileMissing, PresetNotFound
from model.presets import hubs
from tests.downloads.presets import (
    GEMMA2_KERAS,
    HANDLES,
    ON_HUGGING_FACE,
    ON_KAGGLE,
    below,
    golden_of,
)
from tests.fakes.loopback_hubs import Model


@pytest.mark.parametrize("handle", HANDLES)
def test_what_the_hub_does_not_know_is_not_found(handle, served, cache):
    model = Model({})
    model.status, model.error_code = 404, "RepoNotFound"
    served(model)
    with pytest.raises(PresetNotFound, match=f"has no {handle} "):
        hubs.fetch(handle, cache)


@pytest.mark.parametrize(
    ("handle", "what"),
    [(ON_KAGGLE, what) for what in ("tokenizer", "shard", "index", "config")]
    + [(ON_HUGGING_FACE, what) for what in ("shard", "config")],
)
def test_a_file_that_is_missing_on_the_hub_is_named(handle, what, served, cache):
    source, shard = golden_of(handle)
    names = {
        "tokenizer": ["tokenizer.model", "assets/tokenizer/vocabulary.spm"],
        "shard": [shard],
        "index": ["model.weights.json", "model.safetensors.index.json"],
        "config": ["config.json"],
    }[what]
    model = Model.of(source)
    model.files = {name: data for name, data in model.files.items() if name not in names}
    served(model)
    (missing,) = set(below(source)) & set(names)
    with pytest.raises((PresetFileMissing, PresetNotFound), match=f"has n.*{missing}"):
        hubs.fetch(handle, cache)
    assert not hubs.is_cached(handle, cache)


def test_a_framework_that_kaggle_does_not_have_is_not_found(served, cache):
    server = served(Model.of(GEMMA2_KERAS))
    with pytest.raises(PresetNotFound, match="no framework is called kerras"):
        hubs.fetch("kaggle://keras/gemma2/kerras/gemma2_2b_en", cache)
    assert server.requests == []
