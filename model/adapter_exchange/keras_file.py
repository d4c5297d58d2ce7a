"""``.lora.h5``: adapters in Keras' layout, as keras-hub reads and writes them.

A place in such a file says which projection it is for (spec 7): in keras-hub's list of layers the
embedding comes first, then each block with its layers in reverse order of their creation. Gemma 3's
order was read off keras-hub 0.32 itself.
"""

import os
from pathlib import Path

from model.adapter_exchange.keras_datasets import LoraDatasets, dataset_names, write_datasets
from model.adapter_file import refuse_non_finite
from model.config import GemmaConfig
from model.errors import PresetFileInvalid
from model.gemma.keras_lora import TARGETS, lora_shapes
from model.lora_adapter import LoraAdapter, LoraForm, Pair, Place

SUFFIX = ".lora.h5"


def lora_places(config: GemmaConfig) -> dict[int, Place]:
    """Place in keras-hub's list of layers -> (block, target), for everything that can have LoRA."""
    layers = _layers_of_a_block(config)
    return {
        1 + block * len(layers) + offset: (block, name)
        for block in range(config.num_layers)
        for offset, name in enumerate(layers)
        if name in TARGETS
    }


def adapter_of(datasets: LoraDatasets, config: GemmaConfig, source: str) -> LoraAdapter:
    """The adapter in a file; ``source`` names it in errors.

    Raises:
        PresetFileInvalid: It does not fit this model.
        AdapterUnfit: A number in it is not finite.
    """
    known = lora_places(config)
    pairs: dict[Place, Pair] = {}
    for place, pair in datasets.pairs.items():
        if place not in known:
            raise PresetFileInvalid(f"{source}: layer '{place}' of this model cannot have LoRA.")
        shapes = lora_shapes(config, known[place][1], datasets.rank)
        for name, array, shape in zip(dataset_names(place), pair, shapes, strict=True):
            if array.shape != shape:
                raise PresetFileInvalid(
                    f"{source}: {name} must be float32 of shape {list(shape)} for rank "
                    f"{datasets.rank}, it has shape {list(array.shape)}."
                )
        pairs[known[place]] = pair
    targets = tuple(sorted({target for _, target in pairs}))
    if len(pairs) != config.num_layers * len(targets) or not targets:
        raise PresetFileInvalid(f"{source}: some blocks have other targets than the first one.")
    refuse_non_finite(pairs)
    return LoraAdapter(LoraForm("keras", datasets.rank, float(datasets.rank), targets), pairs)


def write_keras_file(path: Path, adapter: LoraAdapter, config: GemmaConfig) -> None:
    """Writes an adapter in Keras' layout, complete or not at all; replaces what is there.

    Raises:
        OSError: It cannot be written.
    """
    assert adapter.form.layout == "keras", "in another layout"
    pairs = {
        place: adapter.pairs[each]
        for place, each in lora_places(config).items()
        if each in adapter.pairs
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_datasets(temporary, LoraDatasets(adapter.form.rank, pairs))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _layers_of_a_block(config: GemmaConfig) -> list[str]:
    return [
        "block",
        "ffw_linear",
        "ffw_gating_2",
        "ffw_gating",
        *(["post_ffw_norm"] if config.use_post_ffw_norm else []),
        "pre_ffw_norm",
        "attention",
        "attention_output",
        *(["key_norm", "query_norm"] if config.use_query_key_norm else []),
        "value",
        "key",
        "query",
        *(["post_attention_norm"] if config.use_post_attention_norm else []),
        "pre_attention_norm",
    ]
