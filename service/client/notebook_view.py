"""A job shown in a notebook while it trains: its figures, and its losses as a drawing.

The drawing is SVG that is written here, so no library is needed for it. IPython is not imported
either: where a notebook runs, it is there already.
"""

import html
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from service.client.job_progress import JobProgress

_SECONDS = 0.5
_WIDTH, _HEIGHT = 640, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 24
# More would not be seen, and would be sent to the browser again and again.
_MAX_POINTS = 300

Point = tuple[float, float]


def notebook_display() -> Any:
    """IPython's module for what cells show; None where no notebook runs."""
    python = sys.modules.get("IPython")
    shell = None if python is None else python.get_ipython()
    # A terminal's shell has no kernel, and shows no pictures.
    return sys.modules.get("IPython.display") if hasattr(shell, "kernel") else None


class NotebookView:
    """One output of a cell, which is replaced as the job goes on.

    Args:
        display: `notebook_display()`.
        clock: Seconds.
    """

    def __init__(self, display: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._display = display
        self._clock = clock
        self._shown = float("-inf")
        self._handle: Any = None
        self._last: JobProgress | None = None

    def show(self, progress: JobProgress) -> None:
        self._last = progress
        if self._clock() - self._shown >= _SECONDS:
            self._draw(progress)

    def close(self) -> None:
        if self._last is not None:
            self._draw(self._last)

    def _draw(self, progress: JobProgress) -> None:
        self._shown = self._clock()
        content = self._display.HTML(as_html(progress))
        if self._handle is None:
            self._handle = self._display.display(content, display_id=True)
        else:
            self._handle.update(content)


def as_html(progress: JobProgress) -> str:
    """The figures of a job, and its losses by step."""
    words = [
        f"{progress.adapter}: {progress.status}",
        f"step {progress.step} of {progress.total_steps}",
        *progress.figures(),
    ]
    if progress.detail is not None:
        words.append(progress.detail)
    return f"<div>{html.escape(' · '.join(words))}</div>{_drawing(progress)}"


def _drawing(progress: JobProgress) -> str:
    """Losses as a line, those on the validation rows as a line with dots; "" before the first."""
    both = [*progress.losses, *progress.valid_losses]
    if not both:
        return ""
    low, high = min(loss for _, loss in both), max(loss for _, loss in both)
    height = (high - low) or 1.0
    last = max(progress.total_steps, 1)

    def place(step: float, loss: float) -> Point:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - loss) / height
        return round(x, 1), round(y, 1)

    parts = [
        *(_version(place(step, low)[0], number) for step, number, _ in _newest(progress)),
        _line([place(*point) for point in thinned(progress.losses)], "#4269d0"),
        *_dotted([place(*point) for point in thinned(progress.valid_losses)], "#e07b39"),
        _text(_LEFT - 4, _TOP + 4, f"{high:.3g}", "end"),
        _text(_LEFT - 4, _HEIGHT - _BOTTOM, f"{low:.3g}", "end"),
        _text(_LEFT, _HEIGHT - 6, "0", "middle"),
        _text(_WIDTH - _RIGHT, _HEIGHT - 6, f"step {last}", "end"),
    ]
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="11" fill="currentColor" role="img" '
        f'aria-label="loss by step">{"".join(parts)}</svg>'
    )


def thinned(points: Sequence[Point]) -> list[Point]:
    """Means of neighbours, so that no more than some hundreds are left."""
    size = -(-len(points) // _MAX_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def _newest(progress: JobProgress) -> Sequence[tuple[int, int, bool]]:
    """Versions that have a mark: too many marks would be a grey field."""
    return progress.versions[-20:]


def _version(x: float, number: int) -> str:
    line = (
        f'<line x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="currentColor" '
        f'stroke-opacity="0.25"><title>version {number}</title></line>'
    )
    return line


def _line(points: Sequence[Point], colour: str) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _dotted(points: Sequence[Point], colour: str) -> list[str]:
    dots = [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in points]
    return [_line(points, colour), *dots] if dots else []


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
