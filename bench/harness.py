"""Requests as an evaluation harness makes them: ``python -m bench.harness [rounds]``.

`loglikelihood`, of a continuation behind a context, and `loglikelihood_rolling`, of a whole text,
over HTTP with texts; and the same from transformers in a process of its own, which gets token ids
and batches of 8, in turns. Ours come once as a call for each request, 16 at a time, and once as a
call for each 64 contexts with their choices. Then what is captured after the last block, beside
what enters the final norm there. Prints Markdown.
"""

import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bench.environments import default_directory, environment
from bench.model_files import model_files
from bench.peer_process import PeerProcess
from bench.run_options import PRESET, fresh_service, stage
from model.opened_preset import codec_of
from model.presets.resolve import open_preset
from model.slots import TextCodec
from service.client import GemmaClient
from service.settings import Settings

_ROUNDS = 3
_BATCH_SIZE = 8
_CALLS_AT_ONCE = 16
_INPUTS_OF_CALL = 64
_CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo",
    "Russia": "Moscow", "Greece": "Athens", "Austria": "Vienna", "Norway": "Oslo", "Cuba": "Havana",
    "Peru": "Lima", "Kenya": "Nairobi", "Poland": "Warsaw", "Chile": "Santiago", "Iran": "Tehran",
    "Germany": "Berlin", "Ireland": "Dublin", "Finland": "Helsinki", "Turkey": "Ankara",
    "Hungary": "Budapest", "Sweden": "Stockholm", "Latvia": "Riga", "Iraq": "Baghdad",
    "Thailand": "Bangkok", "Denmark": "Copenhagen",
}  # fmt: skip
_CONTEXTS = (
    "Question: Which city is the capital of {country}, the seat of its government?\nAnswer:",
    "On the map of the world that hangs in our classroom the capital of {country} is marked by a "
    "small red star. The city with the star is",
)
_NUM_CHOICES = 4

Request = tuple[str, str]
Row = tuple[list[int], int]


def documents() -> list[tuple[str, list[str]]]:
    """Contexts, and the continuations to choose from; the right one first."""
    cities = list(_CAPITALS.values())
    return [
        (
            context.format(country=country),
            [f" {cities[(number + step) % len(cities)]}" for step in range(_NUM_CHOICES)],
        )
        for context in _CONTEXTS
        for number, country in enumerate(_CAPITALS)
    ]


class Harness:
    """The two kinds of requests on a running service."""

    def __init__(self, client: GemmaClient) -> None:
        self._client = client

    def loglikelihood(self, requests: list[Request]) -> list[float]:
        """A call for each."""

        def one(request: Request) -> float:
            context, continuation = request
            [result] = self._client.score([{"context": context, "targets": [continuation]}]).results
            return _sum(result.targets[0].logprob)

        with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
            return list(pool.map(one, requests))

    def choices(self, given: list[tuple[str, list[str]]]) -> list[float]:
        """All continuations of a context together, many contexts a call."""
        inputs = [{"context": context, "targets": targets} for context, targets in given]
        found = []
        for first in range(0, len(inputs), _INPUTS_OF_CALL):
            answer = self._client.score(inputs[first : first + _INPUTS_OF_CALL])
            for result in answer.results:
                found += [_sum(target.logprob) for target in result.targets]
        return found

    def loglikelihood_rolling(self, texts: list[str]) -> list[float]:
        answer = self._client.score([{"text": text} for text in texts])
        return [_sum(result.targets[0].logprob) for result in answer.results]

    def last_stream(self, text: str, num_tokens: int) -> np.ndarray:
        """The residual stream after the last block at each token."""
        last = self._client.info().layers - 1
        capture = [{"layers": [last], "positions": "all", "dtype": "float32"}]
        [result] = self._client.score([{"text": text}], capture=capture).results
        numbers = np.frombuffer(result.captures[0].tensor.data, "<f4")
        return numbers.reshape(num_tokens, -1).astype(np.float64)


def _sum(logprob: float | None) -> float:
    assert logprob is not None, "it is asked for by default"
    return logprob


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else _ROUNDS
    codec = codec_of(open_preset(PRESET, Settings().cache_dir))
    given = documents()
    requests = [(context, target) for context, targets in given for target in targets]
    rows = [_row(codec, *request) for request in requests]
    texts = [context + targets[0] + "." for context, targets in given[::7]]
    rolling = [_row(codec, "", text) for text in texts]
    directory = default_directory()
    stage("environment and weights of transformers")
    python = environment("transformers", directory)
    files = model_files(directory / "models")
    peer = PeerProcess(
        *(python, "run_loglikelihood.py", [os.fspath(files.hugging_face)]),
        directory / "loglikelihood.log",
    )
    load = os.getloadavg()[0]
    with peer, fresh_service(8) as service, GemmaClient(service.url, timeout_s=600) as client:
        versions = peer.versions()
        harness = Harness(client)
        peer.ask({"rows": rows[:_BATCH_SIZE], "batch_size": _BATCH_SIZE})
        ratios: dict[str, list[tuple[float, float]]] = {"each": [], "choices": []}
        farthest = 0.0
        for number in range(rounds):
            stage(f"{len(requests)} requests, round {number + 1}")
            for name in ratios:
                began = time.perf_counter()
                ours = harness.loglikelihood(requests) if name == "each" else harness.choices(given)
                seconds = time.perf_counter() - began
                theirs = peer.ask({"rows": rows, "batch_size": _BATCH_SIZE})
                ratios[name].append((theirs["seconds"], seconds))
                farthest = max(farthest, _distance(ours, theirs["logprobs"]))
        their_rolling = peer.ask({"rows": rolling, "batch_size": _BATCH_SIZE})["logprobs"]
        farthest_rolling = _distance(harness.loglikelihood_rolling(texts), their_rolling)
        stream = np.array(peer.ask({"stream_of": rolling[0][0]})["stream"])
        captured = harness.last_stream(texts[0], len(stream))
        wrong = np.linalg.norm(captured - stream) / np.linalg.norm(stream)
    right = sum(max(ours[i : i + 4]) == ours[i] for i in range(0, len(ours), _NUM_CHOICES))
    lines = [
        f"Load before: {load:.2f}. {', '.join(map(' '.join, versions.items()))}.",
        "",
        f"| {len(requests)} requests of {sum(len(ids) for ids, _ in rows):,} tokens in all "
        "| transformers, s | ours, s | ratio (asked: 2) |",
        "|---|---|---|---|",
    ]
    titles = {"each": "a call each, 16 at a time", "choices": "contexts with their choices"}
    for name, pairs in ratios.items():
        their, own = (statistics.median(each) for each in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        lines.append(f"| {titles[name]} | {their:.1f} | {own:.1f} | {ratio:.2f} × |")
    lines += [
        "",
        f"Log-likelihoods differ by at most {farthest:.1e} (asked: 2e-3), of {len(texts)} whole "
        f"texts by {farthest_rolling:.1e}. {right} of {len(given)} right.",
        "",
        f"The stream after the last block differs by {wrong:.1e} of its norm.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _row(codec: TextCodec, context: str, continuation: str) -> Row:
    """Token ids, and how many of the last ones are scored."""
    assert codec.bos_id is not None, "the demo model has a tokenizer"
    whole = codec.encode(context + continuation)
    return [codec.bos_id, *whole], len(whole) - len(codec.encode(context))


def _distance(ours: list[float], theirs: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
