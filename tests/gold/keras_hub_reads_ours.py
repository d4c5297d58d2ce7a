"""Loads what our writers wrote with keras-hub, and prints how far its answers are from the goldens.

Runs in keras-hub's environment, without our packages: ``python keras_hub_reads_ours.py DIRECTORY``.
Ends with status 1 if a difference exceeds 5e-4.
"""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import keras_hub
import numpy as np

GOLDENS = Path(__file__).parents[1] / "goldens"
LIMIT = 5e-4


def difference(name: str, written: Path) -> float:
    """Largest difference of hidden states, and of logits with LoRA where there is a file."""
    is_gemma3 = name.startswith("gemma3")
    models = keras_hub.models
    task = models.Gemma3CausalLM if is_gemma3 else models.GemmaCausalLM
    loaded = task.from_preset(str(written / name), dtype="float32")
    given = np.load(GOLDENS / name / "cases.npz")
    inputs = {"token_ids": given["fwd.token_ids"], "padding_mask": given["fwd.padding_mask"]}
    largest = float(np.abs(np.asarray(loaded.backbone(inputs)) - given["fwd.hidden"]).max())
    lora = written / f"{name}.lora.h5"
    if lora.exists():
        loaded.backbone.load_lora_weights(str(lora))
        rows = {
            "token_ids": given["train.x_token_ids"],
            "padding_mask": given["train.x_padding_mask"],
        }
        logits = np.asarray(loaded(rows))
        largest = max(largest, float(np.abs(logits - given["train.lora.logits5"]).max()))
    return largest


def main() -> int:
    written = Path(sys.argv[1])
    differences = {
        name: difference(name, written) for name in ("gemma1_tiny", "gemma2_tiny", "gemma3_tiny")
    }
    for name, largest in differences.items():
        sys.stdout.write(f"keras-hub reads our {name}: largest difference {largest:.1e}\n")
    return int(max(differences.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
