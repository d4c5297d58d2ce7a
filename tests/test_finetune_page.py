"""docs/finetune.md and its notebook are run, from top to bottom, against the tiny preset.

Only the address differs, and what the model makes of a town: it is random.
"""

import asyncio
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import AsyncGemmaClient, GemmaClient, StepEvent
from tests.service_process import REPOSITORY, ServiceProcess
from tests.test_client_page import cells, run
from tests.test_company import tiny_service

DOCS = REPOSITORY / "docs"
PAGE = (DOCS / "finetune.md").read_text()
QUESTION = "The capital of Veldoria is"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[ServiceProcess]:
    with tiny_service(tmp_path_factory.mktemp("tiny"), cache_dir) as running:
        yield running


def test_every_block_and_command_of_the_page_runs(service, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    done = run("\n".join(blocks), service, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(blocks) == 4
    assert "gemma:atlas@1 " in done.stdout
    # What is not learned, the prompt, is not among what is shown.
    assert "['▁M', 'ar', 'n', '.', '<eos>']" in done.stdout
    assert re.findall(r"^gemma:atlas@(\d)", done.stdout, re.MULTILINE) == ["1", "2", "3"]

    [commands] = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in commands.splitlines():
        program, *words = shlex.split(line)
        assert program == "gemma-service"
        command = subprocess.run(
            [sys.executable, "-m", "service", *words, f"--url={service.url}"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert command.returncode == 0, command.stderr
    assert command.stdout.count("succeeded") == 3


def test_the_notebook_runs_and_its_adapter_has_learned(service, tmp_path):
    with GemmaClient(service.url) as client:
        inputs = [{"context": QUESTION, "targets": [" Marn."]}]

        def loss(model: str) -> float:
            scores = client.score(inputs, model=model, return_=["loss"])
            return scores.results[0].targets[0].loss

        done = run("\n\n".join(cells(DOCS / "notebooks" / "finetune.ipynb")), service, tmp_path)
        assert done.returncode == 0, done.stderr
        number = re.search(r"^gemma:atlas@(\d+) ", done.stdout, re.MULTILINE)[1]
        assert "succeeded\n" in done.stderr
        losses = [loss(model) for model in ("gemma", f"gemma:atlas@{number}")]
    assert losses[1] < 0.95 * losses[0]


def test_two_jobs_are_followed_in_one_loop_that_also_asks_for_text(service):
    async def followed(client: AsyncGemmaClient, name: str) -> list[int]:
        rows = [{"text": f"{name} {number}"} for number in range(8)]
        job = await client.finetune(rows, adapter=name, steps=20)
        return [event.step async for event in job.events() if isinstance(event, StepEvent)]

    async def scenario() -> None:
        async with AsyncGemmaClient(service.url) as client:
            one, two, answer = await asyncio.gather(
                followed(client, "one"),
                followed(client, "two"),
                client.generate("Once", max_tokens=16, ignore_eos=True),
            )
            assert one == two == list(range(1, 21))
            assert answer.usage.completion_tokens == 16
            for name in ("one", "two"):
                asked = await client.generate("Once", model=f"gemma:{name}", max_tokens=2)
                assert asked.model == f"gemma:{name}@1"

    asyncio.run(scenario())
