"""LoRA files of the tiny preset, written as a Keras user would."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from model.backbone_lora import save_lora
from model.gemma.backbone import Backbone
from model.gemma.keras_lora import DEFAULT_TARGETS
from model.presets.keras_directory import KerasPreset
from tests import goldens


def lora_file(
    directory: Path, name: str, targets: tuple[str, ...] = DEFAULT_TARGETS, rank: int = 4
) -> Path:
    """An adapter of random numbers that its name decides."""
    preset = KerasPreset.open(goldens.preset_directory("gemma3_tiny"))
    backbone = Backbone(preset.config, {key: jnp.asarray(array) for key, array in preset.arrays()})
    backbone.enable_lora(rank, target_layer_names=targets)
    draw = np.random.default_rng(list(name.encode()))
    for holder in backbone.lora_layers.values():
        for variable in (holder.lora_kernel_a, holder.lora_kernel_b):
            variable.assign(0.3 * draw.normal(size=variable.shape))
    path = directory / f"{name}.lora.h5"
    save_lora(path, backbone)
    return path
