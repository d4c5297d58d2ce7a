"""gemma-service finetune, jobs and adapters, against a service that counts.

What has to do with terminals, signals and the status of a process is tried on processes; the rest
on the commands as the process parses and runs them.
"""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.__main__ import _parsed
from service.client_commands import CLIENT_COMMANDS, Finetune
from service.exit_status import Exit, ExitStatus
from tests.fakes.arithmetic_trainer import LOSS_NOT_FINITE
from tests.service_process import REPOSITORY, eventually, running_service

CONTRACT = REPOSITORY / "openapi" / "openapi.json"
ROWS = [{"token_ids": [1, 2, 3 + index]} for index in range(6)]
# Variables of the service are none of these commands'.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("GEMMA_")},
    "GEMMA_ADAPTER": '["other=x"]',
    "TERM": "xterm",
    "COLUMNS": "120",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """It makes about fifty steps a second."""
    with running_service(tmp_path_factory.mktemp("x"), ARITHMETIC_SLICE_SECONDS="0.02") as running:
        yield running


@pytest.fixture
def data(tmp_path):
    return written(tmp_path / "data.jsonl", ROWS)


def written(path: Path, rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def words(service, *arguments):
    return [sys.executable, "-m", "service", *arguments, f"--url={service.url}"]


def run(service, *arguments):
    return subprocess.run(
        words(service, *arguments),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def said_by(service, capsys):
    """Runs a command here; returns the lines of its standard output."""

    def run_here(name, *options):
        _parsed(CLIENT_COMMANDS[name], name, [f"--url={service.url}", *options]).run()
        return capsys.readouterr().out.splitlines()

    return run_here


def test_a_job_is_shown_to_its_end_and_says_what_came_of_it(service, data):
    options = ["--steps=40", "--batch-size=2", "--targets=query,key", "--rank=2", "--publish=20"]
    process = run(
        service, "finetune", "--file", data, "--adapter=shown", f"--validation={data}", *options
    )
    assert process.returncode == 0, process.stderr
    assert re.fullmatch(
        r"gemma:shown@2 is there, live as gemma:shown, 40 steps, loss 0\.\d+, "
        r"validation loss 0\.\d+\n",
        process.stdout,
    )
    shown = [json.loads(line) for line in process.stderr.splitlines() if '"event"' in line]
    assert [line["done"] for line in shown] == sorted(line["done"] for line in shown)
    assert shown[-1]["status"] == "succeeded"
    assert (shown[-1]["done"], shown[-1]["total"], shown[-1]["version"]) == (40, 40, 2)
    assert any(line["tokens_per_s"] and line["seconds_left"] for line in shown)
    told = service.get(f"/finetune/{shown[0]['job']}").json()
    asked = told["hyperparameters"]
    assert (asked["targets"], asked["rank"], asked["batch_size"]) == (["query", "key"], 2, 2)
    assert (told["publish"], told["validation"]) == ({"every": 20}, 6)


def test_a_terminal_sees_a_bar(service, data):
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        words(service, "finetune", f"--file={data}", "--adapter=bar", "--steps=30"),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        seen = b""
        # The end of a terminal is an error.
        try:
            while piece := os.read(ours, 1 << 16):
                seen += piece
        except OSError:
            os.close(ours)
    assert process.returncode == 0
    *lines, end = seen.decode().split("\r\x1b[2K")
    assert any(re.match(r"bar ━+─+  \d+/30  loss .* tokens/s  0:00 left", line) for line in lines)
    assert re.match(rf"bar {'━' * 24}  30/30  loss 0\.\d+  @1 live  succeeded\r\n", end)


def test_ctrl_c_ends_the_view_and_not_the_job(service, said_by, data):
    process = subprocess.Popen(
        words(service, "finetune", f"--file={data}", "--adapter=interrupted", "--steps=10000"),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        first = next(line for line in process.stderr if '"status": "running"' in line)
        job_id = json.loads(first)["job"]
        os.killpg(process.pid, signal.SIGINT)
        said = [line for line in process.stderr if '"event"' not in line]
    assert process.returncode == ExitStatus.INTERRUPTED
    command = f"gemma-service jobs {job_id} --url {service.url}"
    assert said == [
        f"gemma-service: {job_id} goes on. To see it: {command} --follow; "
        f"to end it: {command} --cancel\n"
    ]
    assert service.get(f"/finetune/{job_id}").json()["status"] == "running"

    with subprocess.Popen(
        words(service, "jobs", job_id, "--follow"),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    ) as follower:
        next(follower.stderr)
        _, cancelled = said_by("jobs", job_id, "--cancel")
        assert cancelled.split()[:3] == [job_id, "interrupted", "cancelled"]
        *_, last = follower.stderr
    assert follower.returncode == ExitStatus.JOB_FAILED
    assert re.match(rf"gemma-service: {job_id} was cancelled at step \d+ of 10000\.\n", last)


def test_a_job_that_failed_is_one_line_and_a_status(service, tmp_path):
    data = written(tmp_path / "bad.jsonl", [{"token_ids": [1, LOSS_NOT_FINITE]}])
    process = run(service, "finetune", f"--file={data}", "--adapter=failing")
    said = [line for line in process.stderr.splitlines() if '"event"' not in line]
    assert (process.returncode, process.stdout, len(said)) == (ExitStatus.JOB_FAILED, "", 1)
    assert re.match(r"gemma-service: Job ft_\w+ failed: .*\(non_finite_loss\)", said[0])


def test_a_job_may_be_left_alone_and_listed(service, said_by, data, tmp_path):
    [job_id] = said_by("finetune", f"--file={data}", "--adapter=alone", "--detach")
    [shown] = map(json.loads, said_by("jobs", job_id, "--json"))
    assert (shown["id"], shown["adapter"]) == (job_id, "alone")
    assert eventually(lambda: service.get(f"/finetune/{job_id}").json()["status"] == "succeeded")
    header, newest, *_ = said_by("jobs", "--limit=2")
    assert header.split()[:4] == ["job", "adapter", "status", "step"]
    assert newest.split()[:4] == [job_id, "alone", "succeeded", "1/1"]

    header, *lines = said_by("adapters")
    assert header.split() == ["adapter", "live", "newest"]
    assert ["alone", "1", "1"] in [line.split() for line in lines]
    _, line = said_by("adapters", "alone")
    assert line.split()[:5] == ["1", "yes", job_id, "1", "8"]
    [version] = map(json.loads, said_by("adapters", "alone", "--json"))
    assert (version["version"], version["job"]) == (1, job_id)

    bad = written(tmp_path / "bad.jsonl", [{"token_ids": [1, LOSS_NOT_FINITE]}])
    [failed] = said_by("finetune", f"--file={bad}", "--adapter=failing", "--detach")
    assert eventually(lambda: service.get(f"/finetune/{failed}").json()["status"] == "failed")
    *_, last = said_by("jobs", failed)
    assert re.fullmatch(rf"{failed}: .*\(non_finite_loss\)", last)


def test_a_dry_run_shows_what_would_be_learned(service, said_by, tmp_path):
    data = written(tmp_path / "data.jsonl", [{"prompt": "1 2", "completion": " 3"}])
    options = (f"--file={data}", "--adapter=dry", "--dry-run", "--epochs=2")
    steps, tokens, seconds, row = said_by("finetune", *options)
    assert steps == "steps      2"
    assert re.fullmatch(r"tokens     \d+, \d+ with padding", tokens)
    assert re.fullmatch(r"estimated  \d+:\d\d, if nobody else is served meanwhile", seconds)
    assert re.fullmatch(r"row 1 .*1 .*2 .*\[.*3\].*", row)
    assert '"dry"' not in service.get("/adapters").text


@pytest.mark.parametrize(
    ("rows", "options", "status", "said"),
    [
        ('{"text": "1"}\n\n{"text": }', [], 65, r"\S+/data\.jsonl, line 3: it is not JSON at col"),
        ('{"text": "1"}\n{"txt": "1"}', [], 65, r"should have text; .*data\.jsonl, line 2\)"),
        (None, [], 65, r"\S+/data\.jsonl cannot be read: No such file"),
        ('{"text": "1 2"}', ["--rank=99"], 64, "--rank: should be less than or equal to 64"),
        ('{"text": "1 2"}', ["--init=tone@7"], 64, r".*adapter_not_found"),
        ('{"text": "1 2"}', ["--promote-below=init"], 64, "--promote-below: should be null with"),
        ('{"text": "1 2"}', ["--publish=seldom"], 64, "--publish"),
        ('{"text": "1 2"}', ["--promote-below=nan"], 64, "--promote-below"),
        ('{"text": "1 2"}', ["--targets=kwery"], 64, "--targets"),
        ('{"text": "1 2"}', ["--url=localhost"], 64, "--url: The address of a service is like"),
        ('{"text": "1 2"}', ["--url=http://127.0.0.1:9"], 69, r"Nobody answers at 127\.0\.0\.1:9"),
    ],
)
def test_what_cannot_be_is_one_line(said_by, tmp_path, rows, options, status, said):
    data = tmp_path / "data.jsonl"
    if rows is not None:
        data.write_text(rows)
    with pytest.raises(Exit) as caught:
        said_by("finetune", f"--file={data}", "--adapter=refused", *options)
    assert caught.value.status == status
    assert re.match(said, caught.value.line), caught.value.line
    assert "\n" not in caught.value.line


def test_a_command_without_its_arguments_says_what_it_lacks(said_by):
    for arguments, said in [
        (["finetune"], "--file: Field required\ngemma-service: --adapter: Field required"),
        (["jobs", "--follow"], "--follow and --cancel need the ID of a job."),
        (["jobs", "--limit=0"], "--limit: should be gr"),
        (["jobs", "ft_none"], "No job has that id. (HTTP 404"),
        (["adapters", "none"], "There is no adapter of that name."),
    ]:
        with pytest.raises(Exit) as caught:
            said_by(*arguments)
        assert caught.value.status == ExitStatus.USAGE
        assert caught.value.line.startswith(said), caught.value.line


def test_the_help_has_every_field_of_a_job_with_the_default_of_the_service():
    fields = json.loads(CONTRACT.read_text())["components"]["schemas"]["FinetuneRequest"]
    known = fields["properties"]
    renamed = {"file": "data", "promote_below": "promote"}
    options = {renamed.get(name, name) for name in Finetune.model_fields}
    # Metadata is for programs.
    assert known.keys() - options == {"metadata"}
    told = {
        name: re.search(r"\[(.*)\]$", field.description or "")
        for name, field in Finetune.model_fields.items()
    }
    for name, found in told.items():
        if found is not None and name != "alpha":
            default = known[name]["default"]
            text = ",".join(default) if isinstance(default, list) else f"{default}"
            assert found[1] in (text, text.removesuffix(".0")), name
