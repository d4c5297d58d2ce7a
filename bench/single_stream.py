"""What the service adds to one stream: ``python -m bench.single_stream``.

In one run, in turns, so that both see the same machine: the decode program of two rows called in a
bare loop, and the gaps between the tokens of one stream over HTTP. Also what the worker's memory is
at rest, and how long a start takes with the caches full. Prints a Markdown table.
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import httpx
import numpy as np

from bench.service_process import resident_bytes, running_service
from model.engine import GemmaEngine, load
from model.presets.resolve import open_preset
from model.progress import no_progress
from model.slot_memory import num_cache_positions
from model.slots import EngineOptions, RowRules, Sampling
from service.settings import Settings

_ROUNDS = 5
_TOKENS = 96
_PROMPT_TOKENS = 16
_GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)


def bare_step_seconds(engine: GemmaEngine) -> list[float]:
    """Seconds of each step of the two-row program, inputs ready and nothing else done."""
    rules = engine._rules.of([RowRules(_GREEDY, _PROMPT_TOKENS, _PROMPT_TOKENS + 2)], 2)
    unchanged = engine._interventions.of_drawing([()], 2)
    slots = np.array([0, engine._num_all_slots], np.int32)
    positions = np.array([_PROMPT_TOKENS, 0], np.int32)
    base = np.zeros(2, np.int32)
    one_step = np.array(1, np.int32)
    program = engine._programs["decode[2]"]
    seconds = []
    for _ in range(_TOKENS):
        began = time.perf_counter()
        engine._states, outputs = program(
            *(engine._weights, engine._traits, engine._states),
            *(slots, positions, rules, unchanged, one_step, engine._bank.arrays, base),
        )
        outputs.token_ids.block_until_ready()
        seconds.append(time.perf_counter() - began)
    return seconds


def stream_gap_seconds(url: str) -> list[float]:
    """Seconds of each token of one stream; those that come together share what they took."""
    body = {
        "prompt": [[2, *range(1000, 1000 + _PROMPT_TOKENS)]],
        "max_tokens": _TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    arrivals = []
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and (ids := json.loads(line[6:]).get("token_ids")):
                arrivals.append((time.perf_counter(), len(ids)))
    assert sum(count for _, count in arrivals) == _TOKENS, "none is missing"
    return [
        (later - earlier) / count
        for (earlier, _), (later, count) in itertools.pairwise(arrivals)
        for _ in range(count)
    ]


def main() -> None:
    settings = Settings()
    options = EngineOptions(settings.preset, 2, settings.context_tokens, settings.cache_dir)
    engine = load(options, no_progress)
    weights_bytes = engine.info.num_parameters * 4
    bare: list[float] = []
    streamed: list[float] = []
    with running_service("--preset", settings.preset):
        pass  # fills the caches, so that the next start is a warm one
    with running_service("--preset", settings.preset) as service:
        worker = service.worker_pid()
        cache_bytes = _cache_bytes(settings)
        at_rest, peak = resident_bytes(worker), resident_bytes(worker, "VmHWM")
        for _ in range(_ROUNDS):
            bare += bare_step_seconds(engine)
            streamed += stream_gap_seconds(service.url)
        api_bytes = resident_bytes(service.pid)
    bare_ms, streamed_ms = (statistics.median(values) * 1e3 for values in (bare, streamed))
    lines = [
        f"load before: {Path('/proc/loadavg').read_text().split()[0]}",
        "",
        "| what | measured |",
        "|---|---|",
        f"| bare decode step, two rows, median of {len(bare)} | {bare_ms:.1f} ms |",
        f"| gap between streamed tokens, median of {len(streamed)} | {streamed_ms:.1f} ms |",
        f"| the service adds | {100 * (streamed_ms / bare_ms - 1):.1f} % |",
        f"| start with full caches | {service.ready_after_seconds:.1f} s |",
        f"| float32 weights | {weights_bytes / 1e6:.0f} MB |",
        f"| KV cache | {cache_bytes / 1e6:.0f} MB |",
        f"| worker at rest, without the KV cache | {(at_rest - cache_bytes) / 1e6:.0f} MB, "
        f"{(at_rest - cache_bytes) / weights_bytes:.2f} × the weights |",
        f"| worker's peak while loading | {peak / 1e6:.0f} MB |",
        f"| API process | {api_bytes / 1e6:.0f} MB |",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _cache_bytes(settings: Settings) -> int:
    """Of a float32 cache for all slots, from shapes."""
    config = open_preset(settings.preset, settings.cache_dir).config
    positions = sum(
        num_cache_positions(config, layer, settings.context_tokens)
        for layer in range(config.num_layers)
    )
    return 2 * 4 * settings.slots * positions * config.num_key_value_heads * config.head_dim


if __name__ == "__main__":
    main()
