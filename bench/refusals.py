"""How soon a full service refuses, while its engine computes: ``python -m bench.refusals``.

All slots decode and the queue is full; then one client asks again and again over one connection.
What it waits for a 429 is to be under 10 ms. Beside it `/health`, which asks the engine nothing, as
what a round trip costs on this machine at this load. Prints a Markdown table.
"""

import asyncio
import random
import statistics
import sys
import time

import httpx

from bench.mixes import prompt
from bench.run_options import fresh_service, stage
from bench.service_metrics import series
from bench.streams import Ask, Clock, Record, follow, open_client
from bench.summary import percentile

_SLOTS = 8
_QUEUED = 2
_STREAM_TOKENS = 1_500
_CALLS = 300
_PAUSE_SECONDS = 0.01
_MOST_PAUSES = 6_000
_ASKED_MS = 10


async def refused(url: str) -> dict[str, list[float]]:
    """Seconds of each refusal, and of each health check in between."""
    generator, clock = random.Random("refusals"), Clock()
    seconds: dict[str, list[float]] = {"429": [], "/health": []}
    body = {"prompt": [prompt(generator, 64)], "max_tokens": 8}
    async with open_client(url) as client, httpx.AsyncClient(base_url=url) as asking:
        tasks = []
        for count in range(1, _SLOTS + _QUEUED + 1):
            ask = Ask(prompt(generator, 16), _STREAM_TOKENS)
            record = Record(len(ask.token_ids), 0.0)
            tasks.append(asyncio.create_task(follow(client, ask, record, clock)))
            await _until(asking, "running", min(count, _SLOTS))
            await _until(asking, "waiting", max(count - _SLOTS, 0))
        for _ in range(_CALLS):
            began = time.perf_counter()
            response = await asking.post("/generate", json=body)
            seconds["429"].append(time.perf_counter() - began)
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS or tasks[0].done():
                raise RuntimeError(f"The service was not full: {response.text}")
            began = time.perf_counter()
            (await asking.get("/health")).raise_for_status()
            seconds["/health"].append(time.perf_counter() - began)
            await asyncio.sleep(_PAUSE_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return seconds


async def _until(client: httpx.AsyncClient, what: str, wanted: int) -> None:
    for _ in range(_MOST_PAUSES):
        text = (await client.get("/metrics")).raise_for_status().text
        if series(text, f'gemma_num_requests_{what}{{op="generate"}}') == wanted:
            return
        await asyncio.sleep(_PAUSE_SECONDS)
    raise TimeoutError(f"There were never {wanted} requests {what}.")


def main() -> None:
    """Prints the table."""
    stage(f"{_SLOTS} streams, {_QUEUED} waiting, and {_CALLS} that are refused")
    with fresh_service(_SLOTS, "--queue-requests", str(_QUEUED)) as service:
        found = asyncio.run(refused(service.url))
    lines = [
        f"| beside {_SLOTS} streams | median, ms | p99, ms | longest, ms |",
        "|---|---|---|---|",
    ]
    for name, seconds in found.items():
        figures = (statistics.median(seconds), percentile(seconds, 99), max(seconds))
        numbers = " | ".join(f"{1e3 * figure:.1f}" for figure in figures)
        lines.append(f"| {name} | {numbers} |")
    sys.stdout.write("\n".join(lines) + f"\n\nAsked of a 429: under {_ASKED_MS} ms.\n")


if __name__ == "__main__":
    main()
