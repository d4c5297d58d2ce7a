"""The closed set of an engine's programs, by name:

* ``decode[rows]``: steps of 2, 4 or 8 rows; with native kernels of 1 to 32;
* ``embed[tokens]`` and ``block[tokens, positions]``: one chunk of prompts, block by block, one
  program for all layers whose cache has the same number of positions;
* ``begin``: the tokens of a prompt into a slot;
* ``copy``: blocks of one slot into another slot, all layers;
* ``take`` and ``put``: one block of a slot, all layers, out of the caches and back.

Those of searches are in `model.searches`, that of scores in `model.scores`, that of adapters in
`model.adapter_bank`, and that of interventions in chunks in `model.chunk_stream`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from model.adapter_bank import AdapterBank
from model.config import GemmaConfig
from model.decode import RuleRows, SlotStates, decode_steps
from model.gemma.block import LayerTraits
from model.gemma.weights import GemmaWeights
from model.interventions import DrawingInterventions
from model.prefill import CHUNK_BUCKETS, ChunkRows, embed_chunk, num_packed, prefill_block
from model.programs import ProgramSpec
from model.slot_blocks import put_block, take_block
from model.slot_copy import copy_slot

_ROW_BUCKETS = (2, 4, 8)
_NATIVE_ROW_BUCKETS = (1, 2, 4, 8, 16, 32)


def row_buckets(num_slots: int, *, is_native: bool) -> tuple[int, ...]:
    """Row counts of the decode programs for ``num_slots`` slots.

    With XLA's products a lone row runs as two, so that it meets the same ones as in company; more
    than eight rows run as several dispatches, which is faster than one of twelve or sixteen.
    """
    buckets = _NATIVE_ROW_BUCKETS if is_native else _ROW_BUCKETS
    needed = next((rows for rows in buckets if rows >= num_slots), buckets[-1])
    return tuple(rows for rows in buckets if rows <= needed)


def write_tokens(
    tokens: Int[Array, "slots context"], slot: Int[Array, ""], prompt: Int[Array, " context"]
) -> Int[Array, "slots context"]:
    """The tokens of all slots with those of a prompt, filled up, in one of them."""
    return jax.lax.dynamic_update_slice(tokens, prompt[None], (slot, 0))


class ProgramSet:
    """What has to be compiled for one model and number of slots.

    Args:
        config: The architecture.
        weights: On the device.
        traits: Of the layers.
        states: Of the slots.
        rules_of: `RuleRows` of fillers only, for a number of rows.
        interventions_of: `DrawingInterventions` of none, for a number of rows.
        bank: Of adapters.
        is_native: Decode steps use the native kernels.
        num_slots: In which sequences are decoded.
    """

    def __init__(
        self,
        config: GemmaConfig,
        weights: GemmaWeights,
        traits: list[LayerTraits],
        states: SlotStates,
        rules_of: Callable[[int], RuleRows],
        interventions_of: Callable[[int], DrawingInterventions],
        bank: AdapterBank,
        *,
        is_native: bool,
        num_slots: int,
    ) -> None:
        self._config = config
        self._weights = weights
        self._traits = traits
        self._states = states
        self._rules_of = rules_of
        self._interventions_of = interventions_of
        self._bank = bank
        self._is_native = is_native
        self._num_slots = num_slots

    def specs(self) -> Iterator[ProgramSpec]:
        """All programs."""
        context = self._states.tokens.shape[1]
        yield from (
            self._decode(rows) for rows in row_buckets(self._num_slots, is_native=self._is_native)
        )
        # Layers with the same number of positions share a program; any of them gives the shapes.
        caches = self._states.caches
        layer_of_size = {cache.num_positions: i for i, cache in enumerate(caches)}
        for bucket in CHUNK_BUCKETS:
            embeddings = self._weights.embeddings
            token_ids = _integers(1, bucket)
            yield ProgramSpec(f"embed[{bucket}]", embed_chunk, (embeddings, token_ids))
            yield from (self._block(bucket, layer) for layer in layer_of_size.values())
        number = _integers()
        tokens = (self._states.tokens, number, _integers(context))
        yield ProgramSpec("begin", write_tokens, tokens, donated=(0,))
        yield ProgramSpec("copy", copy_slot, (caches, *[number] * 4), donated=(0,))
        yield ProgramSpec("take", take_block, (caches, number, number))
        kept, _ = jax.eval_shape(take_block, caches, number, number)
        yield ProgramSpec("put", put_block, (caches, number, number, kept), donated=(0,))

    def _decode(self, rows: int) -> ProgramSpec:
        numbers = _integers(rows)
        model = (self._weights, self._traits, self._states)
        return ProgramSpec(
            f"decode[{rows}]",
            partial(decode_steps, self._config, is_native=self._is_native),
            (
                *(*model, numbers, numbers),
                *(self._rules_of(rows), self._interventions_of(rows), _integers()),
                *(self._bank.arrays, numbers),
            ),
            donated=(2,),
        )

    def _block(self, bucket: int, layer: int) -> ProgramSpec:
        cache = self._states.caches[layer]
        x = jax.ShapeDtypeStruct((1, bucket, self._config.hidden_dim), jnp.float32)
        each = _integers(num_packed(bucket))
        rows = ChunkRows(_integers(1, bucket), each, each, each, each, _integers(), each)
        bank = (self._bank.layer(layer), self._bank.ranks)
        return ProgramSpec(
            f"block[{bucket},{cache.num_positions}]",
            partial(prefill_block, self._config, is_native=self._is_native),
            (self._weights.blocks[layer], self._traits[layer], cache, x, rows, *bank),
            donated=(2, 3),
        )


def _integers(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
