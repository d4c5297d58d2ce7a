"""docs/benchmarks.md, of which one block is written by ``make bench``."""

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
_BEGIN = "<!-- made by: make bench -->\n"
_END = "<!-- end -->\n"


def with_report(page: str, report: str) -> str:
    """The page with ``report`` in place of what stood between the comments."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} lost the comments around the report of the bench")
    return before + begin + report + end + after
