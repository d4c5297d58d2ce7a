"""What is shown of a job, worked out by hand from a few events."""

import io
import re
import sys
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import pytest

from service.client.job_events import (
    EvalEvent,
    JobDoneEvent,
    JobFailedEvent,
    StatusEvent,
    StepEvent,
    VersionEvent,
)
from service.client.job_progress import JobProgress, duration
from service.client.job_views import LineView, TerminalView, bar_line, status_line, view_for
from service.client.notebook_view import NotebookView, as_html, notebook_display, thinned


def step(number, tokens=60, tokens_per_s=30.0, loss=None):
    return StepEvent(
        step=number,
        loss=4.0 - number if loss is None else loss,
        learning_rate=0.1,
        grad_norm=1.0,
        tokens=tokens,
        tokens_per_s=tokens_per_s,
        rows_shared=0,
    )


def progress_after(*events, total_steps=8):
    progress = JobProgress("ft_1", "tone", total_steps)
    for event in events:
        progress.take(event)
    return progress


VERSION = VersionEvent(version=3, adapter="tone", step=2, digest="sha256:0", live=True)
HALF = (StatusEvent(status="running"), EvalEvent(step=0, valid_loss=5.0), step(1), step(2), VERSION)


def test_speed_and_time_left_are_those_of_the_last_steps():
    # 60 tokens in 2 s, then 30 in 4 s: 90 in 6 s; six steps are left, 3 s each.
    progress = progress_after(step(1), step(2, tokens=30, tokens_per_s=7.5))
    assert progress.tokens_per_s == 15.0
    assert progress.seconds_left == 18.0
    # Twenty steps of 1 s: the slow one before them counts no more.
    fast = [step(number, tokens=10, tokens_per_s=10.0) for number in range(2, 22)]
    progress = progress_after(step(1, tokens_per_s=0.001), *fast, total_steps=121)
    assert (progress.tokens_per_s, progress.seconds_left) == (10.0, 100.0)


def test_nothing_is_said_of_what_is_not_known():
    progress = progress_after(StatusEvent(status="queued"))
    assert (progress.loss, progress.valid_loss, progress.version) == (None, None, None)
    assert (progress.tokens_per_s, progress.seconds_left, progress.figures()) == (None, None, [])
    # A step that took no time says nothing of speed.
    assert progress_after(step(1, tokens_per_s=0.0)).seconds_left is None
    assert status_line(progress) == "ft_1 tone  step 0/8  queued"


def test_a_bar_has_its_share_of_cells_and_the_figures():
    line = bar_line(progress_after(*HALF))
    # A quarter of 24 cells.
    bar = "━" * 6 + "─" * 18
    assert line == f"tone {bar}  2/8  loss 2  valid 5  30 tokens/s  @3 live  0:12 left"
    assert bar_line(progress_after(*HALF), has_blocks=False).startswith(
        f"tone {'#' * 6}{'-' * 18} "
    )


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (StatusEvent(status="paused", detail="no room"), "0:12 left  paused  no room"),
        (JobDoneEvent(status="cancelled", step=2, version=3), "@3 live  cancelled"),
        (
            JobFailedEvent(status="failed", step=2, version=3, code="non_finite_loss", detail=None),
            "@3 live  failed  non_finite_loss",
        ),
    ],
)
def test_a_job_that_does_not_run_says_so_last_and_why(last, words):
    progress = progress_after(*HALF, last)
    assert bar_line(progress).endswith(words)
    assert status_line(progress).endswith(words)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3599.6, "1:00:00"), (36_610, "10:10:10")]
)
def test_a_duration_is_minutes_and_seconds(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_terminal_has_one_line_that_is_written_again_and_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal, times = Terminal(), iter([0.0, 0.0, 0.05, 0.2, 0.2, 0.3])
    view = TerminalView(terminal, lambda: next(times))
    for number in (1, 2, 3):
        view.show(progress_after(*(step(each) for each in range(1, number + 1))))
    view.close()

    text = terminal.getvalue()
    assert text.endswith("\n")
    shown = text.rstrip("\n").split("\r\x1b[2K")[1:]
    # The second came too soon after the first.
    assert [re.search(r"(\d)/8", line)[1] for line in shown] == ["1", "3", "3"]
    assert {len(line) for line in shown} == {39}


def test_a_file_has_a_line_for_each_news_and_every_two_seconds():
    file, now = io.StringIO(), SimpleNamespace(time=0.0)
    view = LineView(file, lambda: now.time)
    events = []
    for seconds, event in [
        (0.0, StatusEvent(status="queued")),
        (0.1, StatusEvent(status="running")),
        (0.2, step(1)),
        (2.2, step(2)),
        (2.3, step(3)),
    ]:
        now.time = seconds
        events.append(event)
        view.show(progress_after(*events))
    view.close()
    steps = [re.search(r"step (\d)/8", line)[1] for line in file.getvalue().splitlines()]
    assert steps == ["0", "0", "2", "3"]


def test_a_terminal_gets_a_bar_and_anything_else_lines():
    assert type(view_for(Terminal())) is TerminalView
    assert type(view_for(io.StringIO())) is LineView


# --- notebooks --------------------------------------------------------------------------------


class Display:
    """As `IPython.display`: notes what a cell shows."""

    def __init__(self):
        self.shown = []

    def HTML(self, text):
        return text

    def display(self, content, *, display_id):
        assert display_id is True
        self.shown.append(content)
        return SimpleNamespace(update=self.shown.append)


def test_a_notebook_has_one_output_that_is_replaced():
    display, times = Display(), iter([0.0, 0.0, 0.1, 0.2])
    view = NotebookView(display, lambda: next(times))
    view.show(progress_after(step(1)))
    view.show(progress_after(step(1), step(2)))
    view.close()
    assert [re.search(r"step (\d) of", shown)[1] for shown in display.shown] == ["1", "2"]


@pytest.mark.parametrize(
    ("shell", "is_notebook"), [(SimpleNamespace(kernel=1), True), (SimpleNamespace(), False)]
)
def test_a_notebook_is_known_by_the_kernel_of_its_shell(monkeypatch, shell, is_notebook):
    assert notebook_display() is None
    python = ModuleType("IPython")
    python.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", python)
    monkeypatch.setitem(sys.modules, "IPython.display", display := Display())
    assert notebook_display() is (display if is_notebook else None)
    assert (type(view_for()) is NotebookView) == is_notebook


def test_losses_are_drawn_from_the_first_step_to_the_last_one_there_will_be():
    progress = progress_after(step(2, loss=1.0), step(4, loss=3.0), EvalEvent(step=4, valid_loss=2))
    page = as_html(progress)
    drawing = ElementTree.fromstring(page[page.index("<svg") :])
    lines = drawing.findall("polyline")
    # 580 wide from 48: steps 2 and 4 of 8; 164 high from 12: the lowest loss and the highest.
    assert lines[0].get("points") == "193.0,176.0 338.0,12.0"
    [dot] = drawing.findall("circle")
    assert (dot.get("cx"), dot.get("cy")) == ("338.0", "94.0")
    assert [text.text for text in drawing.findall("text")] == ["3", "1", "0", "step 8"]


def test_what_the_service_says_is_text_in_a_page():
    progress = progress_after(StatusEvent(status="paused", detail="<script>alert(1)</script>"))
    assert "<script" not in as_html(progress)
    assert "&lt;script&gt;" in as_html(progress)


def test_a_loss_that_stands_still_is_a_line_and_a_long_job_is_thinned():
    assert "NaN" not in as_html(progress_after(step(1, loss=1.0), step(2, loss=1.0)))
    # Four neighbours each: their mean.
    thin = thinned([(index, index / 2) for index in range(1000)])
    assert len(thin) == 250
    assert thin[1] == (5.5, 2.75)
    assert thinned([(1, 1.0)] * 300) == [(1, 1.0)] * 300
