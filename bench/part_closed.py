"""Closed loops: as many streams as clients, each of which asks again when its answer has ended."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from bench.mixes import prompt
from bench.run_options import RunOptions, Services, stage
from bench.service_metrics import compilations_while_serving
from bench.streams import Ask, Clock, Record, check_whole, follow, open_client
from bench.summary import percentile, token_gaps

PROMPT_TOKENS = 16
NEW_TOKENS = 64
_ASKS_EACH = 2
_ROUNDS = 3


def measure(options: RunOptions, services: Services) -> dict[str, Any]:
    """By number of streams: tokens a second of each round, gaps and first tokens of all."""
    generator = random.Random(f"{options.seed} closed")
    by_streams = {}
    compilations = 0
    for num_streams in options.stream_counts:
        url = services.for_streams(num_streams).url
        stage(f"closed loop: {num_streams} streams")
        speeds, records = [], []
        for _ in range(options.rounds(_ROUNDS)):
            asks = [
                [Ask(prompt(generator, PROMPT_TOKENS), NEW_TOKENS) for _ in range(_ASKS_EACH)]
                for _ in range(num_streams)
            ]
            answered = asyncio.run(_loops(url, asks))
            seconds = max(record.arrivals[-1][0] for record in answered)
            speeds.append(sum(len(record.token_ids) for record in answered) / seconds)
            records += answered
        gaps = [gap for record in records for gap in token_gaps(record)]
        by_streams[str(num_streams)] = {
            "tokens_per_second": speeds,
            "gap_p50": percentile(gaps, 50),
            "gap_p95": percentile(gaps, 95),
            "gap_p99": percentile(gaps, 99),
            "first_token_p50": percentile([record.first_token_seconds for record in records], 50),
        }
        compilations = max(compilations, compilations_while_serving(url))
    return {"by_streams": by_streams, "compilations": compilations}


async def _loops(url: str, asks: Sequence[Sequence[Ask]]) -> list[Record]:
    """Each client sends its asks one after another."""
    clock = Clock()
    records: list[Record] = []
    async with open_client(url) as client:

        async def ask_in_turn(own: Sequence[Ask]) -> None:
            for ask in own:
                record = Record(len(ask.token_ids), due=clock.now())
                records.append(await follow(client, ask, record, clock))
                check_whole(ask, record)

        await asyncio.gather(*map(ask_in_turn, asks))
    return records
