"""Golden data made with keras-hub and transformers; see README.md beside this file."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from model.gemma.backbone import Backbone
from model.presets import resolve
from model.presets.keras_directory import KerasPreset

_ROOT = Path(__file__).parent
TINY_PRESETS = ("gemma1_tiny", "gemma2_tiny", "gemma3_tiny")
# With the kernels that there are, and one of them without: both paths of the products.
PATHS = (*((name, "auto") for name in TINY_PRESETS), ("gemma3_tiny", "xla"))


def directory(name: str) -> Path:
    """Where a golden set lies."""
    return _ROOT / name


def preset_directory(name: str) -> Path:
    """Where the Keras preset of a golden set lies; Gemma 3's is the one that the package ships."""
    if name == "gemma3_tiny":
        return Path(resolve.__file__).parent / "tiny"
    return _ROOT / name / "preset"


@cache
def cases(name: str) -> dict[str, Any]:
    """What was asked."""
    loaded: dict[str, Any] = json.loads((_ROOT / name / "cases.json").read_text())
    return loaded


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """What was answered."""
    with np.load(_ROOT / name / "cases.npz") as archive:
        return {key: archive[key] for key in archive.files}


@cache
def backbone(name: str) -> Backbone:
    """The preset of a golden set, in float32."""
    preset = KerasPreset.open(preset_directory(name))
    return Backbone(preset.config, {key: jnp.asarray(value) for key, value in preset.arrays()})
