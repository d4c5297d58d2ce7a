"""The bench counts right, and its open loop does not wait for slow answers."""

import asyncio
import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest

from bench import results
from bench.benchmarks_page import PAGE, with_report
from bench.environments import REQUIREMENTS
from bench.open_loop import offer, poisson_arrivals
from bench.padding import padding_share
from bench.peer_process import PeerFailed, PeerProcess
from bench.report import report
from bench.service_metrics import wait_until_idle
from bench.streams import Ask, Record
from bench.summary import Target, longest_wait, percentile, summarize, token_gaps
from tests.fakes.arithmetic_engine import NOT_FINITE, ONCE, next_token
from tests.service_process import REPOSITORY, running_service
from tests.test_documents import read_table

# --- arithmetic ---------------------------------------------------------------------------------


def record(
    due: float, *arrivals: tuple[float, int], prompt: int = 1, outcome: str = "done"
) -> Record:
    """A request sent when it was due."""
    ended = arrivals[-1][0] if arrivals else due + 9
    answered = Record(prompt, due, due, list(arrivals), ended=ended)
    answered.outcome = outcome  # type: ignore[assignment]
    return answered


def test_percentiles_lie_between_the_nearest_values():
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([4, 1, 3, 2], 95) == pytest.approx(3.85)
    assert percentile([7], 99) == 7
    assert math.isnan(percentile([], 50))


def test_tokens_that_arrive_together_share_their_time():
    assert token_gaps(record(0, (1, 1), (3, 2), (6, 1))) == [1, 1, 3]
    assert token_gaps(record(0, (1, 1))) == []


def test_the_longest_wait_is_one_that_overlaps_the_span():
    stream = record(0, (0, 1), (5, 1), (6, 1), (8, 1), (9, 1), (19, 1))

    assert longest_wait(stream, 5.5, 8.5) == 2
    assert longest_wait(stream, 4.9, 8.5) == 5
    assert longest_wait(stream, 5.5, 9.1) == 10


def test_an_answer_is_good_if_it_is_whole_and_fast_enough():
    target = Target(first_token_seconds=2, median_gap_seconds=1)

    assert target.is_met(record(3, (5, 1), (6, 1)))
    assert target.is_met(record(3, (5, 1)))
    assert not target.is_met(record(3, (5.1, 1), (6, 1)))
    assert not target.is_met(record(3, (5, 1), (6.1, 1)))
    assert not target.is_met(record(3, (5, 1), (6, 1), outcome="unfinished"))


def test_a_row_of_the_open_loop_is_what_its_requests_add_up_to():
    requests = [
        record(0, (1, 1), (2, 1), (3, 1)),
        record(2, (7, 1), (8, 2), (11, 1)),  # the last token comes after the window
        record(4, outcome="unfinished"),  # waited 9 seconds, without a token
        record(5, outcome="refused"),
    ]

    row = summarize(requests, 10, Target(first_token_seconds=2, median_gap_seconds=1))

    assert [row[name] for name in ("requests", "refused", "failed", "unfinished")] == [4, 1, 0, 1]
    assert row["first_token_p50"] == 5  # of 1, 5 and 9
    assert row["gap_p50"] == 1  # of 1, 1, 0.5, 0.5 and 3
    assert row["gap_p95"] == pytest.approx(2.6)
    assert row["tokens_per_second"] == 0.6
    assert row["goodput"] == 0.1
    assert row["sent_late_seconds"] == 0


def test_padding_is_a_share_of_what_was_computed_meanwhile():
    before = {"prefill request": 10, "prefill padding": 5, "decode request": 7, "decode padding": 7}
    after = {"prefill request": 40, "prefill padding": 15, "decode request": 7, "decode padding": 7}
    assert padding_share(before, after, "prefill") == 10 / 40
    assert padding_share(before, after, "decode") == 0


def test_arrivals_are_poisson_and_the_same_for_the_same_seed():
    times = poisson_arrivals(100, 100, seed=1)

    assert times == poisson_arrivals(100, 100, seed=1) != poisson_arrivals(100, 100, seed=2)
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 100
    # 10,000 ± 100 of them; and a gap exceeds its mean with probability 1 / e.
    assert 9_600 < len(times) < 10_400
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert sum(gap > 0.01 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, abs=0.02)


# --- the open loop ------------------------------------------------------------------------------


def continuation(prompt: tuple[int, ...], count: int) -> list[int]:
    """What the arithmetic engine answers."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def harmless_asks(count: int, num_new_tokens: int) -> list[Ask]:
    """Prompts in whose answers there is none of the tokens that make the engine fail."""
    harmful = set(range(NOT_FINITE, ONCE + 1))
    prompts = ((1, number) for number in itertools.count(1))
    harmless = (p for p in prompts if not harmful & set(continuation(p, num_new_tokens)))
    return [Ask(prompt, num_new_tokens) for prompt in itertools.islice(harmless, count)]


def test_requests_leave_when_they_are_due_and_every_token_is_received(tmp_path):
    # Some 20 requests in half a second, for which two slots need more than two.
    arrivals = poisson_arrivals(40, 0.5, seed=3)
    asks = harmless_asks(len(arrivals), 10)
    with running_service(tmp_path, "--slots=2", ARITHMETIC_STEP_SECONDS="0.02") as service:
        records = asyncio.run(offer(service.url, asks, arrivals, drain_seconds=30))

        assert [one.token_ids for one in records] == [
            continuation(ask.token_ids, 10) for ask in asks
        ]
        assert {one.outcome for one in records} == {"done"}
        # The slots fall behind by more than a second, and the arrivals do not.
        assert records[-1].first_token_seconds > 1
        assert max(one.sent - one.due for one in records) < 0.5

        given_up = asyncio.run(offer(service.url, asks, [0.0] * len(asks), drain_seconds=0.3))

        assert {"unfinished"} <= {one.outcome for one in given_up} <= {"unfinished", "done"}
        assert all(
            one.token_ids == continuation(ask.token_ids, 10)[: len(one.token_ids)]
            for ask, one in zip(asks, given_up, strict=True)
        )
        wait_until_idle(service.url)


# --- peers --------------------------------------------------------------------------------------

PEER = """
import sys
sys.path.insert(0, sys.argv[1])
from answering import serve

def generate(prompts, num_new_tokens):
    print("a library talks")
    if prompts == [[13]]:
        raise ValueError("thirteen")
    return [[prompt[-1] + 1 + i for i in range(num_new_tokens)] for prompt in prompts]

serve(generate, ["pytest"])
"""


def test_a_peer_answers_until_it_fails_and_then_its_last_words_are_told(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    arguments = [str(REPOSITORY / "bench" / "peers")]

    with PeerProcess(Path(sys.executable), str(script), arguments, tmp_path / "log") as peer:
        assert peer.versions() == {"pytest": pytest.__version__}
        answer = peer.generate([[1, 2], [3, 4]], 3)
        assert answer.token_ids == [[3, 4, 5], [5, 6, 7]]
        assert 0 < answer.seconds < 1
        with pytest.raises(PeerFailed, match=r"status 1.*ValueError: thirteen"):
            peer.generate([[13]], 1)
        with pytest.raises(PeerFailed, match="thirteen"):
            peer.generate([[1]], 1)


# --- what is written ----------------------------------------------------------------------------

RUN = {
    "began": "2026-01-02",
    "quick": False,
    "commit": "abc",
    "load_before": 0.25,
    "processor": "a processor",
    "cores": 2,
    "memory_bytes": 2**34,
    "python": "3.11.7",
    "jax": "0.10.2",
}
BLOCK = {"ours": [30.0, 50.0], "theirs": [10.0], "new_shape_seconds": 12.25, "equal_rows": 8}


def test_a_part_measured_again_replaces_itself_alone_and_each_part_names_its_run(tmp_path):
    path = tmp_path / "new" / "engine.json"
    peer = {"title": "a peer", "by_streams": {"8": BLOCK}, "failure": "ended with status 1: a | b"}
    results.keep(path, "start", RUN, {"seconds": [9.0], "median": 9.0})
    results.keep(path, "peers/keras-hub", RUN, peer)
    results.keep(
        path, "start", {**RUN, "quick": True}, {"seconds": [1.5], "median": 1.5, "x": math.nan}
    )

    parts = results.read(path)
    text = report(parts)

    assert json.loads(path.read_text())["start"]["result"] == {
        "seconds": [1.5],
        "median": 1.5,
        "x": None,
    }
    assert parts["peers/keras-hub"]["result"] == peer
    assert "* A: begun 2026-01-02, load 0.2 before; 2 cores of a processor, 16 GiB" in text
    assert "* B: quick, begun 2026-01-02" in text
    assert "| a peer | 4.00 × (40.0 : 10.0), asked 1.8 | - |" in text
    assert "| a peer | 12.2 | 8 | ended with status 1: a / b |" in text


def test_the_report_takes_the_place_between_the_comments_and_no_other():
    page = PAGE.read_text()

    written = with_report(page, "| new |\n")

    assert "<!-- made by: make bench -->\n| new |\n<!-- end -->\n" in written
    assert with_report(written, "| newer |\n").replace("newer", "new") == written
    assert written.partition("<!--")[0] == page.partition("<!--")[0]
    assert written.partition("<!-- end -->")[2] == page.partition("<!-- end -->")[2]
    with pytest.raises(ValueError, match="lost the comments"):
        with_report("no comments", "")


def test_every_environment_is_explained_and_pins_every_package():
    rows = read_table((REPOSITORY / "docs" / "dependencies.md").read_text(), "environment")

    assert {row["environment"].strip("`") for row in rows} == REQUIREMENTS.keys()
    for path in REQUIREMENTS.values():
        for line in path.read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[\w-]+==[\d.]+", line), line
