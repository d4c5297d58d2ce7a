"""The header of a safetensors file, checked before the library sees it."""

import json
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.errors import PresetFileInvalid
from model.presets.safetensors_header import check_safetensors
from model.weight_names import WeightSpec

SPECS = [WeightSpec("a", (2, 3)), WeightSpec("b", (4,))]
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write_safetensors(path, header, num_data_bytes=32):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(num_data_bytes))


def test_a_sound_header_passes_and_so_does_the_one_of_the_library(tmp_path):
    write_safetensors(tmp_path / "x", GOOD)
    check_safetensors(tmp_path / "x", SPECS)
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float16)}
    save_file(arrays, tmp_path / "y", metadata={"a": "b"})
    check_safetensors(tmp_path / "y", SPECS)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (GOOD | {"a": GOOD["a"] | {"shape": [3, 2]}}, "tensor a has shape"),
        (GOOD | {"a": GOOD["a"] | {"shape": [2, 3] + [1] * 100_000}}, "describes more|has shape"),
        (GOOD | {"a": GOOD["a"] | {"shape": [2, True]}}, "tensor a has shape"),
        (GOOD | {"a": GOOD["a"] | {"dtype": "I64"}}, "tensor a has dtype"),
        (GOOD | {"a": GOOD["a"] | {"dtype": ["F32"]}}, "tensor a has dtype"),
        (GOOD | {"a": GOOD["a"] | {"data_offsets": [0, 25]}}, "tensor a needs 24"),
        (GOOD | {"a": GOOD["a"] | {"data_offsets": [-24, 0]}}, "tensor a needs 24"),
        (GOOD | {"a": GOOD["a"] | {"data_offsets": [8, 32]}}, "overlap or leave a gap"),
        (GOOD | {"a": GOOD["a"] | {"extra": 1}}, "tensor a is not described"),
        (GOOD | {"c": GOOD["a"]}, "'c' does not belong"),
        ({"a": GOOD["a"]}, "tensor b is missing"),
        (b'{"a": {}, "a": {}}', "twice"),
        (b"[" * 40_000, "JSON"),
        (b"[" * 50_000, "more than 20000"),
        (b"{}" + b" " * (4 << 20), "is not safetensors"),
    ],
)
def test_a_header_that_says_anything_else_is_refused(tmp_path, header, words):
    write_safetensors(tmp_path / "x", header)
    with pytest.raises(PresetFileInvalid, match=words) as caught:
        check_safetensors(tmp_path / "x", SPECS)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("num_data_bytes", [0, 31, 33])
def test_data_must_be_exactly_as_long_as_the_header_says(tmp_path, num_data_bytes):
    write_safetensors(tmp_path / "x", GOOD, num_data_bytes)
    with pytest.raises(PresetFileInvalid, match="truncated or has been extended"):
        check_safetensors(tmp_path / "x", SPECS)


def test_a_million_empty_tensors_are_refused_without_parsing_them(tmp_path):
    header = b"{" + b",".join(b'"%x":{}' % number for number in range(400_000)) + b"}"
    write_safetensors(tmp_path / "x", header[: 4 << 20])
    start = time.process_time()
    with pytest.raises(PresetFileInvalid, match="more than 20000 tensors"):
        check_safetensors(tmp_path / "x", SPECS)
    assert time.process_time() - start < 0.5  # about 0.01 s; parsing takes far longer
