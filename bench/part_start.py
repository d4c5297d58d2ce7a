"""How long a start takes that finds weights and programs in the cache."""

import statistics
from typing import Any

from bench.run_options import RunOptions, Services, fresh_service, stage

_ROUNDS = 3
_SLOTS = 8


def measure(options: RunOptions, services: Services) -> dict[str, Any]:
    """Seconds from the start of the process to the first 200 of `/ready`."""
    services.stop()
    stage("a start that fills the caches")
    with fresh_service(_SLOTS):
        pass
    seconds = []
    for _ in range(options.rounds(_ROUNDS)):
        stage("a start with full caches")
        with fresh_service(_SLOTS) as service:
            seconds.append(service.ready_after_seconds)
    return {"seconds": seconds, "median": statistics.median(seconds)}
