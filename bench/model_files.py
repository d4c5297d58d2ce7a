"""The weights that the service serves, as files that the peers read.

The demo model comes as one Q4_K_M file, which llama.cpp reads as it is. Our float32 weights are its
dequantised numbers, and so are those of the Keras preset and of the Hugging Face directory.
"""

from dataclasses import dataclass
from pathlib import Path

from model.presets import demo
from model.presets.hf_writer import write_hugging_face
from model.presets.keras_writer import write_keras_preset
from model.presets.resolve import DEMO, open_preset
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """One model, three times."""

    keras: Path
    hugging_face: Path
    gguf: Path


def model_files(directory: Path) -> ModelFiles:
    """Writes what is not in ``directory`` yet; a directory is there whole or not at all."""
    preset = open_preset(DEMO, Settings().cache_dir)
    # Named after the weights, so that another demo model finds none of these.
    directory = directory / preset.preset_digest.removeprefix("sha256:")[:16]
    directory.mkdir(parents=True, exist_ok=True)
    files = ModelFiles(directory / "keras", directory / "hugging_face", demo.assemble(directory))
    tokenizer = preset.tokenizer_proto()
    assert tokenizer is not None, "the demo model has one"
    if not files.keras.exists():
        write_keras_preset(files.keras, preset.config, preset.arrays(), tokenizer)
    if not files.hugging_face.exists():
        write_hugging_face(files.hugging_face, preset.config, preset.arrays(), tokenizer)
    return files
