"""Draws the demo: ``learning_plot.py NUMBERS.json PICTURE.png``.

Runs in an environment of its own, with matplotlib, and imports nothing of this project. Above the
losses of both jobs, with a mark for each version; below how long each token of the stream took.
"""

import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def gaps_of(arrivals):
    """When tokens came that have some before them in their answer, and how long each took."""
    return [
        (after, (after - before) / count)
        for (before, _), (after, count) in pairwise(arrivals)
        if before and after
    ]


def draw_losses(axis, jobs):
    for index, job in enumerate(jobs):
        times, losses = zip(*job["losses"], strict=True)
        last = job["answers"][-1]
        label = f"{job['adapter']}@{last['version']} says: “{last['text']}”"
        axis.plot(times, losses, color=f"C{index}", label=label)
        for answer in job["answers"]:
            axis.axvline(answer["told"], color=f"C{index}", linewidth=0.8, linestyle=":")
    axis.set_ylabel("loss of each step")
    axis.set_ylim(bottom=0)
    axis.legend(title="jobs; dotted: a version is told")


def draw_gaps(axis, found):
    began, ended = found["training"]
    gaps = gaps_of(found["arrivals"])
    axis.plot(
        [at for at, _ in gaps], [1000 * gap for _, gap in gaps], ".", color="tab:gray", markersize=3
    )
    axis.axvspan(began, ended, color="tab:orange", alpha=0.12, label="training")
    for label, is_in in (("alone", False), ("beside training", True)):
        own = [1000 * gap for at, gap in gaps if (began <= at <= ended) is is_in]
        median = statistics.median(own)
        axis.axhline(
            median,
            linewidth=0.8,
            linestyle="--" if is_in else ":",
            color="black",
            label=f"median {label}: {median:.0f} ms",
        )
    axis.set_ylabel("time of a token, ms")
    axis.set_xlabel("seconds")
    axis.set_ylim(bottom=0)
    axis.legend()


def main():
    found = json.loads(Path(sys.argv[1]).read_text())
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(10, 7), sharex=True)
    draw_losses(above, found["jobs"])
    draw_gaps(below, found)
    above.set_title("two jobs train while a client streams, and their versions answer")
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
