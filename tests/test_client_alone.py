"""The client where nothing but httpx, pydantic and what these two need is installed."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from service.client import adapters, generate, jobs, ops, score
from tests.service_process import running_service

ROOT = Path(__file__).parents[1]
ALLOWED = {"httpx", "pydantic", *sys.stdlib_module_names}

PROGRAM = """
import asyncio, json, sys
from service.client import AsyncGemmaClient, GemmaClient

with GemmaClient(sys.argv[1]) as client:
    whole = client.generate("1 2 3", max_tokens=3, temperature=0).text
    with client.stream("1 2 3", max_tokens=3, temperature=0) as stream:
        streamed = "".join(stream.text)
    scores = client.score([{"text": "1 2"}])
    job = client.finetune([{"token_ids": [1, 2]}], adapter="tone", steps=2).watch()

async def main():
    async with AsyncGemmaClient(sys.argv[1]) as client:
        return (await client.generate("1 2 3", max_tokens=3, temperature=0)).text

logprob = scores.results[0].targets[0].logprob
print(json.dumps([whole, streamed, asyncio.run(main()), logprob, job.status]))
"""


def distributions(*names: str) -> set[str]:
    """These and all that they need, here and without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(re.sub("[-_.]+", "-", needed.name).lower())
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links: our `service`, and the packages that the client may have."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "service").symlink_to(ROOT / "service")
    for name in distributions("httpx", "pydantic"):
        for file in importlib.metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                place = Path(str(importlib.metadata.distribution(name).locate_file(top)))
                (folder / top).symlink_to(place)
    return folder


def run(packages: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Isolated (-I) and without installed packages (-S), but for those in the folder."""
    program = f"import sys; sys.path.append({str(packages)!r})\n{program}"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_client_works_where_nothing_else_is_installed(packages, tmp_path):
    with running_service(tmp_path) as service:
        done = run(packages, PROGRAM, service.url)

    assert done.returncode == 0, done.stderr
    # 1 after <bos> (0) and 2 after 1 have rank 1, so -2 each.
    assert json.loads(done.stdout) == [*[" 6 12 24"] * 3, -4.0, "succeeded"]
    # No terminal and no notebook: lines.
    *_, last = done.stderr.splitlines()
    assert re.fullmatch(r"ft_\w+ tone  step 2/2  loss 0(\.\d+)?  @1 live  succeeded", last)


@pytest.mark.parametrize("module", ["fastapi", "jax", "numpy", "msgspec", "model", "service.app"])
def test_there_is_nothing_else(packages, module):
    done = run(packages, f"import {module}")

    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_no_file_of_the_client_imports_anything_else():
    for path in (ROOT / "service" / "client").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                is_own = name.startswith("service.client")
                assert is_own or name.partition(".")[0] in ALLOWED, f"{path.name}: {name}"


# --- the contract -----------------------------------------------------------------------------

CONTRACT = json.loads((ROOT / "openapi" / "openapi.json").read_text())["components"]["schemas"]


@pytest.mark.parametrize(
    ("request_", "fields", "arguments"),
    [
        ("GenerateRequest", generate.GenerateFields, {"prompt", "stream"}),
        ("ScoreRequest", score.ScoreFields, {"inputs"}),
        ("FinetuneRequest", jobs.FinetuneFields, {"adapter", "data", "dry_run"}),
        ("MoveLive", adapters.PromoteFields, {"live"}),
    ],
)
def test_every_field_of_a_request_can_be_given(request_, fields, arguments):
    names = {name.rstrip("_") for name in fields.__annotations__}
    assert names | arguments == CONTRACT[request_]["properties"].keys()


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        ("GenerateResponse", generate.Generation),
        ("Output", generate.Output),
        ("Usage", generate.Usage),
        ("Timings", generate.Timings),
        ("ScoreResponse", score.Scores),
        ("ScoreResult", score.ScoreResult),
        ("ScoredTarget", score.ScoredTarget),
        ("ScoredToken", score.ScoredToken),
        ("Logits", score.Logits),
        ("CapturedStream", score.CapturedStream),
        ("Attribution", score.Attribution),
        ("TokenAttribution", score.TokenAttribution),
        ("Tensor", score.Tensor),
        ("Divergence", score.Divergence),
        ("Health", ops.Health),
        ("Ready", ops.Ready),
        ("Info", ops.Info),
        ("SelfTestResult", ops.SelfTestResult),
        ("AdapterLimits", ops.AdapterLimits),
        ("Job", jobs.JobState),
        ("ResolvedHyperparameters", jobs.Hyperparameters),
        ("JobMetrics", jobs.JobMetrics),
        ("JobError", jobs.JobError),
        ("JobList", jobs.JobList),
        ("DryRun", jobs.DryRun),
        ("RowTokens", jobs.RowTokens),
        ("JobEvent", jobs.StoredEvent),
        ("JobEvents", jobs.StoredEvents),
        ("Adapter", adapters.Adapter),
        ("Version", adapters.Version),
        ("VersionMetrics", adapters.VersionMetrics),
        ("AdapterSummary", adapters.AdapterSummary),
        ("AdapterList", adapters.AdapterList),
    ],
)
def test_every_field_of_an_answer_has_a_type(schema, answer):
    assert answer.model_fields.keys() == CONTRACT[schema]["properties"].keys()


def test_every_kind_of_score_input_can_be_given():
    kinds = (score.ContextInput, score.TextInput, score.IdsInput)
    names = {name for kind in kinds for name in kind.__annotations__}
    assert names == CONTRACT["ScoreInput"]["properties"].keys()
