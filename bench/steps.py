"""What the engine's programs cost on this machine: ``python -m bench.steps``.

Decode steps by number of rows and by what the rows ask for, prefill chunks by length, the engine
alone. Every figure is the median of several calls in one run; prints Markdown tables.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from model.engine import GemmaEngine, load
from model.prefill import CHUNK_BUCKETS
from model.progress import no_progress
from model.slots import DecodeRow, EngineOptions, PromptChunk, RowRules, Sampling
from service.settings import Settings

_CALLS = 15
_GREEDY = Sampling(0.0, 0, 1.0, 0)
_WAYS = {
    "greedy": (20, _GREEDY, None),
    "greedy at position 3,000": (3000, _GREEDY, None),
    "temperature": (20, Sampling(1.0, 0, 1.0, 1), None),
    "temperature, top-p 0.9": (20, Sampling(1.0, 0, 0.9, 1), None),
    "temperature, top-k 40, top-p 0.9": (20, Sampling(1.0, 40, 0.9, 1), None),
    "greedy, 20 log-probabilities": (20, _GREEDY, 20),
}


def median_ms(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(_CALLS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1e3


def decode_ms(engine: GemmaEngine, num_rows: int, way: str) -> float:
    """One step of ``num_rows`` rows that all ask for the same."""
    position, sampling, num_logprobs = _WAYS[way]
    rows = [
        DecodeRow(slot, position, RowRules(sampling, 1, position + 2, num_logprobs=num_logprobs))
        for slot in range(num_rows)
    ]
    return median_ms(lambda: engine.decode(rows, 1).tokens())


def prefill_ms(engine: GemmaEngine, num_tokens: int, start: int) -> float:
    """One chunk, layer by layer."""
    chunk = PromptChunk(0, list(range(1000, 1000 + num_tokens)), start)
    return median_ms(lambda: list(engine.prefill([chunk])))


def main() -> None:
    settings = Settings()
    options = EngineOptions(
        settings.preset, settings.slots, settings.context_tokens, settings.cache_dir
    )
    engine = load(options, no_progress)
    row_counts = engine.info.buckets["decode_rows"]
    lines = [f"load before: {Path('/proc/loadavg').read_text().split()[0]}", ""]
    lines.append("| ms a step | " + " | ".join(f"{count} rows" for count in row_counts) + " |")
    lines.append("|---|" + "---|" * len(row_counts))
    for way in _WAYS:
        cells = [f"{decode_ms(engine, count, way):.1f}" for count in row_counts]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    lines += ["", "| prefill chunk | ms at position 0 | ms at position 2,048 | tokens/s |"]
    lines.append("|---|---|---|---|")
    for bucket in CHUNK_BUCKETS:
        first, later = prefill_ms(engine, bucket, 0), prefill_ms(engine, bucket, 2048)
        lines.append(f"| {bucket} | {first:.0f} | {later:.0f} | {bucket / first * 1e3:.0f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
