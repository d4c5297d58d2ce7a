"""The Markdown of what was measured."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Part = dict[str, Any]

# Least ratio of our tokens a second to a peer's, by sequences at once.
_ASKED = {
    "bare-jax": {"1": 0.9, "8": 2, "16": 2},
    "keras-hub": {"8": 1.8, "16": 1.8},
    "transformers": {"8": 2.5, "16": 2.5},
    "llama-cpp-q4-k-m": {"8": 0.9, "16": 0.9},
}


def report(parts: dict[str, Any]) -> str:
    """Every part that there is, in a fixed order; each run stated once, with a letter."""
    sections: list[tuple[str, Callable[[Any], list[str]]]] = [
        ("peers", _peers),
        ("closed", _closed),
        ("open", _open),
        ("gaps", _gaps),
        ("prefix", _prefix),
        ("start", _start),
        ("first", _first),
    ]
    runs: list[str] = []
    lines: list[str] = []
    for name, write in sections:
        own = {key: part for key, part in parts.items() if key.split("/")[0] == name}
        if not own:
            continue
        letters = []
        for part in own.values():
            described = _run(part["run"])
            if described not in runs:
                runs.append(described)
            letters.append(_letter(runs.index(described)))
        whose = "Run" if len(set(letters)) == 1 else "Runs"
        lines += ["", *write({key: part["result"] for key, part in own.items()})]
        lines += ["", f"{whose} {', '.join(dict.fromkeys(letters))}.{_compiled(own)}"]
    listed = [f"* {_letter(index)}: {described}" for index, described in enumerate(runs)]
    return "\n".join([*listed, *lines]) + "\n"


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _run(run: dict[str, Any]) -> str:
    kind = "quick, " if run["quick"] else ""
    return (
        f"{kind}begun {run['began']}, load {run['load_before']:.1f} before; "
        f"{run['cores']} cores of {run['processor']}, {run['memory_bytes'] / 2**30:.0f} GiB, "
        f"Python {run['python']}, JAX {run['jax']}, commit {run['commit'] or 'unknown'}."
    )


def _compiled(own: dict[str, Part]) -> str:
    counts = [p["result"]["compilations"] for p in own.values() if "compilations" in p["result"]]
    return f" Programs compiled while serving: {max(counts)}." if counts else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _number(value: float | None, digits: int = 1) -> str:
    return "none" if value is None else f"{value:,.{digits}f}"


def _milliseconds(value: float | None) -> str:
    return _number(None if value is None else value * 1e3, 0)


def _peers(results: dict[str, Any]) -> list[str]:
    """Two tables: tokens a second as ratios, and what else was seen."""
    counts = sorted({int(count) for one in results.values() for count in one["by_streams"]})
    ratios, notes = [], []
    for name, result in results.items():
        blocks = {str(count): result["by_streams"].get(str(count)) for count in counts}
        blocks["prompt"] = result.get("prefill")
        asked = _ASKED.get(name.partition("/")[2], {})
        ratios.append(
            [result["title"], *(_ratio(block, asked.get(key)) for key, block in blocks.items())]
        )
        measured = [block for block in blocks.values() if block is not None]
        versions = ", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items())
        notes.append(
            [
                result["title"],
                " / ".join(_number(block["new_shape_seconds"]) for block in measured),
                " / ".join(str(block["equal_rows"]) for block in measured),
                result.get("failure", versions).replace("|", "/"),
            ]
        )
    columns = ["ours against", *(f"{count} at once" for count in counts), "512-token prompt"]
    return [
        "Tokens per second, ours over theirs (and the two figures):",
        "",
        *_table(columns, ratios),
        "",
        "For each of these columns, how many seconds the first call at its shape took more than "
        "later ones (ours were compiled before the start), and how many rows had our tokens to the "
        "last one:",
        "",
        *_table(["peer", "s more at a new shape", "equal rows", "version, or what failed"], notes),
    ]


def _ratio(block: dict[str, Any] | None, asked: float | None) -> str:
    if block is None:
        return "-"
    ours, theirs = statistics.median(block["ours"]), statistics.median(block["theirs"])
    wanted = "" if asked is None else f", asked {asked:g}"
    return f"{ours / theirs:.2f} × ({ours:.1f} : {theirs:.1f}){wanted}"


def _closed(results: dict[str, Any]) -> list[str]:
    rows = [
        [
            count,
            _number(statistics.median(one["tokens_per_second"])),
            f"{min(one['tokens_per_second']):.1f} to {max(one['tokens_per_second']):.1f}",
            *(_milliseconds(one[name]) for name in ("gap_p50", "gap_p95", "gap_p99")),
            _milliseconds(one["first_token_p50"]),
        ]
        for count, one in results["closed"]["by_streams"].items()
    ]
    columns = ["streams", "tokens/s", "rounds", "gap p50, ms", "p95", "p99", "first token p50, ms"]
    return ["Closed loops, 16 tokens in and 64 out:", "", *_table(columns, rows)]


def _open(results: dict[str, Any]) -> list[str]:
    result = results["open"]
    target = result["target"]
    rows = []
    for mix, measured in result["mixes"].items():
        for one in measured:
            lost = one["refused"] + one["failed"] + one["unfinished"]
            rows.append(
                [
                    mix,
                    f"{one['rate']:g}",
                    f"{one['requests']}, {lost}",
                    _number(one["first_token_p50"], 2),
                    _number(one["first_token_p95"], 2),
                    *(_milliseconds(one[name]) for name in ("gap_p50", "gap_p95", "gap_p99")),
                    _number(one["tokens_per_second"]),
                    _number(one["goodput"], 2),
                    f"{one['prefill_padding']:.0%}, {one['decode_padding']:.0%}",
                ]
            )
    columns = ["mix", "requests/s", "sent, not answered", "first token p50, s", "p95"]
    columns += ["gap p50, ms", "p95", "p99", "tokens/s", "good requests/s", "padding"]
    return [
        f"Open loops: Poisson arrivals for {result['window_seconds']:g} s at each rate, 8 slots. "
        f"Not answered: refused, failed, or given up {result['drain_seconds']:g} s after the last "
        "arrival. Good: the first token within "
        f"{target['first_token_seconds']:g} s of when it was due and a median gap of at most "
        f"{target['median_gap_seconds'] * 1e3:.0f} ms. Padding: share of the computed positions of "
        "prompts, and of the computed rows of steps.",
        "",
        *_table(columns, rows),
    ]


def _gaps(results: dict[str, Any]) -> list[str]:
    result = results["gaps"]
    rows = [
        [
            _milliseconds(one["usual_step"]),
            _milliseconds(one["longest_gap"]),
            f"{one['longest_gap'] / one['usual_step']:.2f} ×",
            _number(one["first_token_alone"], 2),
            _number(one["first_token_beside"], 2),
            f"{one['first_token_beside'] / one['first_token_alone']:.2f} ×",
        ]
        for one in result["rounds"]
    ]
    columns = ["usual step, ms", "longest gap, ms", "ratio"]
    columns += ["first token alone, s", "beside 4 streams, s", "ratio"]
    return [
        "A prompt of 2,000 tokens arrives beside 4 streams; medians of the ratios "
        f"{result['longest_gap_ratio']:.2f} × (asked: 3) and {result['first_token_ratio']:.2f} × "
        "(asked: 1.5):",
        "",
        *_table(columns, rows),
    ]


def _prefix(results: dict[str, Any]) -> list[str]:
    result = results["prefix"]
    rows = [
        [
            _number(one["first"], 3),
            _number(one["second"], 3),
            f"{one['second'] / one['first']:.2f} ×",
            f"{one['cached_tokens']:,}",
        ]
        for one in result["rounds"]
    ]
    columns = ["first token of the first request, s", "of the second", "ratio", "cached tokens"]
    return [
        f"A shared prefix of 1,280 tokens, median of the ratios {result['ratio']:.2f} × (asked: "
        "0.15):",
        "",
        *_table(columns, rows),
    ]


def _start(results: dict[str, Any]) -> list[str]:
    result = results["start"]
    each = ", ".join(f"{seconds:.1f}" for seconds in result["seconds"])
    return [f"A start with full caches: {result['median']:.1f} s (asked: 30); each: {each}."]


def _first(results: dict[str, Any]) -> list[str]:
    rows = [
        [kind, "-", "-", one["refused"].replace("|", "/")]
        if "refused" in one
        else [kind, _number(one["first"], 2), _number(one["later"], 2), f"{one['ratio']:.2f} ×"]
        for kind, one in results["first"]["kinds"].items()
    ]
    columns = ["kind", "first call, s", "later ones", "ratio (asked: 1.5)"]
    return [
        "The first call of each kind after a start, medians over the starts:",
        "",
        *_table(columns, rows),
    ]
