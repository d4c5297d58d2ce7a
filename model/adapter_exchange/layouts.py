"""An adapter in the other layout: the same change of every kernel, at a larger rank.

Keras' LoRA has one B for all heads of a query, key or value, PEFT's one A. What one of them shares
the other repeats, in blocks: with two heads and rank R, Keras' A₁, A₂ and B become::

            A = | A₁ᵀ |  R rows         B = | Bᵀ  0  |  rows of head 1
                | A₂ᵀ |  R rows             | 0   Bᵀ |  rows of head 2

and PEFT's A and B₁, B₂ become the mirror image, A₁ = [Aᵀ 0], A₂ = [0 Aᵀ] over B = [B₁ B₂]ᵀ. Zeros
add nothing and no number is rounded, except that Keras' layout has no alpha: B is multiplied by
alpha / rank, which is what a bank does with it, too. Projections without heads keep their pair,
filled up with zeros, as all pairs of a file have one rank.
"""

import numpy as np
from numpy.typing import NDArray

from model.adapter_shapes import MAX_RANK, pair_shapes
from model.config import GemmaConfig
from model.errors import AdapterUnfit
from model.lora_adapter import Layout, LoraAdapter, LoraForm, Pair

_WITH_HEADS = ("query", "key", "value")


def in_layout(adapter: LoraAdapter, layout: Layout, config: GemmaConfig) -> LoraAdapter:
    """The adapter in a layout; itself if that is its own.

    Raises:
        AdapterUnfit: Its rank would be larger than that of any file; the message has both numbers.
    """
    form = adapter.form
    if form.layout == layout:
        return adapter
    heads = {
        target: pair_shapes(config)[target].heads if target in _WITH_HEADS else 1
        for target in form.targets
    }
    rank = form.rank * max(heads.values())
    if rank > MAX_RANK:
        raise AdapterUnfit(
            f"In the layout of {layout} this adapter of rank {form.rank} has rank {rank}; a file "
            f"has at most {MAX_RANK}."
        )
    new_form = LoraForm(layout, rank, float(rank), form.targets)
    if layout == "peft":
        pairs = {
            place: _filled(_peft_pair(place[1], heads[place[1]], *pair), rank)
            for place, pair in adapter.pairs.items()
        }
        return LoraAdapter(new_form, pairs)
    scale = np.float32(form.alpha / form.rank)
    return LoraAdapter(
        new_form,
        {
            (layer, target): _keras_pair(config, target, heads[target], rank, a, b * scale)
            for (layer, target), (a, b) in adapter.pairs.items()
        },
    )


def _peft_pair(target: str, heads: int, a: NDArray[np.float32], b: NDArray[np.float32]) -> Pair:
    """A [heads · R, in] and B [out, heads · R] of Keras' pair."""
    rank, width = b.shape
    if target not in _WITH_HEADS:
        return a.reshape(-1, rank).T, b.T  # [R, in], [out, R]
    blocks = np.zeros((heads, width, heads, rank), np.float32)
    for head in range(heads):
        blocks[head, :, head] = b.T
    return a.transpose(0, 2, 1).reshape(heads * rank, -1), blocks.reshape(heads * width, -1)


def _filled(pair: Pair, rank: int) -> Pair:
    a, b = pair
    missing = rank - a.shape[0]
    return np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))


def _keras_pair(
    config: GemmaConfig,
    target: str,
    heads: int,
    new_rank: int,
    a: NDArray[np.float32],
    b: NDArray[np.float32],
) -> Pair:
    """Keras' pair of PEFT's A [R, in] and scaled B [out, R]."""
    rank, in_width = a.shape
    if target not in _WITH_HEADS:
        wide_a = np.pad(a.T, ((0, 0), (0, new_rank - rank)))  # [in, R]
        if target == "attention_output":
            wide_a = wide_a.reshape(config.num_query_heads, -1, new_rank)
        return wide_a, np.pad(b.T, ((0, new_rank - rank), (0, 0)))
    width = b.shape[0] // heads
    blocks = np.zeros((heads, in_width, new_rank), np.float32)
    wide_b = np.zeros((new_rank, width), np.float32)
    for head in range(heads):
        own = slice(head * rank, (head + 1) * rank)
        blocks[head, :, own] = a.T
        wide_b[own] = b[head * width : (head + 1) * width].T
    return blocks, wide_b
