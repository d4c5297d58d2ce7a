"""Prints how far we are from transformers: ``python -m tests.gold.differences LONG_CASES_JSON``.

Runs in the project's environment, from the repository's root. In nats, the largest of each case::

    prompt  full forward, and transformers: tokens of the prompt
    top     decode, and transformers: the five likeliest after the prompt
    margin  decode, and transformers: best less second, 24 times
    drawn   decode, and full forward: the drawn token, 24 times
    others  decode, and full forward: the twenty likeliest, 24 times
    stored  these answers of transformers and those in tests/goldens, where the prompt is the same
    greedy  decode, and transformers: how many of the 24 drawn tokens are the same
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from model.engine import load
from model.progress import no_progress
from model.slots import EngineOptions, SampledToken
from tests.gold import our_answers
from tests.gold.our_answers import FullForward

_GOLDENS = Path("tests/goldens/gemma3_270m")

Case = dict[str, Any]


def main(path: Path) -> None:
    short = json.loads((_GOLDENS / "cases.json").read_text())
    new = json.loads(path.read_text())["cases"]
    long = json.loads((_GOLDENS / "long_cases.json").read_text())["cases"]
    stored = {case["name"]: case for case in long}
    cache_dir = Path(os.environ["GEMMA_TEST_CACHE_DIR"])
    engine = load(EngineOptions("gemma3_270m", 2, 4096, cache_dir), no_progress)
    for case in short + new:
        full = our_answers.full_forward(engine._config, engine._weights, case)
        [drawn] = our_answers.cached(engine, [case])
        found = {"prompt": _prompt_difference(full.prompt, case)}
        found |= _differences(case, full, drawn)
        before = stored.get(case.get("name"))
        if before is not None and before["token_ids"] == case["token_ids"]:
            found["stored"] = _prompt_difference(np.array(before["prompt_logprobs"]), case)
        greedy = sum(
            token.token_id == id_
            for token, id_ in zip(drawn, case["greedy_token_ids"], strict=True)
        )
        numbers = "  ".join(f"{key} {value:.1e}" for key, value in found.items())
        name = case.get("name", case.get("prompt"))
        sys.stdout.write(f"{name:34}  {numbers}  greedy {greedy}/{len(drawn)}\n")
        sys.stdout.flush()


def _prompt_difference(logprobs: np.ndarray, case: Case) -> float:
    return float(np.abs(logprobs - case["prompt_logprobs"][-len(logprobs) :]).max())


def _differences(case: Case, full: FullForward, drawn: list[SampledToken]) -> dict[str, float]:
    first = dict(drawn[0].top)
    margins = [token.top[0][1] - token.top[1][1] for token in drawn]
    pairs = {
        "top": [(first[id_], logprob) for id_, logprob in case["next_top5"]],
        "margin": list(zip(margins, case["greedy_margins"], strict=True)),
        "drawn": [
            (token.logprob, full.following[i, token.token_id]) for i, token in enumerate(drawn)
        ],
        "others": [
            (logprob, full.following[i, id_])
            for i, token in enumerate(drawn)
            for id_, logprob in token.top
        ],
    }
    return {key: max(abs(a - b) for a, b in values) for key, values in pairs.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
