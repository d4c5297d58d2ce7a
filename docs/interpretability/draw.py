"""Draws the pictures of docs/interpretability.md: ``draw.py NUMBERS.json DIRECTORY``.

Needs matplotlib, which is not part of this project's environment, and imports nothing of it.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def draw_steering(axes, found):
    """A line for each word over the scale."""
    for word, values in zip(found["words"], zip(*found["logprobs"], strict=True), strict=True):
        axes.plot(found["scales"], values, marker="o", markersize=3, label=word.strip())
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("scale of the vector")
    axes.set_ylabel("log-probability")
    axes.legend()


def draw_patching(axes, found):
    """A cell for each layer and position."""
    image = axes.imshow(found["logprobs"], cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(found["layers"])), found["layers"], fontsize=7)
    axes.set_xticks(range(len(found["tokens"])), found["tokens"])
    axes.set_xlabel("token that is patched")
    axes.set_ylabel("layer that is patched")
    axes.figure.colorbar(image, label="log-probability of the other prompt's answer")


def draw_attribution(axes, found):
    """A cell for each token, with its number."""
    scores = found["scores"]
    most = max(map(abs, scores)) or 1.0
    axes.imshow([scores], cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for place, score in enumerate(scores):
        color = "white" if abs(score) > 0.6 * most else "black"
        axes.text(place, 0, f"{score:+.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(scores)), [token.replace("▁", " ") for token in found["tokens"]])
    axes.set_yticks([])


PICTURES = {
    "steering": (draw_steering, (6, 3.5)),
    "patching": (draw_patching, (6, 4.5)),
    "attribution": (draw_attribution, (8, 1.2)),
}


def main(source, directory):
    numbers = json.loads(Path(source).read_text())
    for name, (draw, size) in PICTURES.items():
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        draw(axes, numbers[name])
        figure.savefig(Path(directory) / f"{name}.png", dpi=100)
        pyplot.close(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
