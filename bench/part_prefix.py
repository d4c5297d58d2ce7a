"""What a shared prefix saves: the first token of its second request against that of its first."""

import asyncio
import random
import statistics
from typing import Any

from bench.mixes import PREFIX_TOKENS, prompt
from bench.run_options import RunOptions, Services, stage
from bench.service_metrics import compilations_while_serving
from bench.streams import Ask, together

_ROUNDS = 5
_TAIL_TOKENS = 16
_NEW_TOKENS = 4


def measure(options: RunOptions, services: Services) -> dict[str, Any]:
    """Of each round, with a prefix of its own: both times, and what the server calls cached."""
    url = services.for_streams(1).url
    generator = random.Random(f"{options.seed} prefix")
    stage(f"a shared prefix of {PREFIX_TOKENS} tokens")
    rounds = []
    for _ in range(options.rounds(_ROUNDS)):
        prefix = prompt(generator, PREFIX_TOKENS)
        first, second = (
            asyncio.run(together(url, [Ask(prefix + tail[1:], _NEW_TOKENS)]))[0]
            for tail in (prompt(generator, _TAIL_TOKENS + 1) for _ in range(2))
        )
        rounds.append(
            {
                "first": first.first_token_seconds,
                "second": second.first_token_seconds,
                "cached_tokens": second.cached_tokens,
            }
        )
    ratio = statistics.median(one["second"] / one["first"] for one in rounds)
    return {"rounds": rounds, "ratio": ratio, "compilations": compilations_while_serving(url)}
