"""Open loops: each mix of requests at each rate."""

import asyncio
import random
import time
from typing import Any

from bench.mixes import MIXES
from bench.open_loop import offer, poisson_arrivals
from bench.padding import computed_tokens, padding_share
from bench.run_options import RunOptions, Services, stage
from bench.service_metrics import compilations_while_serving, wait_until_idle
from bench.summary import summarize

_SLOTS = 8
_DRAIN_SECONDS = 15.0
_HEARTBEAT_SECONDS = 0.5


def measure(options: RunOptions, services: Services) -> dict[str, Any]:
    """A row of numbers for each rate of each mix."""
    url = services.for_streams(_SLOTS).url
    rows: dict[str, list[dict[str, Any]]] = {}
    for mix, make_asks in MIXES.items():
        for rate in options.rates:
            stage(f"open loop: {mix}, {rate:g} requests/s for {options.window_seconds:g} s")
            wait_until_idle(url)
            arrivals = poisson_arrivals(rate, options.window_seconds, options.seed)
            # Other prompts at every rate, so that no earlier one is still cached.
            generator = random.Random(f"{options.seed} {mix} {rate}")
            asks = make_asks(generator, len(arrivals))
            before = computed_tokens(url)
            records = asyncio.run(offer(url, asks, arrivals, _DRAIN_SECONDS))
            # The worker tells its counts four times a second.
            time.sleep(_HEARTBEAT_SECONDS)
            after = computed_tokens(url)
            rows.setdefault(mix, []).append(
                {
                    "rate": rate,
                    **summarize(records, options.window_seconds, options.target),
                    "prefill_padding": padding_share(before, after, "prefill"),
                    "decode_padding": padding_share(before, after, "decode"),
                }
            )
    return {
        "mixes": rows,
        "window_seconds": options.window_seconds,
        "drain_seconds": _DRAIN_SECONDS,
        "target": {
            "first_token_seconds": options.target.first_token_seconds,
            "median_gap_seconds": options.target.median_gap_seconds,
        },
        "compilations": compilations_while_serving(url),
    }
