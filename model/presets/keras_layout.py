"""How keras-hub names and shapes the arrays of `model.weight_names` in a weights file.

The file's names come from attribute and class names, not from layer names, and the first block
has no number: ``layers/gemma_decoder_block/...``, ``layers/gemma_decoder_block_1/...``.

A kernel that was quantised is an array of integers with a second dataset beside it, ``vars/1``: one
scale for each row or column that one output needs, by which the integers are *divided*.
"""

from collections.abc import Iterator, Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.config import Family, GemmaConfig
from model.weight_names import EMBEDDINGS, FINAL_NORM, block_weight_name, block_weight_shapes

# Field of BlockWeights -> its path in a file, below the block's group.
_BLOCK_DATASETS = {
    "pre_attention_norm": "pre_attention_norm/vars/0",
    "query": "attention/query_dense/vars/0",
    "key": "attention/key_dense/vars/0",
    "value": "attention/value_dense/vars/0",
    "query_norm": "attention/query_norm/vars/0",
    "key_norm": "attention/key_norm/vars/0",
    "attention_output": "attention/output_dense/vars/0",
    "post_attention_norm": "post_attention_norm/vars/0",
    "pre_ffw_norm": "pre_ffw_norm/vars/0",
    "ffw_gating": "gating_ffw/vars/0",
    "ffw_gating_2": "gating_ffw_2/vars/0",
    "ffw_linear": "ffw_linear/vars/0",
    "post_ffw_norm": "post_ffw_norm/vars/0",
}


@dataclass(frozen=True, slots=True)
class KerasDataset:
    """One array in a file of keras-hub, with its scales if it has integers.

    Attributes:
        name: What `weight_specs` calls it.
        path: What the file calls it.
        shape: In the file.
        run_time_shape: In this program.
        is_int8: Whether the file has integers and scales, not floats.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    run_time_shape: tuple[int, ...]
    is_int8: bool = False

    @property
    def scale_path(self) -> str:
        """What the file calls the scales."""
        return f"{self.path.removesuffix('0')}1"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the scales, in the file."""
        if self.name == EMBEDDINGS:
            return self.shape[:1]
        kept = (
            size for size, is_kept in zip(self.shape, self._has_own_scales, strict=True) if is_kept
        )
        return (1, 1, *kept)

    @property
    def divisor_shape(self) -> tuple[int, ...]:
        """Of the scales, so that they broadcast against the integers."""
        return tuple(
            size if is_kept else 1
            for size, is_kept in zip(self.shape, self._has_own_scales, strict=True)
        )

    @property
    def _has_own_scales(self) -> tuple[bool, ...]:
        """For each axis, whether its entries have scales of their own: not if it is summed over."""
        if self.name == EMBEDDINGS:
            return (True, False)
        if len(self.shape) == 2:
            return (False, True)  # [in, out]
        if _is_attention_output(self.name):
            return (False, False, True)  # [N, H, D]
        return (True, False, True)  # [N, D, H]


def keras_datasets(
    config: GemmaConfig, int8_weights: AbstractSet[str] = frozenset()
) -> Iterator[KerasDataset]:
    """Every array that a file with this config must have, in the order of `weight_specs`.

    Args:
        config: The architecture.
        int8_weights: Names of the arrays that are stored as integers with scales.
    """
    width = (config.hidden_dim,)
    table = (config.vocabulary_size, config.hidden_dim)
    is_int8 = EMBEDDINGS in int8_weights
    yield KerasDataset(EMBEDDINGS, "layers/reversible_embedding/vars/0", table, table, is_int8)
    prefix = "gemma3_decoder_block" if config.family is Family.GEMMA3 else "gemma_decoder_block"
    for layer in range(config.num_layers):
        block = f"layers/{prefix}_{layer}" if layer else f"layers/{prefix}"
        for field, shape in block_weight_shapes(config).items():
            name = block_weight_name(layer, field)
            yield KerasDataset(
                name=name,
                path=f"{block}/{_BLOCK_DATASETS[field]}",
                shape=_shape_in_file(config, field, shape),
                run_time_shape=shape,
                is_int8=name in int8_weights,
            )
    yield KerasDataset(FINAL_NORM, "layers/rms_normalization/vars/0", width, width)


def _shape_in_file(
    config: GemmaConfig, field: str, run_time_shape: tuple[int, ...]
) -> tuple[int, ...]:
    width, head_dim = config.hidden_dim, config.head_dim
    match field:
        case "query":
            return (config.num_query_heads, width, head_dim)
        case "key" | "value":
            return (config.num_key_value_heads, width, head_dim)
        case "attention_output":
            return (config.num_query_heads, head_dim, width)
        case _:
            # Norms are vectors; the feed-forward kernels are [in, out] in the file.
            return run_time_shape[::-1]


def to_run_time(dataset: KerasDataset, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """``array`` as read from the file, with kernels turned to [out, in] and heads folded."""
    if dataset.name == EMBEDDINGS or array.ndim == 1:
        return array
    if _is_attention_output(dataset.name):
        array = array.reshape(-1, array.shape[-1])  # [N·H, D]
    # Queries, keys and values [N, D, H] -> [N, H, D], the rest [in, out] -> [out, in].
    turned = array.swapaxes(-1, -2)
    return np.ascontiguousarray(turned).reshape(dataset.run_time_shape)


def _is_attention_output(name: str) -> bool:
    return name.endswith("/attention_output/kernel")
