"""Adapters over HTTP: names, what they answer, who waits, and bad files. Real processes."""

import contextlib
import subprocess

import pytest

from tests.lora_files import lora_file
from tests.service_process import REPOSITORY, command, eventually, running_service
from tests.test_company import CONTEXT_TOKENS, tiny_service

RUNNING = 'gemma_num_requests_running{op="generate"}'
WAITING = 'gemma_num_requests_waiting{op="generate"}'
TOKENS = 'gemma_generation_tokens_total{adapter="adapter"}'
EVICTIONS = "gemma_adapter_evictions_total"


def number_files(directory, **numbers):
    """Adapters of the arithmetic engine, which add a number, as options."""
    directory.mkdir(exist_ok=True)
    for name, number in numbers.items():
        (directory / f"{name}.lora.h5").write_text(str(number))
    return [f"--adapter={name}={directory / name}.lora.h5" for name in numbers]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    with running_service(directory, *number_files(directory, tone=10, plain=100)) as running:
        yield running


def drawn(response):
    assert response.status_code == 200, response.text
    return [output["token_ids"] for output in response.json()["outputs"]]


@pytest.mark.parametrize(
    ("model", "resolved", "tokens"),
    [
        (None, "gemma", [3, 6]),
        ("gemma", "gemma", [3, 6]),
        ("gemma:tone", "gemma:tone@1", [13, 26 + 10 - 10 + 0]),
        ("gemma:tone@1", "gemma:tone@1", [13, 26]),
        ("gemma:plain", "gemma:plain@1", [103, 206]),
    ],
)
def test_a_name_is_answered_by_its_version_and_the_answer_says_which(
    service, model, resolved, tokens
):
    fields = {} if model is None else {"model": model}
    response = service.generate([1, 2], max_tokens=2, **fields)
    # 1 + 2 and then all of it, each with what the adapter adds.
    assert drawn(response)[0][0] == tokens[0]
    assert response.json()["model"] == response.headers["x-model"] == resolved


def test_attribution_of_an_adapter_is_refused_and_not_that_of_the_base(service):
    attribution = {"method": "gradient", "of": "loss_sum"}
    body = {"inputs": [{"token_ids": [1, 2]}], "attribution": attribution}
    assert service.client.post("/score", json=body).status_code == 200
    response = service.client.post("/score", json={**body, "model": "gemma:tone"})
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == ["/attribution"]


def test_tokens_of_an_adapter_are_worked_out_by_hand(service):
    # 1 + 2 + 10, then 1 + 2 + 13 + 10.
    assert drawn(service.generate([1, 2], max_tokens=2, model="gemma:tone")) == [[13, 26]]
    many = service.generate([[1, 2], [5, 5]], max_tokens=1, n=2, model="gemma:tone")
    assert drawn(many) == [[13], [13], [20], [20]]


@pytest.mark.parametrize(
    "name",
    ["other", "tone", "gemma:", "gemma:other", "gemma:tone@2", "gemma:tone@0", "gemma:tone@01",
     "gemma:tone@1@1", "gemma:Tone", "other:tone", "gemma@1", "gemma:tone@", " gemma"],
)  # fmt: skip
def test_f_r3_an_unknown_name_is_404_and_never_the_base(service, name):
    for response in (
        service.generate([1, 2], model=name),
        service.generate([1, 2], model=name, stream=True),
        service.client.post("/score", json={"model": name, "inputs": [{"token_ids": [1, 2]}]}),
    ):
        assert (response.status_code, response.json()["code"]) == (404, "model_not_found")


def test_a_stream_names_its_version_and_metrics_count_it_apart(service):
    before = service.metric(TOKENS)
    with service.stream([1, 2], max_tokens=3, model="gemma:tone") as stream:
        events = list(stream)
    assert events[0]["data"]["model"] == "gemma:tone@1"
    assert service.metric(TOKENS) == before + 3


def test_scores_are_those_of_the_adapter(service):
    body = {"inputs": [{"token_ids": [1, 2, 13]}], "return": ["tokens"]}
    answers = {}
    for model in ("gemma", "gemma:tone"):
        answer = service.client.post("/score", json={**body, "model": model}).json()
        answers[answer["model"]] = answer["results"][0]["targets"][0]["tokens"][1]["rank"]
        assert answer["results"][0]["model"] == answer["model"]
    # Behind 1 + 2 the base expects 3, the adapter 13.
    assert answers == {"gemma": 10, "gemma:tone@1": 0}
    several = service.client.post("/score", json={**body, "models": ["gemma", "gemma:tone"]}).json()
    assert [each["model"] for each in several["results"]] == [*answers]
    # And where the base expects 1 + 2 or 1, the adapter expects 10 more.
    [between] = several["kl"]
    assert between["per_token"] == [10.0, 10.0]


@pytest.mark.parametrize(
    "search", [{"sampler": "beam", "num_beams": 2}, {"sampler": "contrastive", "top_k": 2,
                                                     "contrastive_alpha": 0}]
)  # fmt: skip
def test_searches_use_the_adapter(service, search):
    body = {"prompt": [1, 2], "max_tokens": 1, **search}
    found = [
        drawn(service.client.post("/generate", json={**body, "model": model}))[0]
        for model in ("gemma", "gemma:tone")
    ]
    assert found == [[3], [13]] or found[1][0] - found[0][0] in range(5, 16)


def test_info_tells_what_there_is_room_for(service):
    assert service.get("/info").json()["adapters"] == {"slots": 16, "max_rank": 16}


def test_what_finds_no_slot_in_the_bank_waits_until_one_is_free(tmp_path):
    options = [*number_files(tmp_path / "files", a=10, b=20), "--adapter-slots=1"]
    with (
        running_service(tmp_path, *options, ARITHMETIC_STEP_SECONDS="0.2") as service,
        contextlib.ExitStack() as stack,
    ):
        first = stack.enter_context(service.stream([1], max_tokens=20, model="gemma:a"))
        assert next(first)["event"] == "start"
        assert eventually(lambda: service.metric(RUNNING) == 1)
        second = stack.enter_context(service.stream([1], max_tokens=1, model="gemma:b"))
        assert next(second)["event"] == "start"
        assert eventually(lambda: service.metric(WAITING) == 1)
        first_tokens = [e for e in first if e["event"] == "token"]
        [second_token] = [e for e in second if e["event"] == "token"]
        assert first_tokens[0]["data"]["token_ids"][0] == 11
        assert second_token["data"]["token_ids"] == [21]
        assert eventually(lambda: service.metric(EVICTIONS) >= 1)
        assert eventually(lambda: service.metric('gemma_adapters{state="resident"}') == 1)


def test_those_behind_one_that_waits_for_a_slot_of_the_bank_are_served(tmp_path):
    options = [*number_files(tmp_path / "files", a=10, b=20), "--adapter-slots=1"]
    with (
        running_service(tmp_path, *options, ARITHMETIC_STEP_SECONDS="0.05") as service,
        contextlib.ExitStack() as stack,
    ):
        first = stack.enter_context(service.stream([1], max_tokens=60, model="gemma:a"))
        assert next(first)["event"] == "start"
        assert eventually(lambda: service.metric(RUNNING) == 1)
        second = stack.enter_context(service.stream([1], max_tokens=1, model="gemma:b"))
        assert next(second)["event"] == "start"
        assert eventually(lambda: service.metric(WAITING) == 1)
        assert drawn(service.generate([1, 2], max_tokens=1)) == [[3]]
        body = {"inputs": [{"token_ids": [1, 2]}]}
        assert service.client.post("/score", json=body).status_code == 200
        assert service.metric(WAITING) == 1, "nothing has ended for these two"
        assert next(e for e in second if e["event"] == "token")["data"]["token_ids"] == [21]


def test_a_file_that_changes_under_the_service_fails_its_requests_and_no_others(tmp_path):
    options = [*number_files(tmp_path / "files", a=10, b=20), "--adapter-slots=1"]
    with running_service(tmp_path, *options) as service:
        assert drawn(service.generate([1], max_tokens=1, model="gemma:a")) == [[11]]
        (tmp_path / "files/b.lora.h5").write_text("21")
        body = {"model": "gemma:b", "inputs": [{"token_ids": [1, 2]}]}
        for response in (
            service.generate([1], n=2, model="gemma:b"),
            service.client.post("/score", json=body),
        ):
            assert (response.status_code, response.json()["code"]) == (404, "model_not_found")
        assert "b.lora.h5 has changed" in service.log
        assert drawn(service.generate([1], max_tokens=1, model="gemma:a")) == [[11]]


def served(directory, *options):
    """The status of a service that does not start, and the lines that say why."""
    words = command(directory, *options)
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if line.startswith("gemma-service: ")]
    return done.returncode, lines


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--adapter=tone={files}/none.lora.h5"], 65, "cannot read the adapter {files}/none"),
        (
            ["--adapter=tone={files}"],
            65,
            "cannot read the adapter {files}/adapter_config.json: No such file or directory",
        ),
        (["--adapter=word={files}/word.lora.h5"], 65, "word.lora.h5 holds no number"),
        (["--adapter=Tone=x"], 64, "--adapter"),
        (["--adapter=tone"], 64, "--adapter"),
        (["--adapter=a={files}/a.lora.h5", "--adapter=a={files}/b.lora.h5"], 64, "names a twice"),
        (["--adapter=a={files}/a.lora.h5", "--adapter-slots=0"], 64, "needs --adapter-slots"),
    ],
)
def test_a_bad_file_or_option_is_one_line_and_its_status(tmp_path, options, status, said):
    files = tmp_path / "files"
    number_files(files, a=1, b=2, word="x")
    options = [each.format(files=files) for each in options]
    returned, lines = served(tmp_path / "service", *options)
    assert (returned, len(lines)) == (status, 1)
    assert said.format(files=files) in lines[0]


# --- the real engine --------------------------------------------------------------------------


def test_a_lora_file_is_served_beside_the_base_over_a_real_process(tmp_path, cache_dir):
    option = f"--adapter=tone={lora_file(tmp_path, 'tone')}"
    with tiny_service(tmp_path / "service", cache_dir, option) as service:
        body = {"prompt": [40, 77, 91], "max_tokens": 8, "logprobs": 2, "temperature": 0}
        answers = {}
        for model in ("gemma", "gemma:tone"):
            answer = service.client.post("/generate", json={**body, "model": model}).json()
            answers[model] = answer["outputs"][0]["logprobs"]
            assert answer["model"] == {"gemma:tone": "gemma:tone@1"}.get(model, model)
        assert answers["gemma"] != answers["gemma:tone"]
        scored = service.client.post(
            "/score",
            json={
                "model": "gemma:tone",
                "inputs": [{"token_ids": [40, 77, 91, answers["gemma:tone"][0]["id"]]}],
                "return": ["tokens"],
            },
        ).json()
        [*_, last] = scored["results"][0]["targets"][0]["tokens"]
        assert last["logprob"] == pytest.approx(answers["gemma:tone"][0]["logprob"], abs=5e-5)
        assert service.metric('gemma_compilations_total{phase="serving"}') == 0


def test_a_damaged_lora_file_is_status_65_and_one_line_that_names_it(tmp_path, cache_dir):
    path = lora_file(tmp_path, "cut")
    path.write_bytes(path.read_bytes()[:2000])
    # With the programs of the test before.
    words = ("--engine=model.engine:load", "--preset=tiny", f"--cache-dir={cache_dir}")
    limits = ("--slots=4", "--adapter-slots=2", f"--context-tokens={CONTEXT_TOKENS}")
    returned, lines = served(tmp_path / "service", *words, *limits, f"--adapter=cut={path}")
    assert (returned, len(lines)) == (65, 1)
    assert f"{path} is not a .lora.h5 file" in lines[0]
