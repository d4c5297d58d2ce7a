"""JSON from files that nobody vouches for."""

import json

from model.errors import PresetFileInvalid


def parse_object(data: bytes, source: str) -> dict[str, object]:
    """The JSON object in ``data``. The caller bounds its length; ``source`` names it in errors.

    Raises:
        PresetFileInvalid: Not UTF-8, not JSON, not an object, a key twice in one object (two
            readers could then see two different files), NaN or Infinity.
    """
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
        )
    # RecursionError: thousands of nested brackets. ValueError: also numbers of 4,300 digits.
    except (ValueError, RecursionError) as error:
        raise PresetFileInvalid(f"{source} is not plain JSON: {error!s:.120}.") from error
    if not isinstance(document, dict):
        raise PresetFileInvalid(f"{source} must hold one JSON object.")
    return document


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _refuse_constant(constant: str) -> object:
    raise ValueError(f"{constant} is not a number")
