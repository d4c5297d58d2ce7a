"""Greedy generation through the engine against what keras-hub 0.32 generated: tokens exactly."""

import pytest

from model.detokenizer import StreamingDetokenizer
from tests import goldens
from tests.keras_generate import generate

GREEDY_TAGS = [
    (name, case["tag"])
    for name in goldens.TINY_PRESETS
    for case in goldens.cases(name)["generate"]
    if case.get("sampler", "greedy") == "greedy" and case["tag"] != "greedy_auto_strip"
]


def case_of(name, tag):
    return next(case for case in goldens.cases(name)["generate"] if case["tag"] == tag)


def stop_ids_of(case, codec):
    asked = case.get("stop_token_ids")
    return codec.stop_ids if asked == "auto" else asked


@pytest.mark.parametrize(
    ("name", "kernels", "tag"),
    [(*path, tag) for path in goldens.PATHS for name, tag in GREEDY_TAGS if name == path[0]],
)
def test_tokens_and_masks_equal_keras_hub(name, kernels, tag, engine_of):
    case, given = case_of(name, tag), goldens.arrays(name)
    engine = engine_of(name, kernels)
    token_ids, mask = generate(
        engine,
        given[f"gen.{tag}.in_token_ids"],
        given[f"gen.{tag}.in_padding_mask"],
        stop_ids_of(case, engine.codec),
    )
    assert token_ids.tolist() == given[f"gen.{tag}.token_ids"].tolist()
    assert mask.tolist() == given[f"gen.{tag}.padding_mask"].astype(bool).tolist()


@pytest.mark.parametrize(
    ("name", "tag"), [pair for pair in GREEDY_TAGS if "prompts" in case_of(*pair)]
)
def test_prompts_tokenise_as_keras_hub_packs_them(name, tag, engine_of):
    case, given, codec = case_of(name, tag), goldens.arrays(name), engine_of(name).codec
    prompts = case["prompts"] if isinstance(case["prompts"], list) else [case["prompts"]]
    width = given[f"gen.{tag}.in_token_ids"].shape[1]
    for row, prompt in enumerate(prompts):
        mask = given[f"gen.{tag}.in_padding_mask"][row].astype(bool)
        expected = given[f"gen.{tag}.in_token_ids"][row][mask].tolist()
        assert [codec.bos_id, *codec.encode(prompt)][:width] == expected


@pytest.mark.parametrize(
    ("name", "tag"), [pair for pair in GREEDY_TAGS if "text" in case_of(*pair)]
)
def test_texts_equal_keras_hub(name, tag, engine_of):
    case, given, codec = case_of(name, tag), goldens.arrays(name), engine_of(name).codec
    texts = case["text"] if isinstance(case["text"], list) else [case["text"]]
    for row, text in enumerate(texts):
        detokenizer = StreamingDetokenizer(codec.piece_bytes, ())
        mask = given[f"gen.{tag}.padding_mask"][row].astype(bool)
        ids = given[f"gen.{tag}.token_ids"][row][mask].tolist()
        assert "".join(map(detokenizer.add, ids)) + detokenizer.finish() == text
