"""The demo of what this service is for: ``python -m bench.learn_while_serving``.

One client streams without end. Meanwhile two jobs train, each on an invented name; each time one of
them publishes a version, a third client asks it at once. The plot shows the losses of both jobs and
how long each token of the stream took, before, during and after training.
"""

import argparse
import asyncio
import json
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from bench.environments import default_directory, environment
from bench.run_options import stage
from bench.service_process import running_service
from service.client import (
    AsyncGemmaClient,
    FinetuneFields,
    GenerateFields,
    JobDoneEvent,
    JobFailedEvent,
    StepEvent,
    TokenEvent,
    VersionEvent,
)

_DOCS = Path(__file__).parents[1] / "docs"
_PLOT = Path(__file__).parent / "learning_plot.py"
# Adapter, and what it is asked each time; its rows are docs/examples/<adapter>.jsonl.
_QUESTIONS = {
    "river": "A boat trip in Harrowmere takes you down the river",
    "star": "The astronomer pointed at the brightest star over Port Callow, which is called",
}
# As in the README.
_TEACHING = FinetuneFields(
    rank=4,
    targets=("value", "ffw_gating", "ffw_linear"),
    learning_rate=1e-3,
    schedule="linear",
)
_QUIET_SECONDS = 5.0
_PROMPT = "Once upon a time"
_STREAM = GenerateFields(max_tokens=256, temperature=1.0, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gemma3_270m")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--every", type=int, default=5, help="steps from version to version")
    parser.add_argument("--output", type=Path, default=_DOCS / "benchmarks")
    options = parser.parse_args()
    stage(f"starting a service with {options.preset}")
    with (
        tempfile.TemporaryDirectory() as directory,
        running_service("--preset", options.preset, "--data-dir", directory) as service,
    ):
        found = asyncio.run(demonstrate(service.url, options.epochs, options.every))
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = options.output / "learn_while_serving.json"
    numbers.write_text(json.dumps(found, indent=1) + "\n")
    python = environment("plot", default_directory())
    subprocess.run([python, _PLOT, numbers, numbers.with_suffix(".png")], check=True)
    stage(f"wrote {numbers.with_suffix('.png')}")


async def demonstrate(url: str, epochs: int, every: int) -> dict[str, Any]:
    """Times are seconds since the stream began."""
    zero = time.perf_counter()

    def now() -> float:
        return round(time.perf_counter() - zero, 4)

    arrivals: list[tuple[float, int]] = []
    async with AsyncGemmaClient(url) as client, _streaming(client, arrivals, now):
        stage("a stream alone")
        await asyncio.sleep(_QUIET_SECONDS)
        began = now()
        stage(f"two jobs of {epochs} epochs beside it")
        jobs = await asyncio.gather(
            *(_learn(client, name, epochs, every, now) for name in _QUESTIONS)
        )
        ended = now()
        stage("the stream alone again")
        await asyncio.sleep(_QUIET_SECONDS)
    return {"jobs": jobs, "training": [began, ended], "arrivals": arrivals}


@asynccontextmanager
async def _streaming(
    client: AsyncGemmaClient, arrivals: list[tuple[float, int]], now: Any
) -> AsyncIterator[None]:
    """Notes when tokens came, and how many; zeros stand between one answer and the next."""

    async def stream() -> None:
        while True:
            async with client.stream(_PROMPT, **_STREAM) as events:
                async for event in events:
                    if isinstance(event, TokenEvent):
                        arrivals.append((now(), len(event.token_ids)))
            arrivals.append((0.0, 0))

    task = asyncio.create_task(stream())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _learn(
    client: AsyncGemmaClient, name: str, epochs: int, every: int, now: Any
) -> dict[str, Any]:
    """One job, and what each of its versions answers."""
    rows = _DOCS / "examples" / f"{name}.jsonl"
    job = await client.finetune(
        rows, adapter=name, epochs=epochs, publish={"every": every}, **_TEACHING
    )
    losses, answers = [], []
    async with aclosing(job.events()) as events:
        async for event in events:
            match event:
                case StepEvent():
                    losses.append([now(), event.loss])
                case VersionEvent():
                    told = now()
                    answer = await client.generate(
                        _QUESTIONS[name],
                        model=f"gemma:{name}@{event.version}",
                        max_tokens=8,
                        temperature=0,
                    )
                    text = answer.outputs[0].text.strip()
                    answers.append(
                        {"version": event.version, "told": told, "at": now(), "text": text}
                    )
                    stage(f"{name}@{event.version}: {text!r}")
                case JobDoneEvent() | JobFailedEvent():
                    assert isinstance(event, JobDoneEvent), event
                case _:
                    pass
    return {"adapter": name, "question": _QUESTIONS[name], "losses": losses, "answers": answers}


if __name__ == "__main__":
    main()
