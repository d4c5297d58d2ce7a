"""Each page in docs/ says what the code says."""

import os
import re
import tomllib
from itertools import groupby
from pathlib import Path
from unittest import mock

import pytest
from prometheus_client.metrics import MetricWrapperBase

from service.errors import ServiceError, leaves
from service.observability import Metrics
from service.version import VERSION
from tests.settings_table import PAGE as SETTINGS_PAGE, settings_table, split_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
DECISIONS = sorted((DOCS / "decisions").glob("*.md"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# A page of paper, with room to breathe.
MAX_DECISION_WORDS = 400


def read_table(page: str, first_column: str) -> list[dict[str, str]]:
    """The rows of the one Markdown table whose header begins with ``first_column``."""
    blocks = groupby(page.splitlines(), key=lambda line: line.startswith("|"))
    tables = [list(lines) for is_table, lines in blocks if is_table]
    found = [table for table in tables if _cells(table[0])[0] == first_column]
    assert len(found) == 1, f"{len(found)} tables begin with {first_column!r}, expected one"
    header, _, *rows = map(_cells, found[0])
    return [dict(zip(header, row, strict=True)) for row in rows]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _codes(cell: str) -> tuple[str, ...]:
    """What stands between back ticks."""
    return tuple(re.findall(r"`([^`]+)`", cell))


# --- settings ---------------------------------------------------------------------------------


def test_the_settings_page_holds_the_table_that_the_settings_make():
    _, table, _ = split_page(SETTINGS_PAGE.read_text())

    assert table == settings_table(), "run: .venv/bin/python -m tests.settings_table"


def test_the_settings_table_is_the_same_on_every_machine():
    elsewhere = {"HOME": "/root/elsewhere", "XDG_DATA_HOME": "/data", "GEMMA_SLOTS": "3"}

    with mock.patch.dict(os.environ, elsewhere):
        table = settings_table()

    assert table == settings_table()
    assert "elsewhere" not in table
    assert "`~/.cache/gemma-service`" in table


# --- dependencies -----------------------------------------------------------------------------


def _declared_dependencies() -> list[tuple[str, str]]:
    project = PYPROJECT["project"]
    groups = {"core": project["dependencies"], **project["optional-dependencies"]}
    return [
        (re.split(r"[<>=!~;\s]", requirement)[0], group)
        for group, requirements in groups.items()
        for requirement in requirements
    ]


def test_every_direct_dependency_has_a_reason_and_every_reason_a_dependency():
    rows = read_table((DOCS / "dependencies.md").read_text(), "package")

    explained = [(_codes(row["package"])[0], row["group"]) for row in rows]

    assert sorted(explained) == sorted(_declared_dependencies())
    assert all(row["why"].endswith(".") for row in rows)


# --- metrics ----------------------------------------------------------------------------------


def _metric_facts() -> list[tuple[str, tuple[str, ...], str, str]]:
    """Exposed name, labels, kind and help of every metric, in the order of the class."""
    metrics = [m for m in vars(Metrics()).values() if isinstance(m, MetricWrapperBase)]
    return [
        (
            metric.describe()[0].name + ("_total" if metric._type == "counter" else ""),
            tuple(metric._labelnames),
            metric._type,
            metric._documentation,
        )
        for metric in metrics
    ]


def _metric_rows() -> list[dict[str, str]]:
    return read_table((DOCS / "metrics.md").read_text(), "metric")


def test_every_metric_has_a_row_and_every_row_a_metric():
    documented = [
        (_codes(row["metric"])[0], _codes(row["labels"]), row["kind"]) for row in _metric_rows()
    ]

    assert documented == [facts[:3] for facts in _metric_facts()]


def test_no_metric_is_registered_outside_of_the_class_that_the_page_follows():
    registered = {family.name for family in Metrics().registry.collect()}

    assert registered == {name.removesuffix("_total") for name, *_ in _metric_facts()}


def test_the_meaning_of_a_metric_begins_with_its_help_text():
    for row, (name, _, _, help_text) in zip(_metric_rows(), _metric_facts(), strict=True):
        assert row["meaning"].startswith(help_text), name


def test_the_unit_of_a_metric_is_the_one_in_its_name():
    for row in _metric_rows():
        name = _codes(row["metric"])[0].removesuffix("_total")
        for unit in ("seconds", "bytes", "tokens"):
            assert (row["unit"] == unit) == name.endswith("_" + unit), name


def test_every_label_has_a_row_that_lists_its_values():
    rows = read_table((DOCS / "metrics.md").read_text(), "label")
    values = {_codes(row["label"])[0]: row["values"] for row in rows}

    assert set(values) == {label for _, labels, _, _ in _metric_facts() for label in labels}
    for family in Metrics().registry.collect():
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label not in ("code", "le"):
                    assert value in _codes(values[label]), f"{sample.name}: {label}={value}"


# --- errors -----------------------------------------------------------------------------------


def _error_row(error: type[ServiceError]) -> dict[str, str]:
    seconds = error.default_retry_after_seconds
    first_line = (error.__doc__ or "").partition("\n")[0]
    return {
        "code": f"`{error.code}`",
        "status": str(int(error.status)),
        "title": error.title,
        "again": f"after {seconds} s" if seconds else "yes" if error.retryable else "no",
        "when": first_line.replace("``", "`"),
    }


def test_the_errors_page_has_every_error_as_its_class_has_it():
    rows = read_table((DOCS / "errors.md").read_text(), "code")

    assert all(row["what to do"].endswith(".") for row in rows)
    facts = [{name: row[name] for name in row if name != "what to do"} for row in rows]
    assert facts == [_error_row(error) for error in leaves()]


# --- versions, decisions, links ---------------------------------------------------------------


def test_the_changelog_the_project_and_the_code_have_one_version():
    newest, date = re.findall(r"^## \[([^]]+)\] - (\S+)$", CHANGELOG, re.MULTILINE)[0]

    assert newest == PYPROJECT["project"]["version"] == VERSION
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)


def test_decisions_are_numbered_without_a_gap():
    numbers = [int(path.name[:4]) for path in DECISIONS]

    assert numbers == list(range(1, len(DECISIONS) + 1))
    assert len(DECISIONS) >= 8


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_is_one_page_of_context_choice_and_price(path):
    page = path.read_text()

    headings = re.findall(r"^#+ .*$", page, re.MULTILINE)
    assert headings[0].startswith(f"# {int(path.name[:4])}. ")
    assert headings[1:] == ["## Context", "## Choice", "## What we gave up"]
    assert len(page.split()) <= MAX_DECISION_WORDS


def broken_links(page: str, directory: Path) -> list[str]:
    """Relative links of a page that lead to no file."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page)
    local = [target.partition("#")[0] for target in targets if "://" not in target]
    return [target for target in local if target and not (directory / target).exists()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(path):
    assert broken_links(path.read_text(), path.parent) == []


def test_the_contributing_page_names_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:`|^    )make ([a-z]+)", page, re.MULTILINE))

    assert {"install", "check", "serve"} <= named <= targets


# --- can these tests fail? --------------------------------------------------------------------


def test_a_broken_link_is_found():
    assert broken_links("[a](errors.md) [b](gone.md#x) [c](https://a.example/b)", DOCS) == [
        "gone.md"
    ]


def test_a_table_that_lost_a_cell_or_its_name_is_refused():
    with pytest.raises(ValueError, match="zip"):
        read_table("| a | b |\n|---|---|\n| 1 |\n", "a")
    with pytest.raises(AssertionError, match="0 tables"):
        read_table("| a | b |\n|---|---|\n| 1 | 2 |\n", "c")
