"""PEFT's adapters: safetensors beside ``adapter_config.json``, or with its fields as metadata.

A directory is what PEFT itself reads and writes. One file is what travels over HTTP: the same
tensors, and each field of the config as JSON in the metadata.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from model.adapter_exchange.peft_config import MODULES, fields_of, form_of
from model.adapter_file import form_shapes, refuse_non_finite
from model.config import GemmaConfig
from model.errors import PresetFileInvalid
from model.gemma.keras_lora import TARGETS
from model.lora_adapter import LoraAdapter, LoraForm, Place
from model.presets.entry_directory import write_synced
from model.presets.hf_layout import HEAD_BY_PREFIX
from model.presets.safetensors_content import read_tensors
from model.presets.safetensors_header import SafetensorsHeader
from model.presets.safetensors_stream import TensorPlan, tensor_bytes
from model.presets.written_preset import new_directory

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_WRAPPER = "base_model.model."


def read_peft(
    content: bytes,
    header: SafetensorsHeader,
    fields: Mapping[str, object],
    config: GemmaConfig,
) -> LoraAdapter:
    """The adapter in a file's ``content``; ``fields`` are those of its config.

    Raises:
        PresetFileInvalid: It is no such file, or does not fit this model.
        AdapterUnfit: It is of a kind that is not served, or a number in it is not finite.
    """
    prefix = _prefix(header)
    targets = [t for t in TARGETS if _tensor_names(prefix, (0, t))[0] in header.entries]
    form = form_of(fields, targets, header.source)
    shapes = _tensor_shapes(config, form, prefix)
    arrays = read_tensors(content, header, shapes)
    pairs = {}
    for place in form_shapes(config, form):
        a, b = (arrays[name] for name in _tensor_names(prefix, place))
        pairs[place] = a, b
    refuse_non_finite(pairs)
    return LoraAdapter(form, pairs)


def peft_file(adapter: LoraAdapter, config: GemmaConfig) -> bytes:
    """An adapter in PEFT's layout as one file."""
    fields = {name: json.dumps(value) for name, value in fields_of(adapter.form).items()}
    return _tensor_bytes(adapter, config, fields)


def write_peft_directory(path: Path, adapter: LoraAdapter, config: GemmaConfig) -> None:
    """Makes a directory, whole or not at all.

    Raises:
        PresetError: There is something already, or the disk refuses.
    """
    with new_directory(path) as staging:
        text = json.dumps(fields_of(adapter.form), indent=2) + "\n"
        write_synced(staging / CONFIG, text.encode())
        write_synced(staging / WEIGHTS, _tensor_bytes(adapter, config, {}))


def _tensor_bytes(adapter: LoraAdapter, config: GemmaConfig, metadata: Mapping[str, str]) -> bytes:
    shapes = _tensor_shapes(config, adapter.form, "model.")
    plans = [TensorPlan(name, shape, np.dtype(np.float32)) for name, shape in shapes.items()]
    places = form_shapes(config, adapter.form)
    arrays = (array for place in places for array in adapter.pairs[place])
    return tensor_bytes(plans, arrays, metadata)


def _prefix(header: SafetensorsHeader) -> str:
    """What stands before the layers, which depends on the class that was trained."""
    for prefix in HEAD_BY_PREFIX:
        if any(name.startswith(f"{_WRAPPER}{prefix}layers.0.") for name in header.entries):
            return prefix
    raise PresetFileInvalid(
        f"{header.source}: no tensor has a name such as {_tensor_names('model.', (0, 'query'))[0]}."
    )


def _tensor_names(prefix: str, place: Place) -> tuple[str, str]:
    layer, target = place
    module = f"{_WRAPPER}{prefix}layers.{layer}.{MODULES[target]}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _tensor_shapes(config: GemmaConfig, form: LoraForm, prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for place, pair in form_shapes(config, form).items()
        for name, shape in zip(_tensor_names(prefix, place), pair, strict=True)
    }
