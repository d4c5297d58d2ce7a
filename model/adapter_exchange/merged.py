"""A model whose kernels contain an adapter, for those who know no adapters."""

from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from model.gemma.keras_lora import merged_kernel
from model.lora_adapter import LoraAdapter
from model.weight_names import block_weight_name

NamedArray = tuple[str, NDArray[np.float32]]


def merged_arrays(arrays: Iterable[NamedArray], adapter: LoraAdapter) -> Iterator[NamedArray]:
    """Name and array of every weight, in the order in which they come, with what is added."""
    pairs = {block_weight_name(*place): (place[1], pair) for place, pair in adapter.pairs.items()}
    scale = np.float32(adapter.form.alpha / adapter.form.rank)
    for name, kernel in arrays:
        if name not in pairs:
            yield name, kernel
            continue
        target, (a, b) = pairs.pop(name)
        if adapter.form.layout == "keras":
            merged = merged_kernel(target, jnp.asarray(kernel), jnp.asarray(a), jnp.asarray(b))
            yield name, np.asarray(merged)
        else:
            yield name, kernel + scale * (b @ a)
    assert not pairs, f"{len(pairs)} pairs for weights that there are not"
