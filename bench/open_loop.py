"""An open loop: requests are sent when they are due, however slow the answers are.

A closed loop, in which each client waits for its answer, slows down with the server and so hides
how long real clients would wait.
"""

import asyncio
import random
from collections.abc import Sequence

from bench.streams import Ask, Clock, Record, follow, open_client


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times in [0, seconds) of a Poisson process with ``rate`` arrivals a second."""
    generator = random.Random(seed)
    times = []
    time = generator.expovariate(rate)
    while time < seconds:
        times.append(time)
        time += generator.expovariate(rate)
    return times


async def offer(
    url: str, asks: Sequence[Ask], arrivals: Sequence[float], drain_seconds: float
) -> list[Record]:
    """Sends each ask at its time and waits for the answers.

    What is not answered ``drain_seconds`` after the last arrival is given up, ``unfinished``.
    """
    records = [Record(len(ask.token_ids), due) for ask, due in zip(asks, arrivals, strict=True)]
    clock = Clock()
    async with open_client(url) as client:

        async def send(ask: Ask, record: Record) -> None:
            await asyncio.sleep(record.due - clock.now())
            await follow(client, ask, record, clock)

        tasks = [
            asyncio.create_task(send(ask, record))
            for ask, record in zip(asks, records, strict=True)
        ]
        if tasks:
            await asyncio.wait(tasks, timeout=arrivals[-1] + drain_seconds)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
    return records
