"""LoRA of a Keras backbone, to and from the ``.lora.h5`` files of keras-hub.

They are read in process, as everything that a Python user loads.
"""

from pathlib import Path

import numpy as np

from model.adapter_exchange.keras_datasets import read_datasets
from model.adapter_exchange.keras_file import SUFFIX, adapter_of, write_keras_file
from model.gemma.backbone import Backbone
from model.gemma.keras_lora import TARGETS
from model.lora_adapter import LoraAdapter, LoraForm, Pair, Place
from model.presets.regular_file import open_regular_file
from model.weight_names import block_weight_name


def save_lora(path: Path, backbone: Backbone) -> None:
    """Writes the LoRA of a backbone, complete or not at all.

    Raises:
        ValueError: The name does not end in ``.lora.h5``, or no layer has LoRA.
    """
    _check_suffix(path)
    if not backbone.lora_layers:
        raise ValueError("No layer has LoRA; call enable_lora first.")
    write_keras_file(path, _adapter(backbone), backbone.config)


def load_lora(path: Path, backbone: Backbone) -> None:
    """Reads a file into a backbone, whose LoRA is enabled with the file's targets if it is not.

    Raises:
        ValueError: The name does not end in ``.lora.h5``, or LoRA is enabled with another rank or
            other targets than the file's.
        PresetFileMissing: There is no such file.
        PresetFileInvalid: It is not such a file, or does not fit this model.
        AdapterUnfit: A number in it is not finite.
    """
    _check_suffix(path)
    with open_regular_file(path.parent, path.name) as file:
        datasets = read_datasets(file, str(path))
    adapter = adapter_of(datasets, backbone.config, str(path))
    rank, targets = adapter.form.rank, [t for t in TARGETS if t in adapter.form.targets]
    if not backbone.lora_layers:
        backbone.enable_lora(rank, target_layer_names=targets)
    holders = {place: block_weight_name(*place) for place in adapter.pairs}
    if set(holders.values()) != backbone.lora_layers.keys():
        raise ValueError(f"LoRA is enabled with other targets than {', '.join(targets)}.")
    for place, (a, b) in adapter.pairs.items():
        holder = backbone.lora_layers[holders[place]]
        if holder.lora_kernel_b.shape[0] != rank:
            enabled = holder.lora_kernel_b.shape[0]
            raise ValueError(f"LoRA is enabled with rank {enabled}, the file has rank {rank}.")
        holder.lora_kernel_a.assign(a)
        holder.lora_kernel_b.assign(b)


def _adapter(backbone: Backbone) -> LoraAdapter:
    pairs: dict[Place, Pair] = {}
    for layer in range(backbone.config.num_layers):
        for target in TARGETS:
            holder = backbone.lora_layers.get(block_weight_name(layer, target))
            if holder is not None:
                kernels = holder.lora_kernel_a, holder.lora_kernel_b
                a, b = (np.asarray(kernel, np.float32) for kernel in kernels)
                pairs[layer, target] = a, b
    rank = b.shape[0]
    targets = tuple(sorted({target for _, target in pairs}))
    return LoraAdapter(LoraForm("keras", rank, float(rank), targets), pairs)


def _check_suffix(path: Path) -> None:
    if not path.name.endswith(SUFFIX):
        raise ValueError(f"The file name must end in {SUFFIX}, got {path.name!r:.80}.")
