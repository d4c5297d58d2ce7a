"""GGUF headers that are damaged or hostile: one clear line, little time, little memory."""

import os
import random
import struct
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece

from model.errors import PresetFileInvalid, PresetFileMissing, UnsupportedPreset
from model.presets import gguf_header
from model.presets.gguf_file import GgufPreset
from model.presets.gguf_header import TensorType, read_header
from tests.gguf_files import GgufFile, Tensor, refusal_of, tiny_file

NUM_MUTANTS = 500
SECONDS_PER_MUTANT = 1.0
# Of the processor, which neighbours on the machine do not lengthen. Generous all the same: such
# files take a few seconds here, and minutes in readers without budgets.
SECONDS_PER_BOMB = 10.0

HUGE = 1 << 63


def array_of(element_type: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IIQ", 9, element_type, count) + payload


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"magic": b"GGML"}, "letters GGUF"),
        ({"version": 1}, "version 1"),
        ({"version": 4}, "version 4"),
        ({"version": 3 << 24}, "big endian"),
        ({"num_keys": 4_097}, "metadata count at byte 16 is 4097"),
        ({"num_keys": HUGE}, "metadata count"),
        ({"num_tensors": 20_001}, "tensor count at byte 8 is 20001"),
        ({"num_tensors": HUGE + 1}, "tensor count"),
        ({"duplicate_key": "tokenizer.ggml.model"}, "key 'tokenizer.ggml.model'"),
    ],
)
def test_a_wrong_preamble_is_refused(tmp_path, change, expected):
    file = replace(tiny_file(), **change)
    assert expected in refusal_of(file.write(tmp_path / "bad.gguf"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (array_of(9, 1, array_of(9, 1)), "array of arrays"),
        (array_of(4, (1 << 20) + 1), "is 1048577, above the limit"),
        (array_of(4, HUGE), "above the limit"),
        (array_of(8, HUGE), "above the limit"),
        (array_of(4, 1 << 20), "the file ends at byte"),
        (array_of(8, 1 << 20), "element"),
        (array_of(8, 1, struct.pack("<Q", HUGE)), "element 0 of key 'x'"),
        (array_of(8, 1, struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
        (array_of(7, 2, b"\1\2"), "truth value"),
        (array_of(13, 1, b"\0"), "unknown type 13"),
        (struct.pack("<IQ", 8, HUGE), "9223372036854775808 bytes long"),
        (struct.pack("<IQ", 8, (1 << 64) - 1), "bytes long"),
        (struct.pack("<IQ", 8, 1 << 20), "the file ends at byte"),
        (struct.pack("<IQ", 8, 2) + b"\xc3\x28", "not UTF-8"),
        (struct.pack("<II", 13, 0), "unknown type 13"),
        (struct.pack("<IB", 7, 2), "truth value"),
    ],
)
def test_a_hostile_value_is_refused_under_its_key(tmp_path, value, expected):
    message = refusal_of(GgufFile({"x": value}, []).write(tmp_path / "bad.gguf"))
    assert expected in message
    assert "key 'x'" in message


def test_nested_arrays_do_not_recurse(tmp_path):
    nested = array_of(9, 1) + struct.pack("<IQ", 9, 1) * 100_000
    assert "array of arrays" in refusal_of(GgufFile({"x": nested}, []).write(tmp_path / "n.gguf"))


@pytest.mark.parametrize("alignment", [0, 7, 4, 1 << 17, "32", [1, 2], True])
def test_a_senseless_alignment_is_refused(tmp_path, alignment):
    file = tiny_file()
    file.metadata["general.alignment"] = alignment
    assert "general.alignment" in refusal_of(file.write(tmp_path / "bad.gguf"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"shape": (1, 1, 1, 1, 32)}, "rank 5"),
        ({"shape": ()}, "rank 0"),
        ({"shape": (0, 32)}, "non-empty"),
        ({"shape": (HUGE, HUGE, HUGE, HUGE)}, "the file ends at byte"),
        ({"shape": (1 << 32, 1 << 32)}, "the file ends at byte"),
        ({"tensor_type": TensorType.Q8_0, "shape": (3, 31)}, "multiple of 32"),
        ({"tensor_type": 4}, "tensor type 4"),
        ({"tensor_type": 0xFFFFFFFF}, "tensor type 4294967295"),
        ({"offset": 8}, "multiple of 32"),
        ({"offset": (1 << 64) - 32}, "the file ends at byte"),
        ({"offset": 0}, "overlaps"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(tmp_path, change, expected):
    file = tiny_file()
    file.tensors[5] = replace(file.tensors[5], **change)
    message = refusal_of(file.write(tmp_path / "bad.gguf"))
    assert expected in message
    assert file.tensors[5].name in message


def test_a_tensor_name_that_occurs_twice_is_refused(tmp_path):
    file = tiny_file()
    file.tensors[5] = replace(file.tensors[5], name=file.tensors[4].name)
    assert "occurs twice" in refusal_of(file.write(tmp_path / "bad.gguf"))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    file = tiny_file()
    whole = file.to_bytes()
    path = tmp_path / "cut.gguf"
    lengths = [*range(64), *range(64, file.header_bytes, 101), file.header_bytes, len(whole) - 1]
    for length in lengths:
        path.write_bytes(whole[:length])
        assert "the file ends at byte" in refusal_of(path)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param({"x": array_of(8, 1 << 20, bytes(8 << 20))}, id="a million empty strings"),
        pytest.param(
            {"x": array_of(8, 1 << 20, struct.pack("<Q2s", 2, b"ab") * (1 << 20))},
            id="a million short strings",
        ),
        pytest.param(
            {f"x{i}": array_of(4, 1 << 20, bytes(4 << 20)) for i in range(9)}, id="many arrays"
        ),
        pytest.param(
            # One astral character makes Python spend four bytes on every character.
            {f"x{i}": "\U0001f600" + "a" * ((1 << 20) - 4) for i in range(24)},
            id="strings that grow in memory",
        ),
    ],
)
def test_a_hostile_header_costs_little_memory_and_time(tmp_path, payload):
    path = GgufFile(payload, []).write(tmp_path / "bomb.gguf")
    started = time.process_time()
    refusal_of(path)
    assert time.process_time() - started < SECONDS_PER_BOMB
    read = min(path.stat().st_size, gguf_header.MAX_HEADER_BYTES)
    tracemalloc.start()
    refusal_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - read < gguf_header.MAX_PARSED_BYTES + (8 << 20)


def test_the_largest_tensor_list_is_read_quickly(tmp_path):
    tensors = [Tensor(f"t{i}", (1, 1, 1, 8), 0, bytes(32)) for i in range(20_000)]
    head = GgufFile({}, tensors).write(tmp_path / "many.gguf")
    started = time.process_time()
    assert len(read_header(head).tensors) == 20_000
    assert time.process_time() - started < SECONDS_PER_BOMB


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PresetFileMissing, match=r"none\.gguf"):
        read_header(tmp_path / "none.gguf")
    for path in (tmp_path, tmp_path / "pipe", Path("/"), Path("a\0b"), Path("/dev/zero")):
        with pytest.raises(PresetFileInvalid):
            read_header(path)


EXTREMES = [0, 1, 7, 0x7F, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 62, HUGE, (1 << 64) - 1]


def mutant(whole: bytes, header_bytes: int, chance: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        # The metadata before the vocabulary and the tensor list decide most.
        where = chance.choice((chance.randrange(header_bytes), chance.randrange(1_200)))
        where = min(where, len(data) - 9)
        match chance.randrange(6):
            case 0:
                data[where] ^= 1 << chance.randrange(8)
            case 1:
                data[where] = chance.randrange(256)
            case 2:
                data[where : where + 8] = chance.choice(EXTREMES).to_bytes(8, "little")
            case 3:
                data[where : where + 4] = (chance.choice(EXTREMES) & 0xFFFFFFFF).to_bytes(
                    4, "little"
                )
            case 4:
                del data[where : where + chance.randrange(1, 40)]
            case 5:
                data[where:where] = data[where : where + chance.randrange(1, 40)]
    return bytes(data)


def test_every_mutant_is_read_or_refused_quickly(tmp_path):
    file = tiny_file(TensorType.Q8_0)
    whole, chance = file.to_bytes(), random.Random(20260117)
    path = tmp_path / "mutant.gguf"
    num_read = 0
    for number in range(NUM_MUTANTS):
        path.write_bytes(mutant(whole, file.header_bytes, chance))
        started = time.process_time()
        try:
            preset = GgufPreset.open(path)
            assert [name for name, _ in preset.arrays()]
            proto = preset.tokenizer_proto()
        except (PresetFileInvalid, UnsupportedPreset) as error:
            message = str(error)
        else:
            message = str(path)
            # What passes our checks must pass SentencePiece's.
            sentencepiece.SentencePieceProcessor(model_proto=proto).encode("abc a")
            num_read += 1
        assert str(path) in message, number
        assert "\n" not in message, number
        assert time.process_time() - started < SECONDS_PER_MUTANT, number
    assert 0 < num_read < NUM_MUTANTS // 2
