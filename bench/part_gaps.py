"""What a long prompt does to streams that are running, and they to it."""

import asyncio
import random
import statistics
from typing import Any

from bench.mixes import prompt
from bench.run_options import RunOptions, Services, stage
from bench.service_metrics import compilations_while_serving, wait_until_idle
from bench.streams import Ask, Clock, Record, check_whole, follow, open_client, together
from bench.summary import longest_wait, token_gaps

_ROUNDS = 5
_STREAMS = 4
_LONG_PROMPT_TOKENS = 2_000
_LONG_NEW_TOKENS = 4
# More than are read before the streams are given up.
_STREAM_TOKENS = 1_500
_TOKENS_BEFORE = 32


def measure(options: RunOptions, services: Services) -> dict[str, Any]:
    """Of each round: the usual step, the longest gap, and the first token alone and beside."""
    url = services.for_streams(_STREAMS + 1).url
    generator = random.Random(f"{options.seed} gaps")
    rounds = []
    for _ in range(options.rounds(_ROUNDS)):
        stage(f"a prompt of {_LONG_PROMPT_TOKENS} tokens, alone and beside {_STREAMS} streams")
        [alone] = asyncio.run(together(url, [_long(generator)]))
        streams = [Ask(prompt(generator, 16), _STREAM_TOKENS) for _ in range(_STREAMS)]
        beside = asyncio.run(_beside(url, streams, _long(generator)))
        rounds.append({"first_token_alone": alone.first_token_seconds, **beside})
        wait_until_idle(url)
    ratios = {
        "longest_gap_ratio": [one["longest_gap"] / one["usual_step"] for one in rounds],
        "first_token_ratio": [
            one["first_token_beside"] / one["first_token_alone"] for one in rounds
        ],
    }
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    return {"rounds": rounds, **medians, "compilations": compilations_while_serving(url)}


def _long(generator: random.Random) -> Ask:
    """A new one each time, so that nothing of it is cached."""
    return Ask(prompt(generator, _LONG_PROMPT_TOKENS), _LONG_NEW_TOKENS)


async def _beside(url: str, asks: list[Ask], long_ask: Ask) -> dict[str, float]:
    """Lets the streams run for a while, sends the long prompt, and gives the streams up."""
    clock = Clock()
    async with open_client(url) as client:
        records = [Record(len(ask.token_ids), 0.0) for ask in asks]
        tasks = [
            asyncio.create_task(follow(client, ask, record, clock))
            for ask, record in zip(asks, records, strict=True)
        ]
        while min(len(record.token_ids) for record in records) < _TOKENS_BEFORE:
            _check_running(tasks)
            await asyncio.sleep(0.01)
        # The first ones are older than the last stream's start.
        usual = statistics.median(
            gap for record in records for gap in token_gaps(record)[-_TOKENS_BEFORE // 2 :]
        )
        long_record = Record(len(long_ask.token_ids), due=clock.now())
        await follow(client, long_ask, long_record, clock)
        check_whole(long_ask, long_record)
        _check_running(tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    began, answered = long_record.sent, long_record.arrivals[0][0]
    return {
        "usual_step": usual,
        "longest_gap": max(longest_wait(record, began, answered) for record in records),
        "first_token_beside": long_record.first_token_seconds,
    }


def _check_running(tasks: list["asyncio.Task[Record]"]) -> None:
    if any(task.done() for task in tasks):
        raise RuntimeError("A stream ended before the long prompt was answered.")
