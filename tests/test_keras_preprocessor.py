"""`GemmaTokenizer` and `GemmaCausalLMPreprocessor` against keras-hub 0.32: everything exactly."""

import base64

import numpy as np
import pytest

from model.errors import PresetFileInvalid, PresetFileMissing
from model.keras_tokenizer import GemmaTokenizer
from model.preprocessor import GemmaCausalLMPreprocessor
from tests import goldens

PROTO = goldens.preset_directory("gemma1_tiny") / "assets" / "tokenizer" / "vocabulary.spm"
CASES = [
    (name, case)
    for name in ("gemma1_tiny", "gemma2_tiny")
    for case in goldens.cases(name)["preprocess"]
]
PREPROCESS = pytest.mark.parametrize(
    ("name", "case"), CASES, ids=[f"{name}-{case['tag']}" for name, case in CASES]
)


def preprocessor_of(case):
    constructor = case.get("constructor", {"sequence_length": 24})
    return GemmaCausalLMPreprocessor(GemmaTokenizer(PROTO), **constructor)


@PREPROCESS
def test_training_rows_equal_keras_hub(name, case):
    given, tag = goldens.arrays(name), case["tag"]
    rows = preprocessor_of(case)(case["strings"], **case.get("call", {}))
    assert rows.x["token_ids"].tolist() == given[f"pre.{tag}.x_token_ids"].tolist()
    assert rows.x["padding_mask"].tolist() == given[f"pre.{tag}.x_padding_mask"].tolist()
    assert rows.y.tolist() == given[f"pre.{tag}.y"].tolist()
    assert rows.sample_weight.tolist() == given[f"pre.{tag}.sw"].tolist()


@PREPROCESS
def test_the_types_of_training_rows_are_those_of_keras_hub(name, case):
    rows = preprocessor_of(case)(["a"])
    dtypes = {
        "x_token_ids": str(rows.x["token_ids"].dtype),
        "x_padding_mask": str(rows.x["padding_mask"].dtype),
        "y": str(rows.y.dtype),
        "sw": str(rows.sample_weight.dtype),
    }
    assert dtypes == {"x_token_ids": "int32", "x_padding_mask": "bool", "y": "int32", "sw": "bool"}


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, case in CASES if "generate_postprocess" in case],
)
def test_prompts_and_texts_equal_keras_hub(name, case):
    given, tag = goldens.arrays(name), case["tag"]
    preprocessor = preprocessor_of(case)
    rows = preprocessor.generate_preprocess(case["strings"], **case["call"])
    assert rows["token_ids"].tolist() == given[f"pre.{tag}.gen_token_ids"].tolist()
    assert rows["padding_mask"].tolist() == given[f"pre.{tag}.gen_padding_mask"].tolist()
    assert preprocessor.generate_postprocess(rows) == case["generate_postprocess"]


def test_the_worked_example_of_the_specification():
    preprocessor = GemmaCausalLMPreprocessor(GemmaTokenizer(PROTO), sequence_length=5)
    ids = GemmaTokenizer(PROTO).tokenize("Hi").tolist()
    rows = preprocessor("Hi")
    assert rows.x["token_ids"].tolist() == [2, *ids, 1, *[0] * (3 - len(ids))]
    assert rows.y.tolist() == [*ids, 1, *[0] * (4 - len(ids))]
    assert rows.sample_weight.tolist() == [True] * (len(ids) + 1) + [False] * (4 - len(ids))


def test_a_tokenizer_may_be_a_path_bytes_or_base64():
    proto = PROTO.read_bytes()
    by_path, by_bytes = GemmaTokenizer(str(PROTO)), GemmaTokenizer(proto)
    by_base64 = GemmaTokenizer(base64.b64encode(proto).decode())
    expected = by_path.tokenize("The keeper").tolist()
    assert by_bytes.tokenize("The keeper").tolist() == expected
    assert by_base64.tokenize("The keeper").tolist() == expected


def test_control_pieces_in_text_are_plain_characters_and_markers_are_not():
    tokenizer = GemmaTokenizer(PROTO)
    assert tokenizer.start_token_id not in tokenizer.tokenize("<bos>").tolist()
    assert tokenizer.tokenize("<start_of_turn>").tolist() == [5]


def test_rows_are_ragged_until_a_length_is_set():
    ragged = GemmaTokenizer(PROTO).tokenize(["a", "The keeper"])
    assert len(ragged[0]) != len(ragged[1])
    padded = GemmaTokenizer(PROTO, sequence_length=6, add_bos=True, add_eos=True)
    rows = padded.tokenize(["a", ""])
    assert rows.shape == (2, 6)
    assert rows[1].tolist() == [2, 1, 0, 0, 0, 0]


def test_pieces_come_as_strings_if_asked_for():
    tokenizer = GemmaTokenizer(PROTO, dtype="string")
    assert "".join(tokenizer.tokenize("Hi")) == "Hi"


def test_detokenize_takes_one_id_a_row_or_several():
    tokenizer = GemmaTokenizer(PROTO)
    ids = tokenizer.tokenize("The keeper")
    assert tokenizer.detokenize(ids) == "The keeper"
    assert tokenizer.detokenize([ids.tolist(), [2, 5, 1]]) == ["The keeper", "<start_of_turn>"]
    assert tokenizer.detokenize(np.int32(5)) == "<start_of_turn>"


def test_pieces_and_ids_are_each_others_inverse():
    tokenizer = GemmaTokenizer(PROTO)
    vocabulary = tokenizer.get_vocabulary()
    assert len(vocabulary) == tokenizer.vocabulary_size() == 512
    assert [tokenizer.token_to_id(piece) for piece in vocabulary] == list(range(512))
    assert tokenizer.token_to_id("no such piece") == 3


@pytest.mark.parametrize("bad", [-1, 512, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(bad):
    tokenizer = GemmaTokenizer(PROTO)
    with pytest.raises(ValueError, match=r"is not in \[0, 512\)"):
        tokenizer.id_to_token(bad)
    with pytest.raises(ValueError, match=r"is not in \[0, 512\)"):
        tokenizer.detokenize([bad])


def test_bad_arguments_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="dtype must be 'string' or one of"):
        GemmaTokenizer(PROTO, dtype="float32")
    with pytest.raises(PresetFileMissing, match="no tokenizer file"):
        GemmaTokenizer(tmp_path / "nothing.spm")
    with pytest.raises(PresetFileInvalid, match="not base64"):
        GemmaTokenizer("#" * 5000)
    with pytest.raises(PresetFileInvalid, match="not a SentencePiece model"):
        GemmaTokenizer(b"no model")
    with pytest.raises(ValueError, match="at least 1"):
        GemmaCausalLMPreprocessor(GemmaTokenizer(PROTO))("a", sequence_length=0)
