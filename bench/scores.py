"""What scores cost over HTTP on this machine: ``python -m bench.scores [rounds]``.

One service, and each comparison in turns: calls of one row at once against one call of all of them,
short calls together against one after another, a context with many targets against the same with
one, a text that is attributed against its score alone, streams beside scores against streams alone,
and the memory of a long text. Then how complete integrated gradients are. Prints Markdown.
"""

import asyncio
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.mixes import prompt
from bench.run_options import PRESET, fresh_service
from bench.service_metrics import compilations_while_serving
from bench.service_process import resident_bytes
from bench.streams import Ask, together
from bench.summary import percentile, token_gaps
from model.backbone_lora import save_lora
from model.keras_backbone import KerasBackbone
from model.preset_source import open_source

_ROUNDS = 5
_ROWS = 64
_ROW_TOKENS = 64
_SHORT_CALLS = 16
_SHORT_TOKENS = 4
# One token each, and so is the word behind them.
_WORDS = (
    *("one", "two", "red", "old", "new", "good", "small", "long"),
    *("high", "few", "big", "own", "sure", "free", "true", "full"),
)
_LONG_TOKENS = 2_000
_ATTRIBUTED_TOKENS = 128
_TEXTS = (
    ("The Eiffel Tower is a famous landmark in the city of", " Paris"),
    ("Q: What is the capital of Japan?\nA:", " Tokyo"),
    (
        "Once upon a time there was a little girl who lived in a village near the forest. Whenever "
        "she went out, the little girl wore a red",
        " riding",
    ),
)
_MODELS = ("gemma", "gemma:a", "gemma:b")
_VERSION_ROWS = 8
_VERSION_TOKENS = (12, 20, 40)
_STREAMS = 4
_STREAM_TOKENS = 256


class Calls:
    """Calls of ``/score``, from threads where several are to be on their way at once.

    Args:
        url: Of the service.
        num_rounds: How often a comparison is repeated.
    """

    def __init__(self, url: str, num_rounds: int) -> None:
        self._url = url
        self._num_rounds = num_rounds

    def seconds(self, *bodies: dict[str, Any]) -> float:
        """Until all of them are answered, sent at once."""
        with (
            httpx.Client(base_url=self._url, timeout=None) as client,
            ThreadPoolExecutor(len(bodies)) as pool,
        ):
            began = time.perf_counter()
            # Taken out, so that one that fails is an error of the measurement.
            list(pool.map(partial(_post, client), bodies))
            return time.perf_counter() - began

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        with httpx.Client(base_url=self._url, timeout=None) as client:
            return _post(client, body)

    def compare(self, what: str, first: Callable[[], float], second: Callable[[], float]) -> str:
        """A line with both medians and that of the ratios, of rounds after one that is for nothing.

        A round calls one and then the other, so that both meet the machine as it is.
        """
        first(), second()
        pairs = [(first(), second()) for _ in range(self._num_rounds)]
        ratio = statistics.median(one / other for one, other in pairs)
        medians = (statistics.median(each) * 1e3 for each in zip(*pairs, strict=True))
        return f"| {what} | {' | '.join(f'{ms:.0f}' for ms in medians)} | {ratio:.2f} |"


def _post(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/score", json=body)
    response.raise_for_status()
    found: dict[str, Any] = response.json()
    return found


def rows(generator: random.Random, count: int, num_tokens: int) -> list[dict[str, Any]]:
    return [{"token_ids": list(prompt(generator, num_tokens))} for _ in range(count)]


def packed(calls: Calls, generator: random.Random) -> str:
    inputs = rows(generator, _ROWS, _ROW_TOKENS)
    return calls.compare(
        f"{_ROWS} calls of one row of {_ROW_TOKENS} tokens against one call of {_ROWS} rows",
        lambda: calls.seconds(*[{"inputs": [each]} for each in inputs]),
        lambda: calls.seconds({"inputs": inputs}),
    )


def short(calls: Calls, generator: random.Random) -> str:
    bodies = [{"inputs": [each]} for each in rows(generator, _SHORT_CALLS, _SHORT_TOKENS)]
    return calls.compare(
        f"{_SHORT_CALLS} calls of {_SHORT_TOKENS} tokens in turn against together",
        lambda: sum(calls.seconds(body) for body in bodies),
        lambda: calls.seconds(*bodies),
    )


def targets(calls: Calls, num_context: int) -> str:
    """The context is a word of one token again and again, behind bos."""
    context = " the" * (num_context - 1)
    many = {"inputs": [{"context": context, "targets": [f" {word} day" for word in _WORDS]}]}
    one = {"inputs": [{"context": context, "targets": [" one day"]}]}
    [result] = calls.post(many)["results"]
    assert result["prompt_tokens"] == num_context
    assert [target["num_tokens"] for target in result["targets"]] == [2] * len(_WORDS)
    return calls.compare(
        f"a context of {num_context} tokens with {len(_WORDS)} targets of 2 against one target",
        lambda: calls.seconds(many),
        lambda: calls.seconds(one),
    )


def attributed(calls: Calls, generator: random.Random, *, num_targets: int) -> str:
    """Gradients of the last tokens of a text, with the score that every answer has."""
    [given] = rows(generator, 1, _ATTRIBUTED_TOKENS)
    num_context = _ATTRIBUTED_TOKENS - num_targets
    given["target_mask"] = [0] * num_context + [1] * num_targets
    asked = {"inputs": [given], "attribution": {"method": "gradient", "of": "loss_sum"}}
    return calls.compare(
        f"{_ATTRIBUTED_TOKENS} tokens with {num_targets} to be scored, attributed against scored",
        lambda: calls.seconds(asked),
        lambda: calls.seconds({"inputs": [given]}),
    )


def completeness(calls: Calls) -> str:
    """Of integrated gradients with all steps, for some texts and layers."""
    lines = ["| target | layer | completeness error | s |", "|---|---|---|---|"]
    method = {"method": "integrated_gradients", "of": "target_logprob"}
    for context, target in _TEXTS:
        for layer in (-1, 4, 12):
            body = {
                "inputs": [{"context": context, "targets": [target]}],
                "attribution": {**method, "layer": layer},
            }
            began = time.perf_counter()
            [result] = calls.post(body)["results"]
            seconds = time.perf_counter() - began
            error = result["attribution"]["completeness_error"]
            lines.append(f"| {target} | {layer} | {error:.2%} | {seconds:.1f} |")
    return "\n".join(lines)


def versions(calls: Calls, what: str, inputs: list[dict[str, Any]]) -> str:
    """Three versions compared in one call, and then each in a call of its own."""
    return calls.compare(
        f"{len(_MODELS)} versions of {len(inputs)} rows of {what} in one pass against "
        f"{len(_MODELS)} calls",
        lambda: calls.seconds({"inputs": inputs, "models": _MODELS}),
        lambda: sum(calls.seconds({"inputs": inputs, "model": model}) for model in _MODELS),
    )


def answers(generator: random.Random, count: int, num_tokens: int) -> list[dict[str, Any]]:
    """Rows whose last token alone is scored."""
    found = rows(generator, count, num_tokens)
    return [{**each, "target_mask": [0] * (num_tokens - 1) + [1]} for each in found]


def gaps(url: str, calls: Calls, generator: random.Random) -> str:
    """99th percentile of the gaps of streams, with scores that never end and without."""

    def streams() -> float:
        asks = [Ask(prompt(generator, 16), _STREAM_TOKENS) for _ in range(_STREAMS)]
        records = asyncio.run(together(url, asks))
        return percentile([gap for record in records for gap in token_gaps(record)], 99)

    def beside() -> float:
        is_over = threading.Event()

        def score() -> None:
            while not is_over.is_set():
                calls.post({"inputs": rows(generator, 4, 200)})

        with ThreadPoolExecutor(1) as pool:
            scoring = pool.submit(score)
            try:
                return streams()
            finally:
                is_over.set()
                scoring.result()

    return calls.compare(
        f"p99 gap of {_STREAMS} streams beside scores against alone", beside, streams
    )


def memory(pid: int, calls: Calls, generator: random.Random) -> str:
    body = {"inputs": rows(generator, 1, _LONG_TOKENS)}
    at_rest = resident_bytes(pid)
    peak = at_rest
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(calls.post, body)
        while not scoring.done():
            peak = max(peak, resident_bytes(pid))
            time.sleep(0.005)
        scoring.result()
    return f"a text of {_LONG_TOKENS} tokens: {(peak - at_rest) / 1e6:.0f} MB above rest"


def adapters(directory: Path) -> list[str]:
    """Files of random numbers, one for each model but the base, as options of a service."""
    source = open_source(PRESET, load_weights=False)
    backbone = KerasBackbone.from_source(source, load_weights=False)
    backbone.enable_lora(8)
    draw = np.random.default_rng(0)
    options = []
    for _, _, name in (model.partition(":") for model in _MODELS[1:]):
        for holder in backbone.lora_layers.values():
            for variable in (holder.lora_kernel_a, holder.lora_kernel_b):
                variable.assign(0.02 * draw.normal(size=variable.shape))
        save_lora(path := directory / f"{name}.lora.h5", backbone)
        options.append(f"--adapter={name}={path}")
    return options


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else _ROUNDS
    generator = random.Random("scores")
    tell(f"load before: {os.getloadavg()[0]:.2f}")
    with (
        tempfile.TemporaryDirectory() as directory,
        fresh_service(8, *adapters(Path(directory))) as service,
    ):
        calls = Calls(service.url, rounds)
        tell(memory(service.worker_pid(), calls, generator))
        tell("\n| what | ms | ms | ratio |\n|---|---|---|---|")
        tell(targets(calls, 256))
        tell(targets(calls, 300))
        tell(attributed(calls, generator, num_targets=1))
        tell(attributed(calls, generator, num_targets=_ATTRIBUTED_TOKENS - 1))
        tell(short(calls, generator))
        tell(packed(calls, generator))
        for num_tokens in _VERSION_TOKENS:
            given = answers(generator, _VERSION_ROWS, num_tokens)
            tell(versions(calls, f"{num_tokens} tokens, the last scored", given))
        given = rows(generator, _VERSION_ROWS, _ROW_TOKENS)
        tell(versions(calls, f"{_ROW_TOKENS} tokens, all scored", given))
        tell(gaps(service.url, calls, generator))
        tell(f"\n{completeness(calls)}")
        tell(f"\ncompilations while serving: {compilations_while_serving(service.url)}")


def tell(text: str) -> None:
    """At once, as what follows may take minutes."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
