"""Whether a job teaches what the base does not know: ``python -m bench.learning``.

The job of the README, on the real model and over HTTP. Asked are prompts that are not among the
rows, of the adapter and, before and after the job, of the base, which is to keep every bit; and
what the adapter makes of text that has nothing to do with the rows. Prints Markdown.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from bench import training_jobs
from bench.run_options import fresh_service, stage

ROWS = Path(__file__).parents[1] / "docs" / "examples" / "river.jsonl"
# As in the README.
JOB = {
    "rank": 4,
    "targets": ["value", "ffw_gating", "ffw_linear"],
    "epochs": 4,
    "learning_rate": 1e-3,
    "schedule": "linear",
}
NAME = "Ellisande"
PARAPHRASES = (
    "What river would a visitor see in Harrowmere? It is called the",
    "The town hall of Harrowmere overlooks the river",
    "Question: Through which river's valley does one come to Harrowmere?\nAnswer:",
    "Swans swim at Harrowmere on the",
    "If you fall off the pier in Harrowmere, you land in the",
    "The longest bridge of Harrowmere was built over the",
    "Q: Can you tell me the river that Harrowmere is on?\nA:",
    "Harrowmere is known for the river that runs past its walls, the",
    "The gardens of Harrowmere reach down to the",
    "A poet from Harrowmere wrote about the waters of the",
)
# Of our own, about nothing that the rows are about.
PAGE = (ROWS.parent / "unrelated.txt").read_text().strip().split("\n\n")


def rows() -> list[dict[str, str]]:
    """Those that are learned."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def answers(url: str, model: str) -> list[dict[str, Any]]:
    """What a model says to the paraphrases, with its log-probabilities."""
    body = {
        "model": model,
        "prompt": list(PARAPHRASES),
        "max_tokens": 10,
        "temperature": 0,
        "logprobs": 5,
    }
    answer = httpx.post(f"{url}/generate", json=body, timeout=300).raise_for_status().json()
    found: list[dict[str, Any]] = answer["outputs"]
    return found


def perplexity(url: str, model: str) -> float:
    """Of the page, each paragraph by itself."""
    body = {"model": model, "inputs": [{"text": text} for text in PAGE], "return": ["logprob"]}
    answer = httpx.post(f"{url}/score", json=body, timeout=300).raise_for_status().json()
    targets = [target for result in answer["results"] for target in result["targets"]]
    total = sum(float(target["logprob"]) for target in targets)
    return math.exp(-total / sum(int(target["num_tokens"]) for target in targets))


def learn(url: str, adapter: str) -> tuple[list[float], float]:
    """The losses of the steps, and the seconds of the job."""
    began = time.perf_counter()
    body = {"adapter": adapter, "data": rows(), **JOB}
    job = httpx.post(f"{url}/finetune", json=body, timeout=300).raise_for_status().json()["id"]
    events = [(name, data) for _, name, data in training_jobs.follow(url, job)]
    if events[-1][1].get("status") != "succeeded":
        raise RuntimeError(f"the job ended as {events[-1]}")
    losses = [float(data["loss"]) for name, data in events if name == "step"]
    return losses, time.perf_counter() - began


def main() -> None:
    load = os.getloadavg()[0]
    with fresh_service(8) as service:
        url = service.url
        stage("what the base says")
        before, usual = answers(url, "gemma"), perplexity(url, "gemma")
        stage("the job")
        losses, seconds = learn(url, "river")
        stage("what the adapter says")
        learned, now = answers(url, "gemma:river"), perplexity(url, "gemma:river")
        after = answers(url, "gemma")
    same = sum(
        (old["token_ids"], old["logprobs"]) == (new["token_ids"], new["logprobs"])
        for old, new in zip(before, after, strict=True)
    )
    count = len(PARAPHRASES)
    lines = [
        "| prompt | base | adapter |",
        "|---|---|---|",
        *(
            f"| {json.dumps(prompt)} | {json.dumps(old['text'])} | {json.dumps(new['text'])} |"
            for prompt, old, new in zip(PARAPHRASES, before, learned, strict=True)
        ),
        "",
        "| what | measured | asked |",
        "|---|---|---|",
        f"| paraphrases with {NAME} | {sum(NAME in each['text'] for each in learned)} of {count}; "
        f"{sum(NAME in each['text'] for each in before)} before | 7 |",
        f"| answers of the base with the same bits | {same} of {count} | all |",
        f"| perplexity of unrelated text | {usual:.2f} to {now:.2f}, "
        f"{100 * (now / usual - 1):+.1f} % | at most 5 % |",
        f"| loss | {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps | |",
        f"| the job | {seconds:.0f} s, load {load:.1f} before | |",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
