"""model.slot_memory plans without JAX what model.gemma.kv_cache allocates."""

import jax.numpy as jnp
import pytest

from model.gemma import kv_cache
from model.presets.resolve import TINY, open_reader
from model.presets.table import BUILTIN_PRESETS
from model.slot_memory import kv_cache_bytes


def test_a_slot_has_the_bytes_that_are_written_down_here():
    gemma, gemma3 = (BUILTIN_PRESETS[name].config for name in ("gemma_2b_en", "gemma3_270m"))
    # Keys and values, 18 global layers, one head of 256, in float32.
    assert kv_cache_bytes(gemma, 4096) == 2 * 18 * 4096 * 256 * 4 == 150_994_944
    # In blocks of 256: 300 tokens are two of them.
    assert kv_cache_bytes(gemma, 300, item_bytes=2) == 2 * 18 * 512 * 256 * 2
    # Layers 5, 11 and 17 are global; 15 keep a window of 512 and a chunk.
    assert kv_cache_bytes(gemma3, 4096) == 2 * (3 * 4096 + 15 * 768) * 256 * 4 == 48_758_784


@pytest.mark.parametrize("context_tokens", [16, 257, 4096])
def test_a_slot_is_planned_as_large_as_it_is_allocated(context_tokens, tmp_path):
    for config in [open_reader(TINY, tmp_path).config, BUILTIN_PRESETS["gemma3_270m"].config]:
        caches = kv_cache.allocate(config, 1, context_tokens, jnp.dtype("float32"))
        allocated = sum(array.nbytes for cache in caches for array in cache)
        assert kv_cache_bytes(config, context_tokens) == allocated
