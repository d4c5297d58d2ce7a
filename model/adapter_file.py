"""An adapter as the bytes of one file: what is stored, what a digest names, what processes send.

It is safetensors with float32 tensors ``<layer>.<target>.a`` and ``.b``, in order of layers, then
of targets by name, each in the adapter's own layout (`model.lora_adapter`). One text beside them,
``gemma_adapter``, is its form as JSON::

    {"version": 1, "layout": "keras", "rank": 8, "alpha": 8.0, "targets": ["query", "value"]}

Equal adapters are equal bytes, and only bytes that would be written are read; so a digest of the
bytes names the adapter.
"""

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from model.adapter_shapes import MAX_RANK, pair_shapes
from model.config import GemmaConfig
from model.errors import AdapterUnfit, PresetFileInvalid
from model.gemma.keras_lora import TARGETS, lora_shapes
from model.lora_adapter import Layout, LoraAdapter, LoraForm, Pair, Place
from model.presets.safetensors_content import read_tensors
from model.presets.safetensors_header import SafetensorsHeader, header_of
from model.presets.safetensors_stream import TensorPlan, tensor_bytes, tensors_head
from model.presets.strict_json import parse_object

FORMAT_VERSION = 1
MAX_ALPHA = 65_536.0

_FORM = "gemma_adapter"
_LAYOUTS: dict[str, Layout] = {"keras": "keras", "peft": "peft"}
_SOURCE = "The adapter file"


def write_adapter(adapter: LoraAdapter) -> bytes:
    """An adapter as its one file."""
    form = _ordered(adapter.form)
    num_layers = 1 + max(layer for layer, _ in adapter.pairs)
    places = [(layer, target) for layer in range(num_layers) for target in form.targets]
    assert adapter.pairs.keys() == set(places), "the same targets in every block"
    shapes = {
        place: (adapter.pairs[place][0].shape, adapter.pairs[place][1].shape) for place in places
    }
    arrays = (array for place in places for array in adapter.pairs[place])
    return tensor_bytes(_plans(shapes), arrays, _metadata(form))


def read_adapter(content: bytes, config: GemmaConfig) -> LoraAdapter:
    """What `write_adapter` made ``content`` of; its arrays are views that nobody can write.

    Raises:
        PresetFileInvalid: It is no such file, or its tensors are not those of this model.
        AdapterUnfit: It is of another version of the format, or a number in it is not finite.
    """
    header = header_of(content, _SOURCE)
    form = _read_form(header)
    shapes = form_shapes(config, form)
    plans = _plans(shapes)
    arrays = read_tensors(content, header, {plan.name: plan.shape for plan in plans})
    if content[: header.data_start] != tensors_head(plans, _metadata(form)):
        raise PresetFileInvalid(f"{_SOURCE} is not written as this service writes one.")
    pairs = {
        (layer, target): (arrays[f"{layer}.{target}.a"], arrays[f"{layer}.{target}.b"])
        for layer, target in shapes
    }
    refuse_non_finite(pairs)
    return LoraAdapter(form, pairs)


def is_adapter_file(content: bytes) -> bool:
    """Whether it says that `write_adapter` made it.

    Raises:
        PresetFileInvalid: It is not even safetensors.
    """
    return _FORM in header_of(content, _SOURCE).metadata


def form_shapes(
    config: GemmaConfig, form: LoraForm
) -> dict[Place, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of A and B of every pair that an adapter of this form has, in the order of a file."""
    return {
        (layer, target): _pair_shapes(config, form, target)
        for layer in range(config.num_layers)
        for target in sorted(form.targets)
    }


def refuse_non_finite(pairs: Mapping[Place, Pair]) -> None:
    """Every number must be one.

    Raises:
        AdapterUnfit: The message names the block and the projection.
    """
    for (layer, target), pair in pairs.items():
        if not all(np.isfinite(array).all() for array in pair):
            raise AdapterUnfit(f"Block {layer}, {target}: a weight is not a finite number.")


def _pair_shapes(
    config: GemmaConfig, form: LoraForm, target: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if form.layout == "keras":
        a, b = lora_shapes(config, target, form.rank)
        return a, b
    heads, in_width, out_per_head = pair_shapes(config)[target]
    return (form.rank, in_width), (heads * out_per_head, form.rank)


def _plans(shapes: Mapping[Place, tuple[tuple[int, ...], tuple[int, ...]]]) -> list[TensorPlan]:
    float32 = np.dtype(np.float32)
    return [
        TensorPlan(f"{layer}.{target}.{name}", shape, float32)
        for (layer, target), pair in shapes.items()
        for name, shape in zip("ab", pair, strict=True)
    ]


def _ordered(form: LoraForm) -> LoraForm:
    return replace(form, alpha=float(form.alpha), targets=tuple(sorted(form.targets)))


def _metadata(form: LoraForm) -> dict[str, str]:
    fields = {
        "version": FORMAT_VERSION,
        "layout": form.layout,
        "rank": form.rank,
        "alpha": form.alpha,
        "targets": form.targets,
    }
    return {_FORM: json.dumps(fields)}


def _read_form(header: SafetensorsHeader) -> LoraForm:
    text = header.metadata.get(_FORM)
    if text is None:
        raise PresetFileInvalid(f"{_SOURCE} does not say what it is made of.")
    fields = parse_object(text.encode("utf-8", "surrogatepass"), f"{_SOURCE}: {_FORM}")
    if fields.get("version") != FORMAT_VERSION:
        raise AdapterUnfit(
            f"{_SOURCE} has version {fields.get('version')!r:.40} of its format; this service "
            f"reads {FORMAT_VERSION}."
        )
    match fields:
        case {
            "layout": str(layout),
            "rank": int(rank),
            "alpha": float(alpha),
            "targets": [*targets],
        }:
            form = _checked_form(layout, rank, alpha, targets)
        case _:
            form = None
    if form is None:
        raise PresetFileInvalid(f"{_SOURCE}: its form {text!r:.160} is none that an adapter has.")
    return form


def _checked_form(layout: str, rank: int, alpha: float, targets: list[object]) -> LoraForm | None:
    names = tuple(target for target in TARGETS if target in targets)
    is_right = (
        layout in _LAYOUTS
        and 1 <= rank <= MAX_RANK
        and 0 < alpha <= MAX_ALPHA
        and (layout == "peft" or alpha == rank)
        and names
        and targets == sorted(names)
    )
    return LoraForm(_LAYOUTS[layout], rank, alpha, tuple(sorted(names))) if is_right else None
