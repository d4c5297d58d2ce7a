"""Jobs of the running service, as a client of HTTP starts and follows them."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from bench.training_engine import NUM_TRAINED, RANK, TARGETS

_SECONDS = 600.0


def start(url: str, adapter: str, texts: Sequence[Sequence[int]], **fields: Any) -> str:
    """The id of a job that has the form of `bench.training_engine.plan`."""
    data = [
        {
            "token_ids": list(ids),
            "loss_mask": [int(i >= len(ids) - NUM_TRAINED) for i in range(len(ids))],
        }
        for ids in texts
    ]
    form = {"rank": RANK, "targets": list(TARGETS), "layout": "peft"}
    body = {"adapter": adapter, "data": data, **form, "seed": 0, **fields}
    answer = httpx.post(f"{url}/finetune", json=body, timeout=_SECONDS).raise_for_status()
    job: str = answer.json()["id"]
    return job


def follow(url: str, job: str) -> Iterator[tuple[float, str, dict[str, Any]]]:
    """Its events to the end: when they came, their name, and what they say."""
    accept = {"Accept": "text/event-stream"}
    name = ""
    with httpx.stream("GET", f"{url}/finetune/{job}/events", headers=accept, timeout=_SECONDS) as r:
        for line in r.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield time.perf_counter(), name, json.loads(line.removeprefix("data: "))


def step_seconds(url: str, job: str) -> list[float]:
    """Between one step and the next; a job that does not succeed is an error."""
    times, status = [], ""
    for moment, name, data in follow(url, job):
        status = data.get("status", status)
        if name == "step":
            times.append(moment)
    if status != "succeeded":
        raise RuntimeError(f"the job ended as {status}")
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def cancel(url: str, job: str) -> None:
    httpx.post(f"{url}/finetune/{job}/cancel", timeout=_SECONDS).raise_for_status()
