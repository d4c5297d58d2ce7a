"""Where a decode step goes: ``python -m bench.step_parts``.

Whole steps of the engine on both paths, and parts of them each as a program of its own on the same
weights: the product with the vocabulary, and drawing. Parts and steps of both paths take turns;
medians. What is left of a step is the blocks, and the host.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from model.config import GemmaConfig
from model.decode import finish_row
from model.engine import GemmaEngine, load
from model.gemma.forward import unembed
from model.gemma.padded_rows import pad_rows, step_rows
from model.gemma.weights import GemmaWeights
from model.kernels.choice import KernelChoice
from model.progress import no_progress
from model.rule_rows import RuleArrays
from model.slots import DecodeRow, EngineOptions, RowRules, Sampling
from service.settings import Settings

_PATHS: tuple[KernelChoice, ...] = ("xla", "native")
_ROW_COUNTS = {"xla": (2, 8), "native": (1, 2, 8, 16)}
_CONTEXT = 1024
_SLOTS = 16
_POSITION = 20
_ROUNDS = 15
_GREEDY = RowRules(Sampling(0.0, 0, 1.0, 0), 1, _CONTEXT)


def vocabulary_product(
    config: GemmaConfig, weights: GemmaWeights, x: Array, *, is_native: bool
) -> Array:
    rows = step_rows(len(x), is_native=is_native)
    return unembed(config, weights, pad_rows(x, rows.num_padded)[:, None], rows)


def draw_all(logits: Array, rules: Any, history: Array, positions: Array) -> Any:
    return jax.lax.map(lambda row: finish_row(*row), (logits, rules, history, positions))


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return (time.perf_counter() - began) * 1e3


class Parts:
    """The programs of one path and number of rows."""

    def __init__(self, engine: GemmaEngine, config: GemmaConfig, path: str, num_rows: int) -> None:
        is_native = path == "native"
        weights = engine._weights
        x = jnp.ones((num_rows, config.hidden_dim))
        vocabulary = jax.jit(partial(vocabulary_product, config, is_native=is_native))
        generator = np.random.default_rng(0)
        logits = jnp.asarray(generator.normal(size=(num_rows, config.vocabulary_size)), jnp.float32)
        rules = RuleArrays(config.vocabulary_size).of([_GREEDY] * num_rows, num_rows)
        history = jnp.zeros((num_rows, _CONTEXT), jnp.int32)
        positions = jnp.full(num_rows, _POSITION + 1, jnp.int32)
        draw = jax.jit(draw_all)
        rows = [DecodeRow(slot, _POSITION, _GREEDY) for slot in range(num_rows)]

        self.calls: dict[str, Callable[[], Any]] = {
            "whole step": lambda: engine.decode(rows, 1).tokens(),
            "product with the vocabulary": lambda: vocabulary(weights, x),
            "drawing": lambda: draw(logits, rules, history, positions),
        }
        self.ms: dict[str, list[float]] = {name: [] for name in self.calls}

    def run(self) -> None:
        for name, call in self.calls.items():
            self.ms[name].append(timed(call))


def main() -> None:
    settings = Settings()
    parts = {}
    for path in _PATHS:
        options = EngineOptions(settings.preset, _SLOTS, _CONTEXT, settings.cache_dir, kernels=path)
        engine = load(options, no_progress)
        for num_rows in _ROW_COUNTS[path]:
            parts[f"{path}, {num_rows}"] = Parts(engine, engine._config, path, num_rows)
    for one in parts.values():
        one.run()
        for times in one.ms.values():
            times.clear()
    for _ in range(_ROUNDS):
        for one in parts.values():
            one.run()
    load_now = Path("/proc/loadavg").read_text().split()[0]
    names = list(next(iter(parts.values())).calls)
    lines = [f"load after: {load_now}", "", "| ms | " + " | ".join(parts) + " |"]
    lines.append("|---|" + "---|" * len(parts))
    medians = {
        label: {name: statistics.median(one.ms[name]) for name in names}
        for label, one in parts.items()
    }
    for name in names:
        lines.append(f"| {name} | " + " | ".join(f"{m[name]:.1f}" for m in medians.values()) + " |")
    rest = [m["whole step"] - sum(m[name] for name in names[1:]) for m in medians.values()]
    lines.append("| what is left: the blocks | " + " | ".join(f"{ms:.1f}" for ms in rest) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
