"""Draws what was measured: ``plot.py RESULTS.json PICTURE.png``.

Runs in an environment of its own, with matplotlib, and imports nothing of this project. Above, the
open loop by rate: first tokens, gaps, good requests. Below, tokens a second of each peer and ours
in its block.
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_OURS, _THEIRS = "tab:blue", "tab:gray"


def draw_open(axes, result):
    """Three pictures over the rate, a line for each mix."""
    first, gap, good = axes
    for index, (mix, rows) in enumerate(result["mixes"].items()):
        rates = [row["rate"] for row in rows]
        color = f"C{index}"
        for axis, name in ((first, "first_token"), (gap, "gap")):
            for percent, style in (("p50", "o-"), ("p95", "x--")):
                values = [
                    float("nan") if row[f"{name}_{percent}"] is None else row[f"{name}_{percent}"]
                    for row in rows
                ]
                axis.plot(rates, values, style, color=color, label=f"{mix}, {percent}")
        values = [row["goodput"] for row in rows]
        good.plot(rates, values, marker="o", color=color, label=mix)
    target = result["target"]
    first.axhline(target["first_token_seconds"], color="black", linewidth=0.8, linestyle=":")
    gap.axhline(target["median_gap_seconds"], color="black", linewidth=0.8, linestyle=":")
    good.plot(rates, rates, color="black", linewidth=0.8, linestyle=":", label="all of them")
    for axis, title in (
        (first, "first token, s"),
        (gap, "gap between tokens, s"),
        (good, "good requests per second"),
    ):
        axis.set_title(title)
        axis.set_xlabel("requests per second offered")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    first.set_yscale("symlog", linthresh=0.1)


def draw_peers(axes, results):
    """A picture for each number of sequences, two bars for each peer."""
    counts = sorted({int(count) for result in results for count in result["by_streams"]})
    for axis, count in zip(axes, counts, strict=True):
        shown = [result for result in results if str(count) in result["by_streams"]]
        for place, result in enumerate(shown):
            block = result["by_streams"][str(count)]
            for side, offset, color in (("ours", 0.2, _OURS), ("theirs", -0.2, _THEIRS)):
                axis.barh(
                    place + offset,
                    statistics.median(block[side]),
                    height=0.38,
                    color=color,
                    label=side if place == 0 else None,
                )
        axis.set_yticks(range(len(shown)), [result["title"] for result in shown], fontsize=7)
        axis.set_title(f"tokens per second, {count} at once")
        axis.legend(fontsize=7)


def main(source, target):
    parts = json.loads(Path(source).read_text())
    results = [part["result"] for name, part in parts.items() if name.startswith("peers/")]
    measured = [result for result in results if result["by_streams"]]
    counts = {count for result in measured for count in result["by_streams"]}
    rows = ["open"] * ("open" in parts) + ["peers"] * bool(counts)
    figure = pyplot.figure(figsize=(15, 4.5 * len(rows)), layout="constrained")
    subfigures = dict(zip(rows, figure.subfigures(len(rows), squeeze=False)[:, 0], strict=True))
    if "open" in rows:
        draw_open(subfigures["open"].subplots(1, 3), parts["open"]["result"])
    if "peers" in rows:
        draw_peers(subfigures["peers"].subplots(1, len(counts), squeeze=False)[0], measured)
    figure.savefig(target, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
