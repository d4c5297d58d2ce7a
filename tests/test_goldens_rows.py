"""The rows that keras-hub 0.32 trained on, packed from the same texts: everything exactly.

Gemma 3's rows come from pairs of prompt and response.
"""

import numpy as np
import pytest

from model.keras_tokenizer import GemmaTokenizer
from model.preprocessor import GemmaCausalLMPreprocessor
from tests import goldens


def packed(name, texts, sequence_length):
    proto = goldens.preset_directory(name) / "assets" / "tokenizer" / "vocabulary.spm"
    return GemmaCausalLMPreprocessor(GemmaTokenizer(proto), sequence_length)(texts)


@pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])
def test_training_texts_become_the_rows_of_keras_hub(name):
    given, case = goldens.arrays(name), goldens.cases(name)["train"]
    rows = packed(name, case["strings"], case["sequence_length"])
    np.testing.assert_array_equal(rows.x["token_ids"], given["train.x_token_ids"])
    np.testing.assert_array_equal(rows.x["padding_mask"], given["train.x_padding_mask"])
    np.testing.assert_array_equal(rows.y, given["train.y"])
    np.testing.assert_array_equal(rows.sample_weight, given["train.sw"])


def test_prompts_and_responses_become_the_rows_of_keras_hub():
    given, case = goldens.arrays("gemma3_tiny"), goldens.cases("gemma3_tiny")["preprocess"]
    pairs = {"prompts": case["prompts"], "responses": case["responses"]}
    rows = packed("gemma3_tiny", pairs, case["sequence_length"])
    np.testing.assert_array_equal(rows.x["token_ids"], given["pre.x_token_ids"])
    np.testing.assert_array_equal(rows.x["padding_mask"], given["pre.x_padding_mask"])
    np.testing.assert_array_equal(rows.y, given["pre.y"])
    np.testing.assert_array_equal(rows.sample_weight, given["pre.sw"])


@pytest.mark.parametrize(
    ("length", "num_prompt", "num_response"),
    [(24, 7, 7), (12, 6, 5), (11, 5, 5), (9, 4, 4), (3, 1, 1)],
)
def test_a_pair_that_is_too_long_gives_places_in_turn(length, num_prompt, num_response):
    """7 tokens each; bos and eos, and the row is one longer than its inputs."""
    case = goldens.cases("gemma3_tiny")["preprocess"]
    pair = {"prompts": case["prompts"][0], "responses": case["responses"][0]}
    rows = packed("gemma3_tiny", pair, length)
    assert rows.x["padding_mask"].shape == (length,)
    # The weights: the response and the eos behind it.
    assert rows.sample_weight.sum() == num_response + 1
    assert rows.sample_weight.argmax() == num_prompt


def test_pairs_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="There are 2 prompts and 1 responses"):
        packed("gemma3_tiny", {"prompts": ["a", "b"], "responses": ["c"]}, 8)
    with pytest.raises(ValueError, match=r"Pairs are .* got \['prompt'\]"):
        packed("gemma3_tiny", {"prompt": ["a"]}, 8)
