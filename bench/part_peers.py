"""Ours and other implementations on the same weights, taking turns: ours, theirs, ours, theirs.

Both get the same prompts, all at once, and are timed from the first byte sent to the last token;
ours over HTTP, theirs as a call in their own process. Only figures of one such block are compared,
and a machine that gets slower meanwhile gets slower for both.
"""

import asyncio
import os
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.environments import environment
from bench.mixes import prompt
from bench.model_files import ModelFiles, model_files
from bench.part_closed import NEW_TOKENS, PROMPT_TOKENS
from bench.peer_process import Answer, PeerFailed, PeerProcess
from bench.run_options import PRESET, RunOptions, Services, stage
from bench.streams import Ask, together

_ROUNDS = 2
_PREFILL_TOKENS = 512
_PREFILL_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to run the same model.

    Attributes:
        title: In tables.
        environment: None is the project's own.
        script: In ``bench/peers``.
        model: Which of the `ModelFiles` it reads; ``name`` for the name of the preset.
        format: The GGUF format, for llama.cpp.
    """

    title: str
    environment: str | None
    script: str
    model: str
    format: str | None = None


PEERS = {
    "own-xla": Peer("this service, --kernels xla", None, "run_own_xla.py", "name"),
    "bare-jax": Peer("bare JAX loop, float32", None, "run_bare_jax.py", "hugging_face"),
    "keras-hub": Peer("keras-hub on JAX, float32", "keras-hub", "run_keras_hub.py", "keras"),
    "transformers": Peer(
        "transformers, float32", "transformers", "run_transformers.py", "hugging_face"
    ),
    "llama-cpp-f32": Peer("llama.cpp, F32", "llama-cpp", "run_llama_cpp.py", "gguf", "f32"),
    "llama-cpp-f16": Peer("llama.cpp, F16", "llama-cpp", "run_llama_cpp.py", "gguf", "f16"),
    "llama-cpp-q4-k-m": Peer(
        "llama.cpp, Q4_K_M", "llama-cpp", "run_llama_cpp.py", "gguf", "q4_k_m"
    ),
}


def measure(options: RunOptions, services: Services, name: str) -> dict[str, Any]:
    """What one peer does beside us, as far as it comes, and the reason if it comes no further."""
    peer = PEERS[name]
    result: dict[str, Any] = {"title": peer.title, "by_streams": {}}
    try:
        stage(f"{peer.title}: environment and weights")
        files = model_files(options.environments / "models")
        with _start(peer, files, options.environments, name) as process:
            result["versions"] = process.versions()
            for num_streams in options.stream_counts:
                url = services.for_streams(num_streams).url
                stage(f"{peer.title}: {num_streams} sequences, in turns with ours")
                result["by_streams"][str(num_streams)] = _in_turns(
                    options, url, process, num_streams
                )
            stage(f"{peer.title}: a prompt of {_PREFILL_TOKENS} tokens, in turns with ours")
            result["prefill"] = _prefill(options, services.for_streams(1).url, process, name)
    except PeerFailed as failure:
        stage(f"{peer.title}: {failure}")
        result["failure"] = str(failure)
    return result


def _start(peer: Peer, files: ModelFiles, directory: Path, name: str) -> PeerProcess:
    # Not resolved: a virtual environment's python is a link out of it.
    python = Path(sys.executable)
    if peer.environment is not None:
        python = environment(peer.environment, directory)
    model = Path(PRESET) if peer.model == "name" else getattr(files, peer.model)
    arguments = [os.fspath(model)]
    if peer.format is not None:
        arguments += [peer.format, os.fspath(model.parent)]
    return PeerProcess(python, peer.script, arguments, directory / f"{name}.log")


def _in_turns(
    options: RunOptions, url: str, process: PeerProcess, num_streams: int
) -> dict[str, Any]:
    """Tokens a second of both; the peer's first call at this shape is kept apart."""
    generator = random.Random(f"{options.seed} {num_streams}")
    prompts = [prompt(generator, PROMPT_TOKENS) for _ in range(num_streams)]
    first = process.generate(prompts, NEW_TOKENS)
    ours, theirs = [], []
    for _ in range(options.rounds(_ROUNDS)):
        ours.append(_ours(url, prompts, NEW_TOKENS))
        theirs.append(process.generate(prompts, NEW_TOKENS))
    num_tokens = num_streams * NEW_TOKENS
    later = statistics.median(answer.seconds for answer in theirs)
    equal = map(list.__eq__, ours[-1].token_ids, theirs[-1].token_ids)
    return {
        "ours": [num_tokens / answer.seconds for answer in ours],
        "theirs": [num_tokens / answer.seconds for answer in theirs],
        "new_shape_seconds": first.seconds - later,
        "equal_rows": sum(equal),
    }


def _prefill(options: RunOptions, url: str, process: PeerProcess, name: str) -> dict[str, Any]:
    """Prompt tokens a second up to the first new one.

    Another prompt each time and for each peer, so that our service has none of it cached.
    """
    generator = random.Random(f"{options.seed} {name}")
    prompts = [[prompt(generator, _PREFILL_TOKENS)] for _ in range(options.rounds(_PREFILL_ROUNDS))]
    first = process.generate([prompt(generator, _PREFILL_TOKENS)], 1)
    pairs = [(_ours(url, one, 1), process.generate(one, 1)) for one in prompts]
    return {
        "ours": [_PREFILL_TOKENS / ours.seconds for ours, _ in pairs],
        "theirs": [_PREFILL_TOKENS / theirs.seconds for _, theirs in pairs],
        "new_shape_seconds": first.seconds - statistics.median(t.seconds for _, t in pairs),
        "equal_rows": sum(ours.token_ids == theirs.token_ids for ours, theirs in pairs),
    }


def _ours(url: str, prompts: list[tuple[int, ...]], num_new_tokens: int) -> Answer:
    records = asyncio.run(together(url, [Ask(one, num_new_tokens) for one in prompts]))
    seconds = max(record.arrivals[-1][0] for record in records)
    return Answer(seconds, [record.token_ids for record in records])
