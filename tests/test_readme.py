"""Every command of the README, run as written, against the service that ``make serve`` starts.

Only the port differs, as 8000 may be taken where the tests run.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
START_SECONDS = 400
WEIGHTS_BYTES = 268_098_176 * 4


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Served:
    """What ``make serve`` started."""

    def __init__(self, port, api_pid):
        self.port = port
        self.api_pid = api_pid

    def run(self, command):
        """A command of the README in a shell, on this port."""
        return subprocess.run(
            ["bash", "-euc", command.replace(":8000", f":{self.port}")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout


@pytest.fixture(scope="module")
def served(cache_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    port = free_port()
    environment = {
        **os.environ,
        "PORT": str(port),
        "GEMMA_CACHE_DIR": str(cache_dir),
        "GEMMA_DATA_DIR": str(folder / "data"),
    }
    assert COMMANDS[0] == "make serve\n"
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            ["bash", "-euc", f"exec {COMMANDS[0]}"],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        listening = wait_for_ready(process, folder / "output")
        assert listening["port"] == port
        yield Served(port, listening["pid"])
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def wait_for_ready(process, output):
    """The facts of the line that says where it listens, once there is one that says it is ready."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        text = output.read_text()
        events = [json.loads(line) for line in text.splitlines() if line.startswith('{"event"')]
        by_name = {event["event"]: event for event in events}
        if "ready" in by_name:
            return by_name["listening"]
        assert process.poll() is None, text
        time.sleep(0.2)
    raise AssertionError(output.read_text())


def command_with(text):
    return next(command for command in COMMANDS if text in command)


def test_the_first_request_is_answered_in_english(served):
    answer = json.loads(served.run(command_with("The capital of France")))
    (output,) = answer["outputs"]
    assert output["text"].startswith(" the capital of the country of France.")
    assert len(output["token_ids"]) == 24
    assert answer["usage"]["completion_tokens"] == 24


def test_the_stream_is_the_whole_answer_in_pieces(served):
    command = command_with("Once upon a time")
    events = re.findall(r"^event: (\w+)\nid: \d+\ndata: (.*)$", served.run(command), re.MULTILINE)
    names = [name for name, _ in events]
    assert names == ["start", *["token"] * (len(events) - 2), "done"]
    streamed = "".join(json.loads(data)["text"] for name, data in events if name == "token")
    whole = json.loads(served.run(command.replace('"stream": true', '"stream": false')))
    assert streamed == whole["outputs"][0]["text"]
    words = re.findall(r"\b(?:the|a|and|of|to|was|in)\b", streamed)
    assert len(words) >= 5, f"not English: {streamed!r}"


def test_several_prompts_and_completions_come_in_one_answer(served):
    answer = json.loads(served.run(command_with("Water boils")))
    places = [(output["prompt_index"], output["index"]) for output in answer["outputs"]]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [output["seed"] for output in answer["outputs"]] == [1, 2, 3, 4]
    for output in answer["outputs"]:
        assert "\n" not in output["text"]
        assert all(len(token["top"]) == 3 for token in output["logprobs"])


def test_a_beam_search_returns_its_best_beams(served):
    outputs = json.loads(served.run(command_with('"sampler": "beam"')))["outputs"]
    assert [output["index"] for output in outputs] == [0, 1, 2]
    texts = [output["text"] for output in outputs]
    assert len(set(texts)) == 3
    assert all(0 < len(output["token_ids"]) <= 16 for output in outputs)


def test_paris_is_the_likeliest_target(served):
    answer = json.loads(served.run(command_with('"inputs"')))
    context, text = answer["results"]
    paris, rome = context["targets"]
    assert paris["greedy"] is False, "it goes on with a description"
    assert paris["prob"] > 0.9
    assert paris["prob"] + rome["prob"] == pytest.approx(1)
    (whole,) = text["targets"]
    assert whole["num_tokens"] == text["prompt_tokens"] - 1


def test_every_word_before_paris_has_a_share_in_it(served):
    answer = json.loads(served.run(command_with('"attribution"')))
    found = answer["results"][0]["attribution"]
    tokens = [each["token"] for each in found["scores"]]
    assert tokens == ["<bos>", "The", "▁capital", "▁of", "▁France", "▁is", "▁Paris"]
    assert [each["score"] == 0 for each in found["scores"]] == [False] * 6 + [True]
    assert found["completeness_error"] < 0.05


def test_a_change_of_the_stream_changes_what_it_says(served):
    command = command_with('"interventions"')
    [steered] = json.loads(served.run(command))["outputs"]
    assert len(steered["token_ids"]) == 16
    [plain] = json.loads(served.run(command.replace('"scale": 0.5', '"scale": 1.0')))["outputs"]
    assert steered["text"] != plain["text"]
    assert plain["text"].startswith(" the capital of the country of France.")


def test_a_job_on_the_rows_of_the_readme_makes_a_version_that_answers(served):
    # Two steps of twenty: what all of them teach is measured by `python -m bench.learning`.
    command = command_with("docs/examples/river.jsonl")
    short = command.replace('"epochs": 4', '"steps": 2')
    assert short != command
    job = json.loads(served.run(short))
    assert (job["status"], job["step"], job["version"]) == ("succeeded", 2, 1)
    asked = command_with('"gemma:river"')
    answer = json.loads(served.run(asked))
    assert answer["model"] == "gemma:river@1"
    of_base = json.loads(served.run(asked.replace('"gemma:river"', '"gemma"')))
    assert of_base["outputs"][0]["text"].startswith(" Thames")


def test_the_service_tells_what_it_is(served):
    answer = served.run(command_with("/info"))
    assert '"preset":"gemma3_270m"' in answer
    assert '"instruct":false' in answer
    assert '{"ready":true}' in answer
    assert 'gemma_compilations_total{phase="serving"} 0.0' in answer


def resident_bytes(served):
    """Of the worker, now."""
    children = Path(f"/proc/{served.api_pid}/task/{served.api_pid}/children").read_text().split()
    (worker,) = children
    status = Path(f"/proc/{worker}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def test_the_worker_at_rest_holds_less_than_two_and_a_half_times_the_weights(served):
    # 3 global layers of 4,096 positions and 15 local ones of 768, keys and values, 8 slots and 3
    # of scores.
    kv_cache = 2 * 4 * 11 * (3 * 4096 + 15 * 768) * 256
    most = kv_cache + 2.5 * WEIGHTS_BYTES
    # After a second without work it gives back what it needed for a moment.
    deadline = time.monotonic() + 10
    while resident_bytes(served) >= most and time.monotonic() < deadline:
        time.sleep(0.1)
    assert resident_bytes(served) < most


def test_f_r8_a_score_of_two_thousand_tokens_takes_less_than_300_megabytes(served):
    # Logits of all places would take 2.1 GB.
    token_ids = [2, *range(1000, 2999)]
    body = {"inputs": [{"token_ids": token_ids}], "return": ["tokens"]}
    at_rest = peak = resident_bytes(served)
    with ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{served.port}/score"
        scoring = pool.submit(httpx.post, url, json=body, timeout=120)
        while not scoring.done():
            peak = max(peak, resident_bytes(served))
            time.sleep(0.005)
    (result,) = scoring.result().json()["results"]
    assert len(result["targets"][0]["tokens"]) == 1999
    assert peak - at_rest < 300e6


def test_the_help_lists_every_option_of_the_settings_page(served):
    shown = served.run(command_with("--help"))
    options = re.findall(r"`(--[a-z-]+)`", (ROOT / "docs" / "settings.md").read_text())
    assert len(options) > 15
    assert all(option in shown for option in options)


def test_the_client_of_the_readme_answers_and_streams(served):
    _, code = PROGRAMS
    done = subprocess.run(
        [sys.executable, "-c", code.replace(":8000", f":{served.port}")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    whole, _, streamed = done.stdout.partition("\n")
    assert whole.startswith(" the capital of the country of France.")
    assert len(streamed.split()) > 20


def test_a_preset_is_listed_fetched_and_exported(cache_dir):
    with tempfile.TemporaryDirectory() as home:
        said = subprocess.run(
            ["bash", "-euc", command_with("gemma-service fetch")],
            cwd=ROOT,
            env={**os.environ, "HOME": home, "GEMMA_CACHE_DIR": str(cache_dir)},
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        ).stdout
        exported = Path(home, "gemma3_270m")
        weights = (exported / "model.safetensors").stat().st_size
        assert f"{exported}: 4 files" in said
    assert re.search(r"^gemma_2b_en +2\.51 B ", said, re.MULTILINE)
    assert re.search(
        r"^gemma3_270m (was here already|is here now), ready to be", said, re.MULTILINE
    )
    # In bfloat16, after a header.
    assert WEIGHTS_BYTES / 2 < weights < WEIGHTS_BYTES / 2 + 100_000


def test_no_command_of_the_readme_is_left_out():
    tested = ["make serve\n"] + [
        command_with(text)
        for text in (
            "The capital of France",
            "docs/examples/river.jsonl",
            '"gemma:river"',
            "Once upon a time",
            "Water boils",
            '"sampler": "beam"',
            '"inputs"',
            '"attribution"',
            '"interventions"',
            "/info",
            "gemma-service fetch",
            "--help",
        )
    ]
    assert tested == COMMANDS


def test_the_python_of_the_readme_runs(cache_dir, tmp_path):
    code, _ = PROGRAMS
    (tmp_path / "readme.py").write_text(code)
    environment = {**os.environ, "GEMMA_CACHE_DIR": str(cache_dir), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "readme.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert done.stdout.startswith("The capital of France is")
    assert len(done.stdout.split()) > 8
