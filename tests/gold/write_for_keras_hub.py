"""Writes the three tiny presets, and LoRA files of two, with our writers, for keras-hub to read.

Runs in the project's environment: ``python -m tests.gold.write_for_keras_hub DIRECTORY``.
"""

import sys
from pathlib import Path

import jax.numpy as jnp

from model.adapters import load_lora, save_lora
from model.gemma.backbone import GemmaBackbone
from model.presets.keras_directory import KerasPreset
from model.presets.keras_writer import write_keras_preset
from tests import goldens


def main() -> None:
    destination = Path(sys.argv[1])
    for name in goldens.TINY_PRESETS:
        preset = KerasPreset.open(goldens.preset_directory(name))
        proto = preset.tokenizer_proto()
        write_keras_preset(
            destination / name, preset.config, preset.arrays(), proto, sequence_length=24
        )
        stored_lora = goldens.directory(name) / "lora5.lora.h5"
        if stored_lora.exists():
            arrays = {key: jnp.asarray(array) for key, array in preset.arrays()}
            backbone = GemmaBackbone(preset.config, arrays)
            load_lora(stored_lora, backbone)
            save_lora(destination / f"{name}.lora.h5", backbone)


if __name__ == "__main__":
    main()
