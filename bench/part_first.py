"""The first call of each kind after a start against later ones: nothing may be compiled for it."""

import random
import statistics
import time
from typing import Any

import httpx

from bench.mixes import prompt
from bench.run_options import RunOptions, Services, fresh_service, stage
from bench.service_metrics import compilations_while_serving

_STARTS = 3
_LATER_CALLS = 4
_CALL_SECONDS = 120
_PROMPT_TOKENS = 16
_NEW_TOKENS = 16
_SLOTS = 8

_KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature, top-p 0.9": {"temperature": 1.0, "top_p": 0.9, "seed": 1},
    "n = 8": {"temperature": 1.0, "seed": 1, "n": 8},
    "20 log-probabilities": {"temperature": 0, "logprobs": 20},
    "penalties": {
        "temperature": 0,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
    },
    "beam, 4": {"sampler": "beam", "num_beams": 4},
    "contrastive, k 4": {"sampler": "contrastive", "top_k": 4, "contrastive_alpha": 0.6},
}


def measure(options: RunOptions, services: Services) -> dict[str, Any]:
    """Of each kind: medians of the first calls of several starts and of the later ones."""
    services.stop()
    generator = random.Random(f"{options.seed} first")
    first: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    later: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    refused: dict[str, str] = {}
    compilations = 0
    for _ in range(options.rounds(_STARTS)):
        stage("first calls: starting a service")
        with fresh_service(_SLOTS) as service, httpx.Client(base_url=service.url) as client:
            for kind in [kind for kind in _KINDS if kind not in refused]:
                stage(f"first call: {kind}")
                try:
                    first[kind].append(_call(client, generator, kind))
                    later[kind] += [_call(client, generator, kind) for _ in range(_LATER_CALLS)]
                except _Refused as refusal:
                    stage(f"skipped {kind}: {refusal}")
                    refused[kind] = str(refusal)
            compilations = max(compilations, compilations_while_serving(service.url))
    kinds = {
        kind: {"refused": refused[kind]} if kind in refused else _row(first[kind], later[kind])
        for kind in _KINDS
    }
    return {"kinds": kinds, "compilations": compilations}


def _row(first: list[float], later: list[float]) -> dict[str, float]:
    usual = statistics.median(later)
    return {
        "first": statistics.median(first),
        "later": usual,
        "ratio": statistics.median(first) / usual,
    }


class _Refused(Exception):
    """The service does not offer this kind."""


def _call(client: httpx.Client, generator: random.Random, kind: str) -> float:
    body = {
        "prompt": list(prompt(generator, _PROMPT_TOKENS)),
        "max_tokens": _NEW_TOKENS,
        "ignore_eos": True,
        **_KINDS[kind],
    }
    began = time.perf_counter()
    response = client.post("/generate", json=body, timeout=_CALL_SECONDS)
    seconds = time.perf_counter() - began
    if response.status_code == 422:
        errors = response.json()["errors"]
        reasons = ", ".join(f"{error['pointer']} {error['detail']}" for error in errors)
        raise _Refused(f"the service answered 422: {reasons}")
    response.raise_for_status()
    return seconds
