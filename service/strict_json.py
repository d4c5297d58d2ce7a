"""JSON as RFC 8259 has it, and nothing that Python's parser takes beyond it.

``json.loads`` accepts NaN, turns 1e999 into infinity, keeps the last of two equal keys, lets
half a surrogate pair through, guesses UTF-16 and recurses as deep as the body asks. Each of
these has become a 500 or a wrong answer further in, so a body stops here:

    bytes -> text (UTF-8, no mark) -> depth -> values (finite, unique keys) -> surrogates
"""

import json
import math
from typing import Any

from service.errors import MalformedJson

MAX_DEPTH = 16

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def loads(body: bytes) -> Any:
    """The value of a strict JSON text.

    Raises:
        MalformedJson: It is not one. The detail never repeats any of the body.
    """
    if not body:
        raise MalformedJson("The body is empty. Send a JSON object.")
    if body.startswith(_BYTE_ORDER_MARK):
        raise MalformedJson("The body begins with a byte order mark. Send UTF-8 without one.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedJson(f"The body is not UTF-8 at byte {error.start}.") from None
    _check_depth(body)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        # Only the position: some of the parser's messages quote the character they met.
        raise MalformedJson(
            f"The body is not JSON at line {error.lineno}, column {error.colno}."
        ) from None
    except ValueError:
        # Not a syntax error: int() refuses to convert this many digits.
        raise MalformedJson("A number has more digits than can be read.") from None
    _check_surrogates(body, value)
    return value


def _check_depth(body: bytes) -> None:
    """Refuses what nests deeper than ``MAX_DEPTH``, in time linear in the body.

    What is outside the strings is reduced to its brackets, and each round then removes every
    innermost pair. A text that still has brackets after ``MAX_DEPTH`` rounds is too deep or
    unbalanced; the parser would refuse the second kind anyway, but might recurse first.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    # Without escaped backslashes and then escaped quotes, each quote left delimits a string.
    outside = b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = outside.translate(_BRACKETS, _NOT_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise MalformedJson(f"The body nests deeper than {MAX_DEPTH}, or its brackets do not pair.")


def _check_surrogates(body: bytes, value: Any) -> None:
    # Strict UTF-8 holds no surrogates, so only an escape can have brought one.
    if b"\\ud" not in body and b"\\uD" not in body:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedJson("A string holds half of a surrogate pair.") from None


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise MalformedJson("A number is too large for a 64-bit float.")
    return value


def _refuse_constant(_: str) -> None:
    raise MalformedJson("NaN and Infinity are not JSON.")


def _object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise MalformedJson("An object has the same key twice.")
    return result


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_with_unique_keys,
    parse_float=_finite_float,
    parse_constant=_refuse_constant,
)
