"""service.api.schemas: each bound at its edge, and the forms of a prompt."""

import json
import re
import time

import pytest
from pydantic import ValidationError

from service.api.schemas import GenerateRequest, GenerateResponse, Ready

TINY = 5e-324


def errors(**fields: object) -> list[tuple[tuple[int | str, ...], str]]:
    with pytest.raises(ValidationError) as caught:
        GenerateRequest.model_validate({"prompt": "a", **fields})
    return [(error["loc"], error["msg"]) for error in caught.value.errors()]


def test_a_prompt_alone_gets_the_documented_defaults():
    assert GenerateRequest(prompt="a").model_dump() == {
        "model": None,
        "prompt": "a",
        "max_tokens": 128,
        "max_length": None,
        "echo": False,
        "min_tokens": 0,
        "sampler": "auto",
        "num_beams": 4,
        "contrastive_alpha": 0.6,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "seed": None,
        "n": 1,
        "logprobs": None,
        "stop": [],
        "stop_token_ids": [],
        "ignore_eos": False,
        "timeout_s": None,
        "priority": 0,
        "stream": False,
        "interventions": [],
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("max_tokens", 1_048_576),
        ("min_tokens", 0),
        ("min_tokens", 128),
        ("temperature", 0),
        ("temperature", -0.0),
        ("temperature", TINY),
        ("temperature", 5),
        ("temperature", 5.0),
        ("top_k", 0),
        ("top_k", 1_048_576),
        ("top_p", TINY),
        ("top_p", 1),
        ("top_p", 1.0),
        ("min_p", 0),
        ("min_p", 1.0),
        ("repetition_penalty", 0.1),
        ("repetition_penalty", 10),
        ("presence_penalty", -2),
        ("presence_penalty", 2.0),
        ("frequency_penalty", -2.0),
        ("frequency_penalty", 2),
        ("logit_bias", {"0": -100, "1048575": 100.0, "7": 0}),
        ("logit_bias", {str(token_id): 1.0 for token_id in range(300)}),
        ("seed", None),
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("n", 1),
        ("n", 8),
        ("logprobs", None),
        ("logprobs", 0),
        ("logprobs", 20),
        ("stop", []),
        ("stop", ["x"] * 8),
        ("stop", ["x" * 64]),
        ("stop", ["\N{BLACK STAR}" * 21]),
        ("stop_token_ids", [0, 1_048_575]),
        ("stop_token_ids", [7] * 16),
        ("ignore_eos", True),
        ("max_length", 2),
        ("max_length", 1_048_576),
        ("echo", True),
        ("timeout_s", TINY),
        ("timeout_s", 86_400),
        ("priority", -8),
        ("priority", 8),
        ("stream", True),
    ],
)
def test_the_last_value_inside_a_range_is_taken(field, value):
    assert getattr(GenerateRequest.model_validate({"prompt": "a", field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "location"),
    [
        ("max_length", 1, ("max_length",)),
        ("max_length", 1_048_577, ("max_length",)),
        ("echo", 1, ("echo",)),
        ("timeout_s", 0, ("timeout_s",)),
        ("timeout_s", 86_401, ("timeout_s",)),
        ("priority", -9, ("priority",)),
        ("priority", 9, ("priority",)),
        ("priority", 1.0, ("priority",)),
        ("min_p", 1.000001, ("min_p",)),
        ("min_p", -TINY, ("min_p",)),
        ("repetition_penalty", 0, ("repetition_penalty",)),
        ("repetition_penalty", 10.1, ("repetition_penalty",)),
        ("presence_penalty", -2.01, ("presence_penalty",)),
        ("frequency_penalty", 2.01, ("frequency_penalty",)),
        ("logit_bias", [], ("logit_bias",)),
        ("logit_bias", {"-1": 0}, ("logit_bias", "-1")),
        ("logit_bias", {"01": 0}, ("logit_bias", "01")),
        ("logit_bias", {"1048576": 0}, ("logit_bias", "1048576")),
        ("logit_bias", {"x" * 999: 0}, ("logit_bias", "x" * 7)),
        ("logit_bias", {"\u0663": 0}, ("logit_bias", "\u0663")),
        ("logit_bias", {"1": 100.1}, ("logit_bias", "1")),
        ("logit_bias", {"1": 10**4000}, ("logit_bias", "1")),
        ("logit_bias", {"1": float("nan")}, ("logit_bias", "1")),
        ("logit_bias", {"1": True}, ("logit_bias", "1")),
        ("logit_bias", {"1": "1"}, ("logit_bias", "1")),
        ("logit_bias", {str(token_id): 1.0 for token_id in range(301)}, ("logit_bias",)),
        ("max_tokens", 0, ("max_tokens",)),
        ("max_tokens", 1_048_577, ("max_tokens",)),
        ("max_tokens", 10**4000, ("max_tokens",)),
        ("max_tokens", 1.0, ("max_tokens",)),
        ("max_tokens", "1", ("max_tokens",)),
        ("max_tokens", True, ("max_tokens",)),
        ("max_tokens", None, ("max_tokens",)),
        ("min_tokens", -1, ("min_tokens",)),
        ("min_tokens", 129, ("min_tokens",)),
        ("temperature", -TINY, ("temperature",)),
        ("temperature", 5.000001, ("temperature",)),
        ("temperature", float("nan"), ("temperature",)),
        ("temperature", float("inf"), ("temperature",)),
        ("temperature", -float("inf"), ("temperature",)),
        ("temperature", 10**400, ("temperature",)),
        ("temperature", False, ("temperature",)),
        ("top_k", -1, ("top_k",)),
        ("top_k", 1_048_577, ("top_k",)),
        ("top_p", 0, ("top_p",)),
        ("top_p", 0.0, ("top_p",)),
        ("top_p", 1.0000001, ("top_p",)),
        ("top_p", float("nan"), ("top_p",)),
        ("top_p", float("inf"), ("top_p",)),
        ("seed", -1, ("seed",)),
        ("seed", 2**32, ("seed",)),
        ("n", 0, ("n",)),
        ("n", 9, ("n",)),
        ("logprobs", -1, ("logprobs",)),
        ("logprobs", 21, ("logprobs",)),
        ("logprobs", True, ("logprobs",)),
        ("stop", "x", ("stop",)),
        ("stop", ["x"] * 9, ("stop",)),
        ("stop", ["x", ""], ("stop", 1)),
        ("stop", ["x" * 65], ("stop", 0)),
        ("stop", ["\N{BLACK STAR}" * 22], ("stop", 0)),
        ("stop", [1], ("stop", 0)),
        ("stop_token_ids", [7] * 17, ("stop_token_ids",)),
        ("stop_token_ids", [-1], ("stop_token_ids", 0)),
        ("stop_token_ids", [0, 1_048_576], ("stop_token_ids", 1)),
        ("stop_token_ids", [True], ("stop_token_ids", 0)),
        ("ignore_eos", 1, ("ignore_eos",)),
        ("stream", "true", ("stream",)),
        ("messages", [], ("messages",)),
        ("Prompt", "a", ("Prompt",)),
    ],
)
def test_the_first_value_outside_a_range_is_refused_by_name(field, value, location):
    assert [found for found, _ in errors(**{field: value})] == [location]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [""]),
        ("Hello", ["Hello"]),
        (["Hello", ""], ["Hello", ""]),
        (["a"] * 64, ["a"] * 64),
        ([2, 0, 1_048_575], [[2, 0, 1_048_575]]),
        ([2] * 65, [[2] * 65]),
        ([[2], [3, 4]], [[2], [3, 4]]),
        ([[2]] * 64, [[2]] * 64),
    ],
)
def test_each_form_of_a_prompt_becomes_a_list_of_prompts(prompt, prompts):
    assert GenerateRequest(prompt=prompt).prompts() == prompts


@pytest.mark.parametrize(
    ("prompt", "location"),
    [
        (None, ()),
        (1, ()),
        (1.5, ()),
        (True, ()),
        ({"text": "a"}, ()),
        ([], ()),
        ([None], (0,)),
        ([True], (0,)),
        ([2.0], (0,)),
        ([{}], (0,)),
        (["a"] * 65, ()),
        ([[2]] * 65, ()),
        (["a", 2], (1,)),
        ([2, "a"], (1,)),
        ([2, 3, True], (2,)),
        ([2, 3, 4.0], (2,)),
        ([2, [3]], (1,)),
        ([2, -1], (1,)),
        ([1_048_576], (0,)),
        ([2, 10**4000], (1,)),
        (["a", ["b"]], (1,)),
        ([[2], 3], (1,)),
        ([[2], "a"], (1,)),
        ([[2], []], (1,)),
        ([[]], (0,)),
        ([["a"]], (0, 0)),
        ([[2], [2], [2], [2] * 17 + [False]], (3, 17)),
        ([[2], [2], [2], [2] * 17 + [1_048_576]], (3, 17)),
        ([[[2]]], (0, 0)),
    ],
)
def test_a_wrong_prompt_is_refused_where_it_is_wrong(prompt, location):
    assert [found for found, _ in errors(prompt=prompt)] == [("prompt", *location)]


@pytest.mark.parametrize("num_prompts", [8, 9])
def test_prompts_times_n_is_at_most_64(num_prompts):
    prompt = ["a"] * num_prompts
    if num_prompts * 8 <= 64:
        assert GenerateRequest(prompt=prompt, n=8).n == 8
    else:
        assert [found for found, _ in errors(prompt=prompt, n=8)] == [("n",)]


def test_min_tokens_may_equal_max_tokens_but_not_pass_it():
    assert GenerateRequest(prompt="a", max_tokens=5, min_tokens=5).min_tokens == 5
    assert [found for found, _ in errors(max_tokens=5, min_tokens=6)] == [("min_tokens",)]


@pytest.mark.parametrize(
    "fields",
    [
        {"sampler": "auto", "temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
        {"sampler": "greedy"},
        {"sampler": "greedy", "temperature": 0, "presence_penalty": 1.0},
        {"sampler": "random", "temperature": 2.0},
        {"sampler": "top_k", "top_k": 1, "temperature": 0.1},
        {"sampler": "top_p", "top_p": 0.9, "top_k": 40},
        {"sampler": "beam"},
        {"sampler": "beam", "num_beams": 2, "n": 2, "logit_bias": {"5": 1}, "temperature": 1},
        {"sampler": "beam", "num_beams": 8, "n": 8, "top_p": 1.0},
        {"sampler": "contrastive", "top_k": 2},
        {"sampler": "contrastive", "top_k": 8, "contrastive_alpha": 0, "seed": 3},
    ],
)
def test_a_sampler_takes_the_numbers_that_are_its_own(fields):
    request = GenerateRequest.model_validate({"prompt": "a", **fields})
    assert request.sampler == fields["sampler"]


@pytest.mark.parametrize(
    ("fields", "pointer", "detail"),
    [
        ({"sampler": "greedy", "temperature": 0.1}, "temperature", "0 or left out"),
        ({"sampler": "greedy", "temperature": 1.0}, "temperature", "0 or left out"),
        ({"sampler": "greedy", "top_k": 1}, "top_k", "should be 0: the sampler greedy"),
        ({"sampler": "random", "top_p": 0.9}, "top_p", "should be 1: the sampler random"),
        ({"sampler": "random", "temperature": 0}, "temperature", "use the sampler greedy"),
        ({"sampler": "top_k"}, "top_k", "at least 1"),
        ({"sampler": "top_k", "top_k": 5, "top_p": 0.9}, "top_p", "makes no use"),
        ({"sampler": "top_k", "top_k": 5, "temperature": 0}, "temperature", "above 0 for top_k"),
        ({"sampler": "top_p"}, "top_p", "below 1"),
        ({"sampler": "top_p", "top_p": 0.5, "min_p": 0.1}, "min_p", "makes no use"),
        ({"sampler": "beam", "temperature": 0}, "temperature", "should be 1"),
        ({"sampler": "beam", "top_k": 4}, "top_k", "makes no use"),
        ({"sampler": "beam", "frequency_penalty": 0.1}, "frequency_penalty", "should be 0"),
        ({"sampler": "beam", "num_beams": 3, "n": 4}, "n", "at most num_beams, 3"),
        ({"sampler": "beam", "n": 5}, "n", "at most num_beams, 4"),
        ({"sampler": "beam", "contrastive_alpha": 0.6}, "contrastive_alpha", "only the sampler"),
        ({"sampler": "contrastive"}, "top_k", r"in \[2, 8\]"),
        ({"sampler": "contrastive", "top_k": 1}, "top_k", r"in \[2, 8\]"),
        ({"sampler": "contrastive", "top_k": 9}, "top_k", r"in \[2, 8\]"),
        ({"sampler": "contrastive", "top_k": 4, "n": 2}, "n", "should be 1"),
        ({"sampler": "contrastive", "top_k": 4, "temperature": 0.7}, "temperature", "no use"),
        ({"sampler": "contrastive", "top_k": 4, "num_beams": 4}, "num_beams", "left out"),
        ({"num_beams": 4}, "num_beams", "only the sampler beam uses it"),
        ({"contrastive_alpha": 0.5}, "contrastive_alpha", "only the sampler contrastive"),
        ({"sampler": "beams"}, "sampler", "'auto'"),
        ({"sampler": "beam", "num_beams": 1}, "num_beams", "greater than or equal to 2"),
        ({"sampler": "beam", "num_beams": 9}, "num_beams", "less than or equal to 8"),
    ],
)
def test_a_sampler_with_numbers_that_contradict_it_is_refused(fields, pointer, detail):
    [(location, message)] = errors(**fields)
    assert location == (pointer,)
    assert re.search(detail, message)


def test_a_request_without_a_prompt_is_refused():
    with pytest.raises(ValidationError, match="prompt"):
        GenerateRequest.model_validate({})


def test_a_hundred_thousand_unknown_fields_are_one_error_found_at_once():
    start = time.process_time()
    found = errors(**{f"unknown_{index}": 1 for index in range(100_000)})
    assert len(found) == 1
    assert time.process_time() - start < 0.5


def test_a_mebibyte_of_token_ids_is_checked_at_once():
    token_ids = [5] * 349_525
    GenerateRequest(prompt=token_ids)
    start = time.process_time()
    GenerateRequest(prompt=token_ids)
    assert time.process_time() - start < 0.15


def test_the_published_schema_has_the_four_forms_of_a_prompt_and_no_other_field():
    schema = GenerateRequest.model_json_schema()
    forms = schema["properties"]["prompt"]["anyOf"]
    assert [form.get("items", {}).get("type", form["type"]) for form in forms] == [
        "string",
        "string",
        "integer",
        "array",
    ]
    assert schema["required"] == ["prompt"]
    assert schema["additionalProperties"] is False
    assert all("description" in field for field in schema["properties"].values())


def test_a_response_is_written_as_the_contract_draws_it():
    logprob = {"id": 9259, "token": "Hello", "bytes": [72], "logprob": -0.12}
    content = {
        "id": "gen_1",
        "model": "gemma",
        "created": "2026-01-02T03:04:05Z",
        "outputs": [
            {
                "prompt_index": 0,
                "index": 0,
                "text": "Hello",
                "token_ids": [9259, 107],
                "finish_reason": "stop",
                "stop_reason": 107,
                "seed": 881237,
                "logprobs": [{**logprob, "top": [logprob]}],
            }
        ],
        "usage": {"prompt_tokens": 12, "cached_tokens": 8, "completion_tokens": 2},
        "timings": {"queue_s": 0.01, "ttft_s": 0.12, "total_s": 1.9},
    }
    response = GenerateResponse.model_validate_json(json.dumps(content))
    assert json.loads(response.model_dump_json()) == content


def test_a_reason_for_not_being_ready_is_one_of_five():
    assert Ready(ready=False, reason="compiling", progress=0.4).progress == 0.4
    with pytest.raises(ValidationError):
        Ready.model_validate({"ready": False, "reason": "tired"})


def test_max_length_stands_in_place_of_max_tokens():
    assert errors(max_length=20, max_tokens=10) == [
        (("max_length",), "should stand in place of max_tokens, not beside it")
    ]
    # Only the worker knows how much of it the prompt takes.
    request = GenerateRequest.model_validate({"prompt": "a", "max_length": 20, "min_tokens": 200})
    assert request.max_length == 20
