"""The rows of a job: a list, a data frame, or a file of JSON lines; errors say which line.

Which forms a row may have is for the service to judge. A file is read here, so a line that is no
JSON object is told before anything is sent, and a row that the service refuses is told by its line.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias, runtime_checkable

from service.client.errors import (
    DataUnreadable,
    FieldError,
    GemmaError,
    InvalidField,
    Problem,
    error_of_problem,
)

_WHITE = " \t\r\n"


@runtime_checkable
class Frame(Protocol):
    """A data frame of pandas, told by what it has: nothing is imported for it."""

    columns: Any

    def to_dict(self, orient: Any, /) -> Any: ...


@runtime_checkable
class PolarsFrame(Protocol):
    """A data frame of polars."""

    columns: Any

    def to_dicts(self) -> Any: ...


# Rows, a data frame whose columns are the fields of a row, or the path of a file of JSON lines.
TrainingData: TypeAlias = Iterable[Mapping[str, Any]] | Frame | PolarsFrame | str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Rows as they are sent.

    Attributes:
        rows: JSON objects.
        file: Where they came from, if that is a file.
        lines: The line of each in that file.
    """

    rows: list[Any]
    file: str | None = None
    lines: tuple[int, ...] = ()

    @classmethod
    def of(cls, data: TrainingData) -> "TrainingRows":
        """The rows of whatever holds them.

        Raises:
            DataUnreadable: A file cannot be read, or a line of it is no JSON object.
        """
        if isinstance(data, (str, os.PathLike)):
            return _of_file(Path(data))
        if isinstance(data, PolarsFrame):
            return cls([_filled(row) for row in data.to_dicts()])
        if isinstance(data, Frame):
            return cls([_filled(row) for row in data.to_dict("records")])
        return cls([_plain(row) for row in data])

    def place(self, index: int) -> str | None:
        """For people: the line of a row; None if it came from no file."""
        if self.file is None or index >= len(self.lines):
            return None
        return f"{self.file}, line {self.lines[index]}"


def located(error: GemmaError, rows: Mapping[str, TrainingRows]) -> GemmaError:
    """The same error, which also names the lines of the rows that its pointers name."""
    if not isinstance(error, InvalidField):
        return error
    errors = tuple(_located(field, rows) for field in error.errors)
    problem = Problem(
        status=error.status,
        code=error.code,
        detail=error.detail,
        request_id=error.request_id,
        retry_after_s=error.retry_after_s,
        errors=errors,
    )
    return error_of_problem(problem)


def _located(field: FieldError, rows: Mapping[str, TrainingRows]) -> FieldError:
    _, _, path = field.pointer.partition("/")
    name, _, rest = path.partition("/")
    index = rest.partition("/")[0]
    place = rows[name].place(int(index)) if name in rows and index.isdecimal() else None
    if place is None:
        return field
    return FieldError(pointer=field.pointer, detail=f"{field.detail} ({place})")


def _of_file(path: Path) -> TrainingRows:
    rows, lines = [], []
    try:
        # Universal newlines: a line ends where an editor shows its end.
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip(_WHITE):
                    rows.append(_row(line, f"{path}, line {number}"))
                    lines.append(number)
    except OSError as error:
        raise DataUnreadable(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        read = lines[-1] if lines else 0
        raise DataUnreadable(f"{path} is not UTF-8, somewhere behind line {read}.") from error
    if not rows:
        raise DataUnreadable(f"{path} has no rows: it should have one JSON object a line.")
    return TrainingRows(rows, str(path), tuple(lines))


def _row(line: str, place: str) -> Any:
    """The object of a line, as strict as the service reads it."""
    try:
        row = json.loads(line, parse_constant=_no_number, object_pairs_hook=_no_duplicates)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataUnreadable(f"{place}: it has half of a surrogate pair.") from error
    except json.JSONDecodeError as error:
        detail = f"{place}: it is not JSON at column {error.colno}: {error.msg}."
        raise DataUnreadable(detail) from error
    except (ValueError, RecursionError) as error:
        raise DataUnreadable(f"{place}: it is not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise DataUnreadable(f"{place}: it is not a JSON object.")
    return row


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key stands there twice")
    return row


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without the cells that are empty, so that rows of several forms can share a frame."""
    return {name: _plain(value) for name, value in row.items() if not _is_empty(value)}


def _is_empty(value: Any) -> bool:
    """None, NaN, or the NA of pandas: of lists and texts none is."""
    if value is None:
        return True
    if hasattr(value, "__len__"):
        return False
    try:
        # NaN is not itself, and NA does not say whether it is.
        return bool(value != value)
    except TypeError:
        return True


def _plain(value: Any) -> Any:
    """Arrays and their numbers as those of Python, which JSON has."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
