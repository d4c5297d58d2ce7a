"""service.strict_json: what Python's parser takes and RFC 8259 does not."""

import json
import random
import time

import pytest

from service import strict_json
from service.errors import MalformedJson

NESTED_16 = b"[" * 16 + b"]" * 16
NESTED_17 = b"[" * 17 + b"]" * 17


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "Hello", "max_tokens": 3}',
        b" \t\r\n[1, -0, 2.5e-3, 1e308, true, false, null, {}]\n",
        b'"\\ud83d\\ude00"',
        '"\U0001f600 \u2028 \x7f"'.encode(),
        b'"\\\\ud800"',
        b'{"a": {"a": 1}, "b": {"a": 1}}',
        b"9" * 4300,
        NESTED_16,
        b'{"a":' * 16 + b"1" + b"}" * 16,
        b"[" + b"[]," * 1000 + b"{}]",
        json.dumps(["[" * 500, '\\"[[[{' * 500, "\\", '"', {"[[[": "]]"}]).encode(),
    ],
)
def test_strict_json_reads_as_the_standard_parser_does(body):
    assert strict_json.loads(body) == json.loads(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"NaN",
        b'{"temperature": NaN}',
        b'{"no_such_field": Infinity}',
        b"[-Infinity]",
        b"1e999",
        b"-1e999",
        b'"\\ud800"',
        b'"\\uDC00 low"',
        b'"\\ude00\\ud83d"',
        b'{"\\ud800": 1}',
        b'[{"a": ["\\uDfFf"]}]',
        b'{"a": 1, "a": 1}',
        b'{"a": 1, "\\u0061": 2}',
        b'[{"b": {"a": 1, "a": 2}}]',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        "{}".encode("utf-16-le"),
        "{}".encode("utf-32"),
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b'"\xc0\x80"',
        b"9" * 4301,
        b"-" + b"9" * 5000,
        NESTED_17,
        b'{"a":' * 17 + b"1" + b"}" * 17,
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        b'["\\\\",' * 20_000,
        b"[" * 50_000 + b'"\\"' + b"]" * 50_000,
        b"{'a': 1}",
        b"[1,]",
        b'{"a": 1,}',
        b"01",
        b"+1",
        b".5",
        b"1.",
        b"0x10",
        b"1_000",
        "\u0661".encode(),
        b'"\n"',
        b'"\x00"',
        b'"open',
        b"{} {}",
        b"// comment\n{}",
        b"True",
        b"nul",
    ],
)
def test_strict_json_refuses(body):
    with pytest.raises(MalformedJson):
        strict_json.loads(body)


def test_a_refusal_never_repeats_the_body():
    marker = "QZXMARKERZXQ"
    for body in (
        f'{{"{marker}": 1, "{marker}": 2}}',
        f'{{"a": {marker}}}',
        f'["{marker}\\ud800"]',
        f'["{marker}", NaN]',
        f'["{marker}\n"]',
        f'["\\{marker}"]',
        f'["{marker}',
    ):
        with pytest.raises(MalformedJson) as caught:
            strict_json.loads(body.encode())
        assert marker not in caught.value.detail
        assert len(caught.value.detail) < 120
        assert caught.value.__cause__ is None


def nested(draw: random.Random, depth: int) -> object:
    """A random value that nests exactly ``depth`` deep, with brackets and quotes in strings."""
    if depth == 0:
        return draw.choice(["[[[", '"]{', "\\", '\\"[', 1, None])
    values = [nested(draw, draw.randrange(depth)) for _ in range(draw.randrange(2))]
    values.insert(draw.randrange(len(values) + 1), nested(draw, depth - 1))
    keys = [f'{{"{index}[' for index in range(len(values))]
    return draw.choice([values, dict(zip(keys, values, strict=True))])


def test_depth_is_counted_outside_of_strings_only():
    draw = random.Random(16)
    for _ in range(300):
        depth = draw.randrange(12, 21)
        value = nested(draw, depth)
        body = json.dumps(value).encode()
        if depth <= strict_json.MAX_DEPTH:
            assert strict_json.loads(body) == value
        else:
            with pytest.raises(MalformedJson, match="nests deeper"):
                strict_json.loads(body)


@pytest.mark.parametrize(
    ("body", "limit_seconds"),
    [
        (json.dumps({"prompt": "a" * (1 << 20)}).encode(), 0.010),
        (json.dumps({"prompt": [5] * ((1 << 20) // 3)}).encode(), 0.150),
    ],
    ids=["one string", "token ids"],
)
def test_a_mebibyte_is_read_in_time(body, limit_seconds):
    def seconds() -> float:
        start = time.perf_counter()
        strict_json.loads(body)
        return time.perf_counter() - start

    # The least of several: the machine is shared, and noise only ever adds.
    assert min(seconds() for _ in range(7)) < limit_seconds
