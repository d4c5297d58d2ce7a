"""`GemmaCausalLM.generate` and `.stream` against what keras-hub 0.32 generated, and by other roads.

| arrays, of gemma1_tiny, gemma2_tiny and gemma3_tiny | compared |
|---|---|
| gen.<tag>.in_token_ids, .in_padding_mask | what the preprocessor makes of the prompts, exactly |
| gen.<tag>.token_ids, .padding_mask | what generate returns for them as a dict, exactly |
| text of every case | what generate returns for the prompts, exactly |
| seed_state_after | the sampler's variables, exactly |
| gen.beam3_all.log_probs | log-probabilities of all beams, 2e-4 |
| holes.<sampler>.<stops>.token_ids, .padding_mask | what generate returns, exactly |

beam3_none, beam3_auto and beam3_all need ``compat="keras_hub"``: without it the row with the
longest prompt differs. No other golden does.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from model import samplers
from model.causal_lm import GemmaCausalLM
from model.generation import width_bucket
from model.keras_tokenizer import GemmaTokenizer
from model.preprocessor import GemmaCausalLMPreprocessor
from model.presets.keras_directory import KerasPreset
from tests import goldens

CASES = {
    (name, case["tag"]): case
    for name in goldens.TINY_PRESETS
    for case in goldens.cases(name)["generate"]
}
RAGGED_BEAMS = ("beam3_none", "beam3_auto", "beam3_all")


def task(name):
    """A model with its preprocessor, whose backbone all tests share."""
    tokenizer = GemmaTokenizer(KerasPreset.open(goldens.preset_directory(name)).tokenizer_proto())
    return GemmaCausalLM(goldens.backbone(name), GemmaCausalLMPreprocessor(tokenizer, 24))


@pytest.fixture(scope="module")
def tasks():
    return {name: task(name) for name in goldens.TINY_PRESETS}


def sampler_of(case):
    described = case.get("sampler", "greedy")
    if isinstance(described, str):
        return described
    config = {key: value for key, value in described.items() if key != "name"}
    if case["tag"] in RAGGED_BEAMS:
        config["compat"] = "keras_hub"
    return samplers.get({"class_name": described["name"], "config": config})


def use(model, sampler):
    """Compiles anew only for another sampler, as the programs go with it."""
    is_greedy = isinstance(model.sampler, samplers.GreedySampler) and not model.run_eagerly
    if sampler != "greedy" or not is_greedy:
        model.compile(sampler=sampler)


def state_of(sampler):
    return [] if isinstance(sampler, str) else [np.asarray(v) for v in sampler.variables]


def options_of(case):
    stops = case["stop_token_ids"]
    return {
        "max_length": case["max_length"],
        "stop_token_ids": tuple(stops) if isinstance(stops, list) else stops,
        "strip_prompt": case.get("strip_prompt", False),
    }


@pytest.mark.parametrize(("name", "tag"), CASES)
def test_rows_and_texts_equal_keras_hub(tasks, name, tag):
    case, given, model = CASES[name, tag], goldens.arrays(name), tasks[name]
    sampler = sampler_of(case)
    use(model, sampler)
    first_state = state_of(sampler)
    prefixes = [f"gen.{tag}.call0", f"gen.{tag}.call1"] if tag == "top_k" else [f"gen.{tag}"]
    if tag != "greedy_auto_strip":
        check_rows(model, case, given, prefixes)
    if "seed_state_after" in case:
        assert state_of(sampler)[0].tolist() == case["seed_state_after"]
        sampler.variables[0].assign(first_state[0])
    if "text" in case:
        texts = [model.generate(case["prompts"], **options_of(case)) for _ in prefixes]
        assert texts == (case["text"] if tag == "top_k" else [case["text"]])


def check_rows(model, case, given, prefixes):
    """The arrays behind the texts, through the interface without a preprocessor."""
    source = "beam3_none" if case["tag"] == "beam3_all" else case["tag"]
    rows = {key: given[f"gen.{source}.in_{key}"] for key in ("token_ids", "padding_mask")}
    if "prompts" in case:
        prompts = [case["prompts"]] if isinstance(case["prompts"], str) else case["prompts"]
        packed = model.preprocessor.generate_preprocess(prompts, case["max_length"])
        for key in rows:
            assert packed[key].tolist() == rows[key].tolist()
    stops = case.get("resolved_stop", case.get("stop_token_ids"))
    stops = model._stop_token_ids("auto") if stops == "auto" else stops
    preprocessor, model.preprocessor = model.preprocessor, None
    try:
        for prefix in prefixes:
            output = model.generate(rows, stop_token_ids=stops)
            assert output["token_ids"].tolist() == given[f"{prefix}.token_ids"].tolist()
            if "log_probs" in output:
                close = {"atol": 2e-4, "rtol": 0}
                np.testing.assert_allclose(
                    output["log_probs"], given[f"{prefix}.log_probs"], **close
                )
                continue
            assert output["padding_mask"].tolist() == given[f"{prefix}.padding_mask"].tolist()
            assert output["padding_mask"].dtype == bool
    finally:
        model.preprocessor = preprocessor


PROMPTS = ["The keeper", "The name of the boat is", "def add(a, b):"]


@pytest.fixture(scope="module")
def gemma1(tasks):
    model = tasks["gemma1_tiny"]
    model.compile(sampler="greedy")
    return model


def test_fifty_lengths_cost_one_program_for_each_bucket(gemma1):
    gemma1.compile(sampler="greedy")
    lengths = [*range(3, 48), 100, 255, 256, 257, 400]
    for length in lengths:
        gemma1.generate("The keeper", max_length=length, stop_token_ids=None)
    buckets = {width_bucket(length) for length in lengths}
    assert buckets == {256, 512}
    assert gemma1._compiled().num_programs == len(buckets)


def test_other_stops_and_prompts_cost_no_program(gemma1):
    use(gemma1, "greedy")
    for stops in ("auto", None, (5,), [5, 6, 7]):
        gemma1.generate(PROMPTS[0], stop_token_ids=stops)
        gemma1.generate(PROMPTS[1], stop_token_ids=stops)
    num_programs = gemma1._compiled().num_programs
    for stops in ("auto", None, (5,), [5, 6, 7]):
        gemma1.generate(PROMPTS[2], stop_token_ids=stops, max_length=40)
    assert gemma1._compiled().num_programs == num_programs


def test_a_wider_bucket_changes_no_token(gemma1):
    short = gemma1.generate("The name", max_length=250, stop_token_ids=None)
    long = gemma1.generate("The name", max_length=300, stop_token_ids=None)
    assert long.startswith(short)


@pytest.mark.parametrize(
    "sampler", ["greedy", samplers.TopKSampler(5, seed=4, temperature=2.0), "beam"]
)
@pytest.mark.parametrize("strip_prompt", [False, True])
def test_a_stream_joined_is_what_generate_returns(gemma1, sampler, strip_prompt):
    gemma1.compile(sampler=sampler)
    for prompt in ("The keeper", "a " * 70):
        options = {"max_length": 160, "strip_prompt": strip_prompt, "stop_token_ids": (9, 1)}
        variables = getattr(gemma1.sampler, "variables", [])
        before = [np.asarray(variable) for variable in variables]
        whole = gemma1.generate(prompt, **options)
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        pieces = list(gemma1.stream(prompt, **options))
        assert "".join(pieces) == whole
        assert "" not in pieces
        assert pieces[0] == prompt or strip_prompt


def test_a_stream_gives_a_piece_before_the_next_token_is_drawn(gemma1):
    use(gemma1, "greedy")
    stream = gemma1.stream("The keeper", max_length=5000, stop_token_ids=None)
    first = [next(stream) for _ in range(3)]
    assert first[0] == "The keeper"
    assert gemma1.generate("The keeper", max_length=30).startswith("".join(first)[:-1])


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("greedy", "greedy"),
        ("top_k", samplers.TopKSampler(5, seed=3, temperature=2.0)),
        ("contrastive", samplers.ContrastiveSampler(4, alpha=0.6)),
    ],
)
def test_masks_with_holes_are_filled_as_keras_hub_fills_them(gemma1, name, sampler):
    """A hole is filled when the walk reaches it; what lies before the start stays."""
    with np.load(goldens.directory("gemma1_tiny") / "holes.npz") as holes:
        rows = {key: holes[f"in_{key}"] for key in ("token_ids", "padding_mask")}
        model = GemmaCausalLM(gemma1.backbone)
        model.compile(sampler=sampler)
        for kind, stops in (("none", None), ("stops", (5, 300, 77))):
            output = model.generate(rows, stop_token_ids=stops)
            for key, value in output.items():
                assert value.tolist() == holes[f"{name}.{kind}.{key}"].tolist()


def test_rows_of_a_batch_are_those_of_single_prompts(gemma1):
    use(gemma1, "greedy")
    batch = gemma1.generate(PROMPTS, max_length=20)
    assert batch == [gemma1.generate(prompt, max_length=20) for prompt in PROMPTS]


class Batches:
    """What tf.data looks like to us, without TensorFlow."""

    def __init__(self, batches):
        self.batches = batches

    def as_numpy_iterator(self):
        return iter(self.batches)


@pytest.mark.parametrize(
    "dataset",
    [
        Batches([np.array([b"The keeper", b"def add(a, b):"]), np.array([b"The name"])]),
        [["The keeper", "def add(a, b):"], ["The name"]],
        (batch for batch in (("The keeper", "def add(a, b):"), "The name")),
        iter([np.array(["The keeper", "def add(a, b):"]), ["The name"]]),
    ],
)
def test_a_dataset_gives_the_texts_of_its_batches_in_order(gemma1, dataset):
    use(gemma1, "greedy")
    expected = [
        gemma1.generate(t, max_length=16) for t in ("The keeper", "def add(a, b):", "The name")
    ]
    assert gemma1.generate(dataset, max_length=16) == expected


def test_a_dataset_of_dicts_is_joined(gemma1):
    use(gemma1, "greedy")
    model = GemmaCausalLM(gemma1.backbone)
    rows = {"token_ids": np.array([[2, 40, 0, 0]]), "padding_mask": np.array([[1, 1, 0, 0]])}
    one = model.generate(rows, stop_token_ids=None)
    two = model.generate(iter([rows, rows]), stop_token_ids=None)
    assert two["token_ids"].tolist() == one["token_ids"].tolist() * 2
    wider = {key: np.pad(value, ((0, 0), (0, 1))) for key, value in rows.items()}
    with pytest.raises(ValueError, match="rows of 4, 5 tokens"):
        model.generate([rows, wider], stop_token_ids=None)


class SecondBest(samplers.Sampler):
    def get_next_token(self, probabilities):
        return jnp.argsort(probabilities, axis=-1)[:, -2]


def test_a_sampler_of_the_user_and_a_plain_callable_generate(gemma1):
    gemma1.compile(sampler=SecondBest())
    second = gemma1.generate("The keeper", max_length=12, stop_token_ids=None)
    seen = {}

    def calls_it(next, prompt, **given):
        seen.update(given)
        return SecondBest()(next, prompt, given["cache"], given["index"], given["mask"])

    gemma1.compile(sampler=calls_it)
    assert gemma1.generate("The keeper", max_length=12, stop_token_ids=None) == second
    assert {"cache", "index", "mask", "stop_token_ids", "hidden_states"} <= seen.keys()
    use(gemma1, "greedy")
    assert gemma1.generate("The keeper", max_length=12, stop_token_ids=None) != second


def test_run_eagerly_generates_the_same(gemma1):
    use(gemma1, "greedy")
    compiled = gemma1.generate("The keeper", max_length=8)
    gemma1.compile(sampler="greedy", run_eagerly=True)
    assert gemma1.generate("The keeper", max_length=8) == compiled


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([], {}, "the list is empty"),
        (iter([]), {}, "the dataset is empty"),
        (3, {}, "got int"),
        ({"token_ids": [[2]], "padding_mask": [[1]]}, {}, "has a preprocessor, which takes texts"),
        ([["a"], 3], {}, "must be texts or a dict"),
        ("a", {"max_length": -1}, "max_length must be at least 1, got -1"),
        ("a", {"max_length": True}, "max_length must be at least 1, got True"),
        ("a", {"stop_token_ids": 5}, 'must be "auto", None or a tuple of ids, got 5'),
        ("a", {"stop_token_ids": "never"}, "got 'never'"),
        ("a", {"stop_token_ids": (512,)}, r"The stop id 512 is not in \[0, 512\)"),
    ],
)
def test_bad_inputs_say_what_is_wrong(gemma1, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        gemma1.generate(inputs, **options)


ROWS = {"token_ids": [[2, 40, 0]], "padding_mask": [[1, 1, 0]]}


@pytest.mark.parametrize(
    ("inputs", "stops", "message"),
    [
        (ROWS, "auto", "Pass stop_token_ids=None"),
        ("a text", None, "Texts need a preprocessor"),
        ({"token_ids": [[2]]}, None, "The dict needs padding_mask"),
        ({**ROWS, "padding_mask": [[1]]}, None, r"\(1, 3\) and \(1, 1\)"),
        ({**ROWS, "token_ids": [[2, 512, 0]]}, None, "Row 0 has the token id 512 at column 1"),
        ({**ROWS, "token_ids": [[2.0, 1.0, 0.0]]}, None, "must be integers, got float64"),
        ({**ROWS, "padding_mask": [[0, 0, 0]]}, None, "Row 0 has no prompt"),
    ],
)
def test_bad_rows_say_what_is_wrong(gemma1, inputs, stops, message):
    model = GemmaCausalLM(gemma1.backbone)
    with pytest.raises(ValueError, match=message):
        model.generate(inputs, stop_token_ids=stops)


def test_generate_before_compile_says_so(gemma1):
    with pytest.raises(ValueError, match=r"You must call `compile\(\)`"):
        GemmaCausalLM(gemma1.backbone, gemma1.preprocessor, compile=False).generate("a")


def test_stream_takes_one_text(gemma1):
    with pytest.raises(ValueError, match="stream takes one text"):
        gemma1.stream(["a", "b"])
