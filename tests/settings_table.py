"""The table of docs/settings.md, made from `service.settings`.

``python -m tests.settings_table`` writes it into the page; a test compares the two.
"""

import os
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic.fields import FieldInfo

from service.settings import Settings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
_BEGIN = "<!-- made by: python -m tests.settings_table -->\n"
_END = "<!-- end -->\n"

_HEADER = "| option | variable | type and range | default | meaning |\n|---|---|---|---|---|\n"
_HOME = "/home/somebody"


def settings_table() -> str:
    """One row for each setting, in the order of the class."""
    schemas = Settings.model_json_schema()["properties"]
    return _HEADER + "".join(
        f"| `--{name.replace('_', '-')}` | `GEMMA_{name.upper()}` | {_kind(schemas[name])} "
        f"| `{_default(field)}` | {field.description} |\n"
        for name, field in Settings.model_fields.items()
    )


def split_page(page: str) -> tuple[str, str, str]:
    """What stands before the table, the table, and what stands after it."""
    before, begin, rest = page.partition(_BEGIN)
    table, end, after = rest.partition(_END)
    is_whole = bool(begin and end)
    assert is_whole, "docs/settings.md lost the comments around its table"
    return before + begin, table, end + after


def _kind(schema: dict[str, Any]) -> str:
    match schema:
        case {"anyOf": [chosen, {"type": "null"}]}:
            return _kind(chosen)
        case {"type": "boolean"}:
            return "`true` or `false`"
        case {"type": "string", "enum": choices}:
            return " or ".join(f"`{choice}`" for choice in choices)
        case {"type": "array", "items": items}:
            return f"{_kind(items)}, any number of times"
        case {"type": "string", "format": "path"}:
            return "path"
        case {"type": "string", "pattern": pattern}:
            return "text like `" + pattern.replace("|", r"\|") + "`"
        case {"type": "string", "maxLength": most}:
            return f"text, {schema['minLength']} to {most} characters"
        case {"type": "string"}:
            return "text"
        case {"type": "integer"}:
            return f"whole number, {_range(schema)}"
        case {"type": "number"}:
            return f"number, {_range(schema)}"
    raise AssertionError(f"a kind of setting that this table cannot describe yet: {schema}")


def _range(schema: dict[str, Any]) -> str:
    if "exclusiveMinimum" in schema:
        return f"above {schema['exclusiveMinimum']}, at most {schema['maximum']}"
    return f"{schema['minimum']} to {schema['maximum']}"


def _default(field: FieldInfo) -> str:
    """As a person would type it, and the same on every machine."""
    with mock.patch.dict(os.environ, {"HOME": _HOME}):
        for variable in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
            os.environ.pop(variable, None)
        default = field.get_default(call_default_factory=True, validated_data={})
    if default in (None, []):
        return "left out"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    return str(default).replace(_HOME, "~")


def main() -> None:
    before, _, after = split_page(PAGE.read_text())
    PAGE.write_text(before + settings_table() + after)


if __name__ == "__main__":
    main()
