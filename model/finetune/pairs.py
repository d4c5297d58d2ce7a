"""Pairs of an adapter in training: how they begin, how programs want them, how gradients return.

Programs have an A and a B for each head (`model.adapter_shapes`). A layout in which heads share one
of them gets the sum of its heads' derivatives.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from model.adapter_file import form_shapes
from model.config import GemmaConfig
from model.lora_adapter import LoraAdapter, LoraForm, Pair, Place

Floats = NDArray[np.float32]


def first_adapter(config: GemmaConfig, form: LoraForm, seed: int) -> LoraAdapter:
    """A uniform as Keras (He) or PEFT draws it, B zero, so that nothing is added yet."""
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0])))
    pairs: dict[Place, Pair] = {}
    for place, (a, b) in form_shapes(config, form).items():
        if form.layout == "keras":
            bound = math.sqrt(6.0 / math.prod(a[:-1]))
        else:
            bound = 1.0 / math.sqrt(a[-1])
        uniform = draw.random(a, np.float32)
        drawn = (uniform * np.float32(2.0) - np.float32(1.0)) * np.float32(bound)
        pairs[place] = drawn, np.zeros(b, np.float32)
    return LoraAdapter(form, pairs)


def own_gradient(form: LoraForm, own: Pair, place: Place, by_head: tuple[Floats, Floats]) -> Pair:
    """The derivative by a pair in its own layout.

    Args:
        form: Of the adapter.
        own: The pair, for its shapes.
        place: Layer and target.
        by_head: Derivative by A [heads, rank, in] and B [heads, rank, out per head].
    """
    by_a, by_b = by_head
    a, b = own
    if form.layout == "peft":
        scale = np.float32(form.alpha / form.rank)
        turned = by_b.transpose(0, 2, 1).reshape(b.shape)
        return by_a.sum(axis=0), turned * scale
    if place[1] in ("query", "key", "value"):
        return np.ascontiguousarray(by_a.transpose(0, 2, 1)), by_b.sum(axis=0)
    return np.ascontiguousarray(by_a[0].T).reshape(a.shape), by_b[0].copy()


def named(pairs: Mapping[Place, Pair]) -> dict[str, Floats]:
    """Arrays by the names that they have in files."""
    return {
        f"{layer}.{target}.{name}": array
        for (layer, target), pair in pairs.items()
        for name, array in zip("ab", pair, strict=True)
    }


def paired(arrays: Mapping[str, Floats], places: Mapping[Place, Pair]) -> dict[Place, Pair]:
    """The other way round."""
    return {
        (layer, target): (arrays[f"{layer}.{target}.a"], arrays[f"{layer}.{target}.b"])
        for layer, target in places
    }
