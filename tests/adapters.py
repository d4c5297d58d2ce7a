"""Adapters of random numbers, and what they change."""

import numpy as np

from model.adapter_bank import Adapter
from model.adapter_file import form_shapes
from model.adapter_shapes import pair_shapes
from model.lora_adapter import LoraAdapter


def drawn_adapter(config, form, seed=0, scale=1.0):
    """An adapter in which no number is zero."""
    draw = np.random.default_rng(seed)
    pairs = {}
    for place, (shape_a, shape_b) in form_shapes(config, form).items():
        a, b = (scale * draw.normal(size=shape) for shape in (shape_a, shape_b))
        pairs[place] = a.astype(np.float32), b.astype(np.float32)
    return LoraAdapter(form, pairs)


def change_of(config, adapter, place):
    """What a bank adds to one kernel [out, in], in float64."""
    in_bank: Adapter = adapter.for_bank(config)
    a, b = (array.astype(np.float64) for array in in_bank.pairs[place])
    heads = pair_shapes(config)[place[1]].heads
    a, b = (np.broadcast_to(array, (heads, *array.shape[1:])) for array in (a, b))
    return np.einsum("hri,hro->hoi", a, b).reshape(-1, a.shape[-1])
