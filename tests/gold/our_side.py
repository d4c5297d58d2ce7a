"""Our part: ``python -m tests.gold.our_side write|read keras-hub|transformers DIRECTORY``.

Runs in the project's environment, from the repository's root; see `exchange`. The second argument
tells whose files are written or read. Written are the tiny models of the goldens.
"""

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from model.adapter_exchange.files import export_directory, export_file, open_adapter
from model.adapter_exchange.merged import merged_arrays
from model.backbone_lora import load_lora, save_lora
from model.causal_lm import GemmaCausalLM
from model.config import GemmaConfig
from model.gemma.backbone import Backbone
from model.gemma.keras_lora import TARGETS
from model.lora_adapter import Layout, LoraForm
from model.presets.hf_directory import HuggingFacePreset
from model.presets.hf_writer import write_hugging_face
from model.presets.keras_directory import KerasPreset
from model.presets.keras_writer import write_keras_preset
from tests import goldens
from tests.adapters import drawn_adapter
from tests.gold import exchange

_READERS = {"keras-hub": KerasPreset, "transformers": HuggingFacePreset}
_WRITERS = {"keras-hub": write_keras_preset, "transformers": write_hugging_face}
_SHARD_BYTES = 100_000
_CONTROL_WEIGHT = "decoder_block_0/attention/query/kernel"

NamedArrays = Iterable[tuple[str, np.ndarray]]


def write(peer: str, directory: Path) -> None:
    """What our writer for this peer can make, each with our answer."""
    for name in goldens.TINY_PRESETS:
        preset = KerasPreset.open(goldens.preset_directory(name))
        proto = preset.tokenizer_proto()
        whole = backbone(preset.config, preset.arrays())
        save = partial(_save, peer, preset.config, proto)
        save(directory / f"{name}_float32", preset.arrays(), whole)
        shards = {"max_shard_bytes": _SHARD_BYTES}
        save(directory / f"{name}_shards", preset.arrays(), whole, **shards)
        save(directory / f"{exchange.CONTROL}_{name}", _changed(preset.arrays()), whole)
        for layout in ("keras", "peft"):
            _write_adapted(peer, directory / f"{name}_{layout}_layout", preset, proto, layout)
        if peer == "transformers":
            rounded = backbone(preset.config, _rounded(preset.arrays()))
            folder = directory / f"{name}_bfloat16"
            save(folder, preset.arrays(), rounded, dtype="bfloat16")
        else:
            adapted = with_lora(backbone(preset.config, preset.arrays()))
            folder = directory / f"{name}_lora_file"
            save(folder, preset.arrays(), adapted)
            save_lora(folder / "adapter.lora.h5", adapted)


def _write_adapted(
    peer: str, case: Path, preset: KerasPreset, proto: bytes, layout: Layout
) -> None:
    """An adapter of one layout in the files of a peer, and merged; both answer alike."""
    is_peft = peer == "transformers"
    targets = tuple(sorted(TARGETS)) if is_peft else ("query", "value")
    form = LoraForm(layout, 3, 3.0 if layout == "keras" else 4.5, targets)
    adapter = drawn_adapter(preset.config, form, scale=0.2)
    answering = backbone(preset.config, merged_arrays(preset.arrays(), adapter))
    _save(peer, preset.config, proto, case, preset.arrays(), answering)
    if is_peft:
        export_directory(adapter, case / "adapter", preset.config)
    else:
        export_file(adapter, case / "adapter.lora.h5", "keras", preset.config)
    merged = merged_arrays(preset.arrays(), adapter)
    folder = case.with_name(f"{case.name}_merged")
    _save(peer, preset.config, proto, folder, merged, answering)


def _save(
    peer: str,
    config: GemmaConfig,
    proto: bytes,
    case: Path,
    arrays: NamedArrays,
    answering: Backbone,
    **options: Any,
) -> None:
    _WRITERS[peer](case / "model", config, arrays, proto, **options)
    exchange.write_answer(case, logits_of(answering))


def answer(peer: str, case: Path) -> np.ndarray:
    """Our logits for what a peer wrote."""
    preset = _READERS[peer].open(case / "model")
    loaded = backbone(preset.config, preset.arrays())
    adapter = case / "adapter.lora.h5"
    if adapter.exists():
        load_lora(adapter, loaded)
    if (case / "adapter").exists():
        found = open_adapter(case / "adapter", preset.config)
        loaded = backbone(preset.config, merged_arrays(preset.arrays(), found))
    return logits_of(loaded)


def backbone(config: GemmaConfig, arrays: NamedArrays) -> Backbone:
    given = {name: jnp.asarray(array) for name, array in arrays}
    return Backbone(config, given, dtype="float32")


def logits_of(model: Backbone) -> np.ndarray:
    return np.asarray(GemmaCausalLM(model).score(**exchange.rows()))


def with_lora(model: Backbone) -> Backbone:
    """LoRA as after a training: no zeros anywhere."""
    model.enable_lora(4)
    rng = np.random.default_rng(33)
    for holder in model.lora_layers.values():
        for variable in (holder.lora_kernel_a, holder.lora_kernel_b):
            variable.assign(rng.normal(scale=0.2, size=variable.shape))
    return model


def _changed(arrays: NamedArrays) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in arrays:
        if name == _CONTROL_WEIGHT:
            array = array.copy()
            array[0, 0] += exchange.CONTROL_CHANGE
        yield name, array


def _rounded(arrays: NamedArrays) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in arrays:
        yield name, array.astype(ml_dtypes.bfloat16).astype(np.float32)


if __name__ == "__main__":
    part, peer, place = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if part == "write":
        write(peer, place)
    else:
        exchange.compare(place, lambda case: answer(peer, case))
