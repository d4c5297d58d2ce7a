"""Who compares what: every golden array and every stored answer is in one row of these tables.

A row's pattern is a regular expression for whole names. An array is named by its key in
``cases.npz``, or ``gradient.<key>``; an answer by its place in ``cases.json``, list items by their
tag. Those of Gemma 3 270M begin with ``real.``. The last column is how the test module reads it, so
a row cannot outlive the comparison it names.

What is not compared has its reason in `NOT_COMPARED_ARRAYS` and `NOT_COMPARED_ANSWERS`.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).parent
GOLDENS = TESTS / "goldens"
README = GOLDENS / "README.md"

# pattern | test module | how closely | how the module reads it
COMPARED_ARRAYS = [
    (r"fwd\.hidden", "goldens_forward", "2e-4", ['"fwd.hidden"']),
    (r"fwd\.logits", "goldens_forward", "2e-4", ['"fwd.logits"']),
    (r"fwd\.act\.(-1|\d)", "goldens_forward", "2e-4", ['f"fwd.act.{layer}"']),
    (r"score\.logits", "keras_training", "2e-4", ['"score.logits"']),
    (r"score\.logits_nomask", "keras_training", "2e-4", ['"score.logits_nomask"']),
    (r"score\.logits_half1", "keras_training", "2e-4", ['"score.logits_half1"']),
    (r"score\.loss", "keras_training", "2e-4", ['"score.loss"']),
    (r"gradient\.(loss|embeddings)", "score_gradient", "1e-4", ['"loss"', '"embeddings"']),
    (r"gradient\.block0", "score_gradient", "1e-4", ['"block0"']),
    (r"gradient\.nomask\.loss", "score_gradient", "1e-4", ['"nomask.loss"']),
    (r"gradient\.nomask\.embeddings", "score_gradient", "1e-4", ['"nomask.embeddings"']),
    (
        r"cache\.(prefill|step)_(logits|hidden)",
        "goldens_forward",
        "2e-4",
        [
            '"cache.prefill_logits"',
            '"cache.prefill_hidden"',
            '"cache.step_logits"',
            '"cache.step_hidden"',
        ],
    ),
    (r"cache\.chunk_logits", "goldens_forward", "2e-4", ['"cache.chunk_logits"']),
    (
        r"cache\.(prefill|step|chunk)_cache",
        "goldens_forward",
        "2e-4",
        ['"cache.prefill_cache"', '"cache.step_cache"', '"cache.chunk_cache"'],
    ),
    (
        r"gen\.(?!dict_nopre)\w+\.in_(token_ids|padding_mask)",
        "keras_generate",
        "exactly",
        ["packed[key].tolist() == rows[key].tolist()"],
    ),
    (r"gen\.[\w.]+\.token_ids", "keras_generate", "exactly", ['f"{prefix}.token_ids"']),
    (r"gen\.[\w.]+\.padding_mask", "keras_generate", "exactly", ['f"{prefix}.padding_mask"']),
    (
        r"holes\.\w+\.(none|stops)\.(token_ids|padding_mask)",
        "keras_generate",
        "exactly",
        ['holes[f"{name}.{kind}.{key}"]'],
    ),
    (r"gen\.beam3_all\.log_probs", "keras_generate", "2e-4", ['f"{prefix}.log_probs"']),
    (r"pre\.\w+\.x_token_ids", "keras_preprocessor", "exactly", ['f"pre.{tag}.x_token_ids"']),
    (r"pre\.\w+\.x_padding_mask", "keras_preprocessor", "exactly", ['f"pre.{tag}.x_padding_mask"']),
    (r"pre\.\w+\.y", "keras_preprocessor", "exactly", ['f"pre.{tag}.y"']),
    (r"pre\.\w+\.sw", "keras_preprocessor", "exactly", ['f"pre.{tag}.sw"']),
    (
        r"pre\.\w+\.gen_(token_ids|padding_mask)",
        "keras_preprocessor",
        "exactly",
        ['f"pre.{tag}.gen_token_ids"', 'f"pre.{tag}.gen_padding_mask"'],
    ),
    (
        r"pre\.(x_token_ids|x_padding_mask|y|sw)",
        "goldens_rows",
        "exactly",
        ['"pre.x_token_ids"', '"pre.x_padding_mask"', '"pre.y"', '"pre.sw"'],
    ),
    (
        r"train\.(x_token_ids|x_padding_mask|y|sw)",
        "goldens_rows",
        "exactly",
        ['"train.x_token_ids"', '"train.x_padding_mask"', '"train.y"', '"train.sw"'],
    ),
    (
        r"train\.lora\.\d\.(query|value)\.[ab][15]",
        "keras_training",
        "1e-4",
        ['f"train.lora.{place}1"', 'f"train.lora.{place}5"'],
    ),
    (r"train\.lora\.logits5", "lora_files", "3e-4", ['"train.lora.logits5"']),
    (
        r"train\.full\.(embeddings3|final_scale3|ffw_linear0_3)",
        "keras_training",
        "1e-4",
        ['"train.full.embeddings3"', '"train.full.final_scale3"', '"train.full.ffw_linear0_3"'],
    ),
    (
        r"bf16\.(hidden|logits)",
        "goldens_bfloat16",
        "exactly",
        ['"bf16.hidden"', '"bf16.logits"'],
    ),
    (
        r"bf16preset\.logits_loaded_default",
        "goldens_bfloat16",
        "2e-4",
        ['"bf16preset.logits_loaded_default"'],
    ),
    (r"int8\.kernel/[\w/]+", "int8_preset", "1.2e-7", ['f"kernel/{layer}"']),
    (r"int8\.float_logits", "int8_preset", "2e-4", ['["float_logits"]']),
    (r"int8\.logits", "int8_preset", "< 0.15", ['["logits"]']),
]

COMPARED_ANSWERS = [
    (r"meta\.param_count", "mathematics", "exactly", ['"param_count"']),
    (r"generate\.\w+\.text", "keras_generate", "exactly", ['case["text"]']),
    (
        r"generate\.\w+\.seed_state_after",
        "keras_generate",
        "exactly",
        ['case["seed_state_after"]'],
    ),
    (
        r"preprocess\.\w+\.generate_postprocess",
        "keras_preprocessor",
        "exactly",
        ['case["generate_postprocess"]'],
    ),
    (
        r"preprocess\.\w+\.dtypes\.\w+",
        "keras_preprocessor",
        "exactly",
        ['"x_padding_mask": "bool"'],
    ),
    (
        r"train\.\w+\.history\.(loss|sparse_categorical_accuracy)",
        "keras_training",
        "1e-4",
        ['expected["history"]', '{"loss", "sparse_categorical_accuracy"}'],
    ),
    (
        r"train\.\w+\.evaluate_(before|after)",
        "keras_training",
        "1e-4",
        ['"evaluate_before"', '"evaluate_after"'],
    ),
    (r"train\.lora\.lora_indices", "lora_files", "exactly", ['"lora_indices"']),
    (
        r"evaluate\.(one_batch_of_4|batches_of_3_then_1|no_sample_weight)",
        "keras_training",
        "1e-4",
        ['"one_batch_of_4"', '"batches_of_3_then_1"', '"no_sample_weight"'],
    ),
    (r"real\.\w+\.token_ids", "real_model_parity", "exactly", ['case["token_ids"]']),
    (r"real\.\w+\.prompt_logprobs", "real_model_parity", "5e-4", ['"prompt_logprobs"']),
    (r"real\.\w+\.next_top5", "real_model_parity", "2e-3", ['case["next_top5"]']),
    (r"real\.\w+\.greedy_margins", "real_model_parity", "2e-3", ['case["greedy_margins"]']),
    (r"real\.\w+\.greedy_text", "gguf_tokenizer", "exactly", ['case["greedy_text"]']),
    (r"real\.\w+\.greedy_token_ids", "real_model_parity", "exactly", ['case["greedy_token_ids"]']),
]

# What a comparison begins with.
INPUT_ARRAYS = [
    r"fwd\.(token_ids|padding_mask)",
    r"score\.target_ids",
    r"cache\.(token_ids|step_tokens|chunk_tokens)",
    r"gen\.dict_nopre\.in_(token_ids|padding_mask)",
    r"holes\.in_(token_ids|padding_mask)",
    r"train\.lora\.\d\.(query|value)\.a0",
    r"eval\.(token_ids|padding_mask|y|sw)",
]
# Questions, names of arrays, notes and versions.
ASKED = [
    r"meta\.(?!param_count).*",
    r"(\w+\.)*(note|arrays|tag)",
    r"cache\.(step|chunk)_index",
    r"generate\.\w+\.(prompts|max_length|stop_token_ids|resolved_stop|strip_prompt)",
    r"generate\.\w+\.sampler(\.\w+)?",
    r"preprocess\.(prompts|responses|sequence_length)",
    r"preprocess\.\w+\.(strings|(constructor|call)\.\w+)",
    r"train\.(strings|sequence_length)",
    r"train\.\w+\.(rank|alpha|targets|optimizer|learning_rate|momentum|batch_size|epochs)",
    r"real\.meta\..*",
    r"real\.\w+\.(name|prompt)",
]

# pattern | why
NOT_COMPARED_ARRAYS = [
    (
        r"score\.logits_zero_m1",
        "keras-hub drops what the intercept returns for the embeddings; here it is used, as its "
        "documentation says. A test asserts the difference.",
    ),
]
NOT_COMPARED_ANSWERS: list[tuple[str, str]] = []


def arrays() -> Counter[str]:
    """Name -> in how many golden sets."""
    found: Counter[str] = Counter()
    for path in GOLDENS.glob("*/*.npz"):
        prefix = "" if path.stem == "cases" else f"{path.stem}."
        with np.load(path) as archive:
            found.update(prefix + key for key in archive.files)
    return found


def answers() -> Counter[str]:
    """Name -> in how many golden sets, everything that stands in their JSON files."""
    found: Counter[str] = Counter()
    for path in GOLDENS.glob("*/*cases.json"):
        content = json.loads(path.read_text())
        is_real = path.parent.name == "gemma3_270m"
        if is_real and isinstance(content, dict):
            content = {"meta": content["meta"]} | {case["name"]: case for case in content["cases"]}
        found.update(places(content, "real" if is_real else ""))
    return found


def places(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(item.get("tag", index)): item for index, item in enumerate(value)}
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, f"{place}.{key}".lstrip("."))
    else:
        yield place


KINDS = {
    "arrays": (arrays(), COMPARED_ARRAYS, INPUT_ARRAYS, NOT_COMPARED_ARRAYS),
    "answers": (answers(), COMPARED_ANSWERS, ASKED, NOT_COMPARED_ANSWERS),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def patterns(kind: str) -> list[str]:
    _, compared, asked, not_compared = KINDS[kind]
    return [row[0] for row in compared] + asked + [pattern for pattern, _ in not_compared]


def total(found: Counter[str], rows: list[str]) -> int:
    """How many things, over all sets, some row is about."""
    return sum(num for name, num in found.items() if any(re.fullmatch(row, name) for row in rows))


@EACH_KIND
def test_everything_stored_is_in_exactly_one_row(kind):
    wrong = {}
    for name in KINDS[kind][0]:
        rows = [row for row in patterns(kind) if re.fullmatch(row, name)]
        if len(rows) != 1:
            wrong[name] = rows
    assert wrong == {}


@EACH_KIND
def test_no_row_is_about_nothing(kind):
    names = list(KINDS[kind][0])
    assert [row for row in patterns(kind) if not any(re.fullmatch(row, n) for n in names)] == []


@pytest.mark.parametrize("row", COMPARED_ARRAYS + COMPARED_ANSWERS, ids=lambda row: row[0])
def test_the_named_module_reads_it_and_compares_that_closely(row):
    _, module, closely, reads = row
    source = (TESTS / f"test_{module}.py").read_text()
    code = source.replace(ast.get_docstring(ast.parse(source), clean=False) or "", "")
    assert [expression for expression in reads if expression not in code] == []
    assert closely == "exactly" or closely in code


def test_the_readme_states_how_many_are_compared():
    counts = {}
    for kind, (found, compared, asked, not_compared) in KINDS.items():
        rows = [row[0] for row in compared]
        counts[kind] = [
            found.total(),
            total(found, rows),
            total(found, asked),
            total(found, [pattern for pattern, _ in not_compared]),
        ]
    rows = [f"| {kind} | {' | '.join(map(str, numbers))} |" for kind, numbers in counts.items()]
    assert [row for row in rows if row not in README.read_text()] == []
