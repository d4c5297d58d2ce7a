"""Writes ``holes.npz`` of gemma1_tiny: what keras-hub generates from masks with holes.

Runs in keras-hub's environment on its JAX backend, without our packages:
``python tests/gold/make_holes_golden.py [ROOT_OF_GOLDENS]``. Row 0 has a hole before its last
prompt token, row 1 is padded on the left, row 2 has two holes.

| array | content |
|---|---|
| `in_token_ids`, `in_padding_mask` [3, 10] | the prompts |
| `<sampler>.<none or stops>.token_ids`, `.padding_mask` | what `generate` returned |
"""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import keras_hub
import numpy as np

TOKEN_IDS = [
    [2, 40, 77, 91, 0, 33, 0, 0, 0, 0],
    [0, 0, 2, 302, 332, 0, 0, 0, 0, 0],
    [2, 40, 0, 77, 0, 91, 0, 0, 0, 0],
]
PADDING_MASK = [
    [1, 1, 1, 1, 0, 1, 0, 0, 0, 0],
    [0, 0, 1, 1, 1, 0, 0, 0, 0, 0],
    [1, 1, 0, 1, 0, 1, 0, 0, 0, 0],
]
SAMPLERS = {
    "greedy": keras_hub.samplers.GreedySampler,
    "top_k": lambda: keras_hub.samplers.TopKSampler(k=5, seed=3, temperature=2.0),
    "contrastive": lambda: keras_hub.samplers.ContrastiveSampler(k=4, alpha=0.6),
}
STOPS = {"none": None, "stops": (5, 300, 77)}


def main():
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "goldens"
    model = keras_hub.models.GemmaCausalLM.from_preset(
        str(root / "gemma1_tiny" / "preset"), preprocessor=None
    )
    rows = {"token_ids": np.array(TOKEN_IDS), "padding_mask": np.array(PADDING_MASK, bool)}
    stored = {f"in_{key}": value for key, value in rows.items()}
    for name, make in SAMPLERS.items():
        model.compile(sampler=make())
        for kind, stop_token_ids in STOPS.items():
            output = model.generate(rows, stop_token_ids=stop_token_ids)
            for key, value in output.items():
                stored[f"{name}.{kind}.{key}"] = np.asarray(value)
    np.savez_compressed(root / "gemma1_tiny" / "holes.npz", **stored)


if __name__ == "__main__":
    main()
