"""Jobs and adapters through the client, in both of its kinds, over real processes.

The trainer counts in integers (`tests.fakes.arithmetic_trainer`), so jobs take no time.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.client import (
    Conflict,
    ConnectionLost,
    DataUnreadable,
    EvalEvent,
    InvalidField,
    JobDoneEvent,
    JobFailed,
    JobFailedEvent,
    NotFound,
    StepEvent,
    TimedOut,
    VersionEvent,
    adapters,
    jobs,
)
from service.client.job_views import LineView
from tests.client_kinds import KINDS, Kind, open_client
from tests.fakes.arithmetic_trainer import LOSS_NOT_FINITE
from tests.scripted_server import OK, response, scripted_server
from tests.service_process import ServiceProcess, running_service

ROOT = Path(__file__).parents[1]
ROWS = [{"token_ids": [1, 2, 3 + index]} for index in range(6)]
FIELDS = {
    "validation": [{"token_ids": [4, 5]}],
    "steps": 6,
    "batch_size": 2,
    "publish": {"every": 2},
    "seed": 7,
}
SLOW = {"ARITHMETIC_SLICE_SECONDS": "0.02"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with running_service(tmp_path_factory.mktemp("jobs")) as running:
        yield running


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with running_service(tmp_path_factory.mktemp("slow"), **SLOW) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: ServiceProcess, kind: Kind) -> Iterator[Any]:
    with open_client(kind, service.url) as opened:
        yield opened


# --- jobs -------------------------------------------------------------------------------------


def test_a_job_is_followed_by_typed_events_to_its_end(service, client):
    job = client.finetune(ROWS, adapter="followed", **FIELDS)
    assert job.status == "queued"
    events = list(job.events())

    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    # Two rows of three tokens a step.
    assert {event.tokens for event in steps} == {6}
    assert [event.step for event in events if isinstance(event, EvalEvent)] == [0, 3, 6]
    versions = [event for event in events if isinstance(event, VersionEvent)]
    assert [event.step for event in versions] == [2, 4, 6]
    assert versions[-1].live
    assert isinstance(events[-1], JobDoneEvent)
    assert [event.id for event in events] == sorted({event.id for event in events})
    assert job.history() == events
    assert job.history(after=events[3].id) == list(job.events(after=events[3].id)) == events[4:]

    state = job.refresh()
    assert (job.status, job.version) == ("succeeded", versions[-1].version)
    assert json.loads(state.model_dump_json()) == service.get(f"/finetune/{job.id}").json()
    ended = f"<job {job.id} of followed: succeeded, step 6 of 6, version {job.version}>"
    assert repr(getattr(job, "_inner", job)) == ended


def test_a_job_that_is_waited_for_can_be_asked_at_once(client):
    job = client.finetune(ROWS, adapter="waited", **FIELDS).wait(timeout_s=20)
    assert job.status == "succeeded"
    answer = client.generate([1, 2], model="gemma:waited", max_tokens=1, temperature=0)
    assert answer.model == f"gemma:waited@{job.version}"


def test_a_dry_run_tells_what_would_be_learned_and_starts_nothing(client):
    before = [job.id for job in client.jobs()]
    told = client.dry_run(ROWS, adapter="dry", epochs=2, batch_size=4, seed=3)
    assert told.steps == 4
    assert [row.loss_mask for row in told.first_rows] == [[0, 1, 1]] * 4
    assert [job.id for job in client.jobs()] == before


def test_jobs_are_listed_by_page_and_found_by_their_ids(client):
    started = [client.finetune(ROWS, adapter="listed", steps=1).id for _ in range(3)]
    newest = client.jobs(limit=2)
    older = client.jobs(limit=1, after=newest[-1].id)
    assert [job.id for job in [*newest, *older]] == started[::-1]
    assert client.job(started[0]).adapter == "listed"
    with pytest.raises(NotFound) as caught:
        client.job("ft_none?limit=1")
    assert caught.value.code == "job_not_found"


def test_a_job_that_failed_is_an_error_of_who_waits(client):
    rows = [{"token_ids": [1, LOSS_NOT_FINITE]}]
    job = client.finetune(rows, adapter="failing", steps=3)
    with pytest.raises(JobFailed, match=rf"^Job {job.id} failed: .*\(non_finite_loss\)$") as caught:
        job.wait(timeout_s=20)
    assert (caught.value.job_id, caught.value.code) == (job.id, "non_finite_loss")
    last = job.history()[-1]
    assert isinstance(last, JobFailedEvent)
    assert last.code == "non_finite_loss"


def test_a_job_is_shown_while_it_trains_and_its_failure_too(client):
    shown = io.StringIO()
    job = client.finetune(ROWS, adapter="watched", **FIELDS).watch(LineView(shown))
    *_, last = shown.getvalue().splitlines()
    line = rf"{job.id} watched  step 6/6  loss 0\.\d+  valid 0\.\d+  @\d+ live  succeeded"
    assert re.fullmatch(line, last)

    shown = io.StringIO()
    job = client.finetune([{"token_ids": [1, LOSS_NOT_FINITE]}], adapter="watched")
    with pytest.raises(JobFailed):
        job.watch(LineView(shown))
    assert "  failed  " in shown.getvalue().splitlines()[-1]


def test_a_job_is_cancelled_and_a_wait_that_takes_too_long_leaves_it_alone(kind, slow):
    with open_client(kind, slow.url) as client:
        job = client.finetune(ROWS, adapter="tone", steps=10_000)
        with pytest.raises(TimedOut, match=f"Job {job.id} has not ended within 0.3 s. It goes on."):
            job.wait(timeout_s=0.3)
        assert job.refresh().status == "running"
        assert job.cancel().status == "cancelled"
        assert job.wait(timeout_s=5).status == "cancelled"
        assert list(job.events())[-1].status == "cancelled"


# --- rows -------------------------------------------------------------------------------------


class Cell:
    """As NumPy's numbers and arrays are."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def tolist(self) -> Any:
        return self.value


class NA:
    """As pandas' own: whether it equals anything is not known either."""

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = object.__hash__


class PandasFrame:
    """What a frame of pandas has; an empty cell is NaN or NA."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.columns = sorted({name for row in rows for name in row})

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def to_dict(self, orient: str = "dict") -> Any:
        assert orient == "records"
        empties = [dict.fromkeys(self.columns, empty) for empty in (float("nan"), NA())]
        return [{**empties[place % 2], **row} for place, row in enumerate(self.rows)]


class PolarsFrame:
    """What a frame of polars has; an empty cell is None."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.columns = sorted({name for row in rows for name in row})

    def to_dicts(self) -> Any:
        return [{**dict.fromkeys(self.columns), **row} for row in self.rows]


MIXED = [
    {"token_ids": [1, 2], "loss_mask": [0, 1]},
    {"text": "1 2 3"},
    {"prompt": "1 2", "completion": " 3"},
    {"messages": [{"role": "user", "content": "4"}, {"role": "assistant", "content": "5"}]},
]


def test_rows_are_the_same_from_a_list_a_frame_and_a_file(client, tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in MIXED)
    file.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    arrays = [{**MIXED[0], "token_ids": Cell([1, 2])}, *MIXED[1:]]
    ways = [iter(MIXED), file, str(file), PandasFrame(arrays), PolarsFrame(MIXED), tuple(arrays)]

    digests = set()
    for way in ways:
        job = client.finetune(way, adapter="rows", validation=file, steps=1)
        assert (job.state.rows, job.state.validation) == (4, 4)
        digests.add(job.state.data_digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n\n{"text": }\n', r"rows\.jsonl, line 3: it is not JSON at column 10"),
        (b'{"text": "a"}\n["a"]\n', r"rows\.jsonl, line 2: it is not a JSON object"),
        (b'{"text": NaN}', r"rows\.jsonl, line 1: .*NaN is no number of JSON"),
        (b'{"text": "a", "text": "secret"}', r"rows\.jsonl, line 1: .*a key stands there twice"),
        (rb'{"text": "\ud800"}', r"rows\.jsonl, line 1: it has half of a surrogate pair"),
        (b'{"text": ' + b"[" * 100_000, r"rows\.jsonl, line 1: it is not JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}', r"rows\.jsonl is not UTF-8"),
        (b"\n \n", r"rows\.jsonl has no rows"),
    ],
)
def test_a_file_that_is_none_is_named_with_its_line_before_anything_is_sent(
    tmp_path, content, said
):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with (
        open_client("blocking", "http://127.0.0.1:9") as client,
        pytest.raises(DataUnreadable, match=said) as caught,
    ):
        client.finetune(file, adapter="tone")
    assert "secret" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(client, tmp_path):
    with pytest.raises(DataUnreadable, match=r"gone\.jsonl cannot be read: No such file"):
        client.finetune(ROWS, adapter="tone", validation=tmp_path / "gone.jsonl")


def test_a_row_that_the_service_refuses_is_named_by_its_line(client, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"token_ids": [1, 2]}\n\n{"text": 5}\n')
    with pytest.raises(InvalidField) as caught:
        client.finetune(file, adapter="tone", rank=0)
    told = {field.pointer: field.detail for field in caught.value.errors}
    assert told["/data/1/text"] == f"should be a string ({file}, line 3)"
    assert "line" not in told["/rank"]


def test_an_unknown_keyword_is_a_type_error(client):
    for method in (client.finetune, client.dry_run):
        with pytest.raises(TypeError, match="unexpected keyword argument 'lerning_rate'"):
            method(ROWS, adapter="tone", lerning_rate=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'if_alive'"):
        client.promote("tone", 1, if_alive=1)


# --- adapters ---------------------------------------------------------------------------------


def test_versions_are_listed_moved_deleted_and_told(service, client, kind):
    name = f"versions-{kind}"
    client.finetune(ROWS, adapter=name, **FIELDS).wait(timeout_s=20)

    [summary] = [each for each in client.adapters() if each.name == name]
    assert (summary.live, summary.newest) == (3, 3)
    adapter = client.adapter(name)
    assert json.loads(adapter.model_dump_json()) == service.get(f"/adapters/{name}").json()
    assert [version.version for version in adapter.versions] == [3, 2, 1]
    page = client.adapter(name, below=3, limit=1)
    assert ([version.version for version in page.versions], page.has_more) == ([2], True)
    assert client.version(name, 2) == page.versions[0]

    assert client.promote(name, 1, if_live=3).live == 1
    for expected in (3, None):
        with pytest.raises(Conflict) as caught:
            client.promote(name, 2, if_live=expected)
        assert caught.value.code == "version_conflict"
    assert client.promote(name, 2).live == 2

    client.delete_adapter(name, 1)
    assert [version.version for version in client.adapter(name).versions] == [3, 2]
    client.delete_adapter(name)
    with pytest.raises(NotFound) as caught:
        client.adapter(name)
    assert caught.value.code == "adapter_not_found"


def test_a_file_goes_out_and_comes_in_again(client, kind, tmp_path):
    name = f"files-{kind}"
    for form in ("keras", "peft"):
        job = client.finetune(ROWS, adapter=name, layout=form, **FIELDS).wait(timeout_s=20)
        path = tmp_path / f"adapter.{form}"
        path.write_bytes(b"old")
        client.download(name, job.version, path, format=form)
        assert path.read_bytes().startswith(form.encode())
        version = client.upload(name, path, format=form)
        assert (version.origin, client.adapter(name).live) == ("upload", version.version)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "adapter.keras", tmp_path / "adapter.peft"]


def test_a_download_that_fails_leaves_what_was_there(client, kind, tmp_path):
    path = tmp_path / "tone.lora.h5"
    path.write_bytes(b"old")
    with pytest.raises(NotFound):
        client.download("tone", 999, path)
    half = response(OK, b"half of it", lacks_bytes=9)
    with (
        scripted_server(half) as server,
        open_client(kind, server.url) as other,
        pytest.raises(ConnectionLost),
    ):
        other.download("tone", 1, path)
    assert [(each, each.read_bytes()) for each in tmp_path.iterdir()] == [(path, b"old")]
    with pytest.raises(FileNotFoundError):
        client.download("tone", 1, tmp_path / "no" / "such" / "folder")


# --- the contract -----------------------------------------------------------------------------


def test_every_route_of_jobs_and_adapters_is_asked_by_some_call():
    contract = json.loads((ROOT / "openapi" / "openapi.json").read_text())["paths"]
    routes = {
        (method.upper(), path)
        for path, methods in contract.items()
        if path.startswith(("/finetune", "/adapters"))
        for method in methods
    }
    calls = [
        jobs.finetune_call(ROWS, "tone", {}),
        jobs.jobs_call(20, None),
        jobs.job_call("ft_1"),
        jobs.cancel_job_call("ft_1"),
        jobs.stored_events_call("ft_1", 0),
        adapters.LIST,
        adapters.adapter_call("tone", None, None),
        adapters.version_call("tone", 1),
        adapters.promote_call("tone", 1, {}),
        adapters.delete_call("tone", None),
        adapters.delete_call("tone", 1),
        adapters.upload_call("tone", b"", "keras"),
        adapters.download_call("tone", 1, "keras"),
    ]
    asked = set()
    for call in calls:
        path = call.path.partition("?")[0]
        [route] = [
            route
            for route in routes
            if route[0] == call.method and re.fullmatch(re.sub("{.*?}", "[^/]+", route[1]), path)
        ]
        asked.add(route)
    assert asked == routes
