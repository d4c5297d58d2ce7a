"""docs/client.md and its notebook are run, from top to bottom, against a service.

Only the port differs. The service adds numbers, so it answers prompts without numbers with nothing.
What trains is run by `tests.test_finetune_page`.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service_process import ServiceProcess, running_service

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "client.md").read_text()
NOTEBOOK = ROOT / "docs" / "notebooks" / "client.ipynb"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with running_service(tmp_path_factory.mktemp("page")) as running:
        yield running


def run(code: str, service: ServiceProcess, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code.replace(":8000", f":{service.port}")],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def cells(notebook: Path) -> list[str]:
    """The code of a notebook, one text a cell."""
    content = json.loads(notebook.read_text())
    assert content["nbformat"] == 4
    codes = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in codes), "clear its outputs"
    return ["".join(cell["source"]) for cell in codes]


def test_every_example_of_the_page_runs(service, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

    done = run("\n".join(blocks), service, tmp_path)

    assert done.returncode == 0, done.stderr
    assert len(blocks) == 9
    assert "/top_p: should be less than or equal to 1 (HTTP 422, code invalid_field" in done.stdout
    # What ends the page.
    assert done.stdout.endswith("\nok\n")


def test_every_cell_of_the_notebook_runs(service, tmp_path):
    done = run("\n\n".join(cells(NOTEBOOK)), service, tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_an_example_that_fails_turns_the_test_red(service, tmp_path):
    done = run(
        "from service.client import GemmaClient\nassert GemmaClient is None", service, tmp_path
    )

    assert done.returncode == 1
    assert "AssertionError" in done.stderr


def test_the_table_of_exceptions_has_those_of_the_package():
    import service.client as package

    table = PAGE.partition("| exception |")[2].partition("\n\n")[0]
    named = set(
        re.findall(r"`([A-Z]\w+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))
    )
    exported = {name for name in package.__all__ if isinstance(getattr(package, name), type)}
    leaves = {
        name for name in exported if issubclass(getattr(package, name), package.GemmaError)
    } - {"GemmaError", "ServiceError"}
    assert named == leaves
    assert package.__all__ == sorted(package.__all__)
