"""The SentencePiece model rebuilt from a GGUF file: a tiny one by hand, and Gemma 3's."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings, strategies as st

from model.config import Family, GemmaConfig
from model.errors import PresetFileInvalid, PresetNotFound, UnsupportedPreset
from model.presets import demo
from model.presets.gguf_file import GgufPreset
from tests.gguf_files import SCORES, TOKEN_TYPES, TOKENS, refusal_of, tiny_file

GOLDENS = Path(__file__).parent / "goldens" / "gemma3_270m" / "cases.json"


def processor_of(path: Path) -> sentencepiece.SentencePieceProcessor:
    proto = GgufPreset.open(path).tokenizer_proto()
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def test_the_tiny_tokenizer_encodes_as_worked_out_by_hand(tmp_path):
    processor = processor_of(tiny_file().write(tmp_path / "tiny.gguf"))
    assert processor.encode("abc a  <end_of_turn>\n", out_type=str) == [
        *("abc", "\u2581a", "\u2581\u2581", "<end_of_turn>", "\n")
    ]
    assert processor.encode("<bos>é", out_type=str) == [
        *("<0x3C>", "b", "<0x6F>", "<0x73>", "<0x3E>", "<0xC3>", "<0xA9>")
    ]
    roles = (processor.pad_id(), processor.eos_id(), processor.bos_id(), processor.unk_id())
    assert roles == (0, 1, 2, 3)
    assert all(processor.is_control(token_id) for token_id in (0, 1, 2, 4))


def test_the_end_of_turn_as_eos_token_does_not_move_the_end_of_sequence(tmp_path):
    file = tiny_file()
    file.metadata["tokenizer.ggml.eos_token_id"] = 6
    processor = processor_of(file.write(tmp_path / "chat.gguf"))
    assert processor.eos_id() == 1
    assert processor.encode("<end_of_turn>") == [6]


def with_entry(values: list[Any], index: int, value: Any) -> list[Any]:
    return [*values[:index], value, *values[index + 1 :]]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model", "gpt2", "'gpt2'"),
        ("model", [1, 2], "tokenizer.ggml.model"),
        ("add_space_prefix", True, "add_space_prefix"),
        ("tokens", "x", "tokenizer.ggml.tokens"),
        ("tokens", with_entry(TOKENS, 270, "ab"), "repeated token, number 270"),
        ("tokens", with_entry(TOKENS, 270, ""), "number 270"),
        ("tokens", with_entry(TOKENS, 270, "a\0"), "NUL"),
        ("tokens", with_entry(TOKENS, 20, "<0x0b>"), "type 6"),
        ("scores", SCORES[:-1], "271 entries for 272 tokens"),
        ("scores", with_entry(SCORES, 270, float("nan")), "finite"),
        ("scores", TOKEN_TYPES, "tokenizer.ggml.scores"),
        ("token_type", TOKEN_TYPES[:-1], "271 entries for 272 tokens"),
        ("token_type", with_entry(TOKEN_TYPES, 270, 7), "token 270"),
        ("token_type", with_entry(TOKEN_TYPES, 270, -1), "token 270"),
        ("token_type", with_entry(TOKEN_TYPES, 270, 2), "type 2"),
        ("token_type", with_entry(TOKEN_TYPES, 20, 1), "type 6"),
        ("bos_token_id", 272, "bos_token_id"),
        ("bos_token_id", 1, "same token"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(tmp_path, key, value, expected):
    file = tiny_file()
    file.metadata[f"tokenizer.ggml.{key}"] = value
    if key == "bos_token_id":  # ids count where the names are unusual
        file.metadata["tokenizer.ggml.tokens"] = with_entry(TOKENS, 2, "<s>")
    path = file.write(tmp_path / "bad.gguf")
    with pytest.raises((PresetFileInvalid, UnsupportedPreset), match=expected) as info:
        GgufPreset.open(path).tokenizer_proto()
    assert str(path) in str(info.value)


def test_as_many_tokens_as_embeddings_are_needed(tmp_path):
    file = tiny_file()
    file.metadata["tokenizer.ggml.tokens"] = [*TOKENS, "ac"]
    file.metadata["tokenizer.ggml.token_type"] = [*TOKEN_TYPES, 1]
    file.metadata["tokenizer.ggml.scores"] = [*SCORES, -9.0]
    message = refusal_of(file.write(tmp_path / "bad.gguf"))
    assert "273 tokens" in message
    assert "token_embd.weight" in message


@pytest.fixture(scope="module")
def demo_preset(tmp_path_factory):
    try:
        demo.part_paths()
    except PresetNotFound as error:
        pytest.skip(str(error))
    return GgufPreset.open(demo.assemble(tmp_path_factory.mktemp("demo")))


@pytest.fixture(scope="module")
def demo_processor(demo_preset):
    return sentencepiece.SentencePieceProcessor(model_proto=demo_preset.tokenizer_proto())


def test_the_demo_model_is_gemma_3_270m(demo_preset):
    assert demo_preset.config == GemmaConfig(
        family=Family.GEMMA3,
        vocabulary_size=262_144,
        num_layers=18,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=640,
        feed_forward_dim=2_048,
        head_dim=256,
        use_post_attention_norm=True,
        use_post_ffw_norm=True,
        use_query_key_norm=True,
        sliding_window_tokens=512,
        global_layer_period=6,
        global_rope_theta=1_000_000.0,
        norm_epsilon=1e-6,
        final_norm_epsilon=1e-6,
        context_tokens=32_768,
    )


def test_the_demo_tokenizer_gives_the_published_ids(demo_processor):
    assert demo_processor.encode("The quick brown fox") == [818, 3823, 8864, 37423]
    assert demo_processor.encode("<start_of_turn>user\nHi<end_of_turn>\n")[0] == 105
    assert demo_processor.encode("\n\n") == [108]
    assert demo_processor.encode(" " * 31) == [138 + 29]
    roles = [demo_processor.pad_id(), demo_processor.eos_id(), demo_processor.bos_id()]
    assert [*roles, demo_processor.unk_id()] == [0, 1, 2, 3]


def test_the_demo_tokenizer_gives_the_ids_of_transformers(demo_processor):
    for case in json.loads(GOLDENS.read_text()):
        assert [2, *demo_processor.encode(case["prompt"])] == case["token_ids"]
        assert demo_processor.decode(case["greedy_token_ids"]) == case["greedy_text"]


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_survives_the_demo_tokenizer(demo_processor, text):
    assert demo_processor.decode(demo_processor.encode(text)) == text
