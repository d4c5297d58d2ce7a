"""Handles of presets on both hubs, and the golden presets that the hub on loopback has there."""

import hashlib

import numpy as np

from model.presets.hub_handles import parse_handle
from tests.goldens import directory

ON_KAGGLE = "kaggle://keras/gemma2/keras/gemma2_2b_en/3"
ON_KAGGLE_NEWEST = "kaggle://keras/gemma2/keras/gemma2_2b_en"
ON_HUGGING_FACE = "hf://google/gemma-2-2b"
HANDLES = [ON_KAGGLE, ON_HUGGING_FACE]

GEMMA1_KERAS = directory("gemma1_tiny") / "preset"
GEMMA2_KERAS = directory("gemma2_tiny") / "preset_sharded"
GEMMA2_HF = directory("gemma2_tiny") / "hf"


def golden_of(handle):
    """The sharded golden preset that each hub serves, and a shard of it."""
    if handle.startswith("hf://"):
        return GEMMA2_HF, "model-00001-of-00002.safetensors"
    return GEMMA2_KERAS, "model_00001.weights.h5"


def assert_same_preset(found, expected):
    for (name, array), (other_name, other) in zip(found.arrays(), expected.arrays(), strict=True):
        assert name == other_name
        np.testing.assert_array_equal(array, other, err_msg=name)
    assert found.tokenizer_proto() == expected.tokenizer_proto()


def below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def part_of(handle, shard, model, cache):
    """Where an earlier attempt would have left a shard."""
    is_hf = handle.startswith("hf://")
    folder = cache / "downloads" / parse_handle(handle).folder / ("main" if is_hf else "3")
    folder.mkdir(parents=True)
    tag = hashlib.sha256(model.files[shard]).hexdigest()[:16] + "." if is_hf else ""
    return folder / f".{shard}.{tag}part"
