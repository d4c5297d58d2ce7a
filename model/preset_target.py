"""A model of the Keras classes, written as a preset."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.gemma.backbone import Backbone
from model.presets.hf_writer import MAX_SHARD_BYTES, write_hugging_face
from model.presets.keras_json import Preprocessing
from model.presets.keras_writer import FloatName, write_keras_preset

_GB = 10**9


def save_backbone(
    directory: Path,
    backbone: Backbone,
    *,
    tokenizer_proto: bytes | None = None,
    preprocessing: Preprocessing | None = None,
    max_shard_size: int | float | None,
) -> None:
    """Writes a Keras preset directory; the stored dtype is that of the variables.

    Raises:
        ValueError: ``max_shard_size`` is not above 0.
        PresetError: The directory exists, or cannot be written.
        UnsupportedPreset: The format cannot express the architecture.
    """
    if max_shard_size is not None and not max_shard_size > 0:
        raise ValueError(f"max_shard_size must be above 0 GB, or None, got {max_shard_size}.")
    write_keras_preset(
        directory,
        backbone.config,
        named_arrays(backbone),
        tokenizer_proto,
        preprocessing=preprocessing,
        dtype=_stored_dtype(backbone),
        max_shard_bytes=None if max_shard_size is None else int(max_shard_size * _GB),
    )


def export_backbone(directory: Path, backbone: Backbone, tokenizer_proto: bytes) -> None:
    """Writes a Hugging Face directory; errors as of `save_backbone`."""
    write_hugging_face(
        directory,
        backbone.config,
        named_arrays(backbone),
        tokenizer_proto,
        dtype=_stored_dtype(backbone),
        max_shard_bytes=MAX_SHARD_BYTES,
    )


def named_arrays(backbone: Backbone) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Name and array of every weight, LoRA merged, in the order of `weight_specs`."""
    for name, holder in backbone.holders.items():
        yield name, np.asarray(holder.merged, np.float32)


def _stored_dtype(backbone: Backbone) -> FloatName:
    """bfloat16 for a model whose variables are; everything else fits in float32."""
    return "bfloat16" if backbone.variable_dtype == "bfloat16" else "float32"
