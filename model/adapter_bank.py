"""The adapter bank: the low-rank pairs of several adapters, in slots, beside the weights.

Slot s of an engine is entry s − 1 of every array; slot 0 is the base, which adds nothing and has no
entry. Ranks are padded to the bank's with zeros that are never read. An array has the same shape
whatever is in its slots, so an adapter comes and goes without a compilation: one program,
``adapt``, writes the pairs of one layer into one slot, in place.

An adapter's pairs are kept per head, with its scale in B (`model.adapter_shapes`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from numpy.typing import NDArray

from model.adapter_shapes import pair_shapes
from model.config import GemmaConfig
from model.errors import AdapterUnfit
from model.gemma.low_rank import AdapterSlots, BankPair, BankTerm
from model.programs import ProgramSpec

# As the device wants it, so that what lies in memory already need not be copied.
_ALIGNMENT = 64

Place = tuple[int, str]
HostPair = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter as a bank takes it.

    Attributes:
        rank: Of every pair.
        pairs: (layer, target) -> A [heads, rank, in] and B [heads, rank, out per head]; heads may
            be 1 where all heads have the same one.
    """

    rank: int
    pairs: Mapping[Place, HostPair]

    @property
    def targets(self) -> tuple[str, ...]:
        """Fields of `model.gemma.weights.BlockWeights` that it adds to."""
        return tuple(sorted({target for _, target in self.pairs}))


def of_keras(rank: int, arrays: Mapping[Place, HostPair]) -> Adapter:
    """From Keras' layout (`model.gemma.keras_lora`): alpha is the rank, so the scale is 1."""
    return Adapter(
        rank, {place: _of_keras(place[1], rank, *pair) for place, pair in arrays.items()}
    )


def _of_keras(target: str, rank: int, a: NDArray[np.float32], b: NDArray[np.float32]) -> HostPair:
    if target in ("query", "key", "value"):  # A [heads, D, R]
        return a.transpose(0, 2, 1), b[None]
    # A [..., in, R]; the output's input is (heads, H).
    return a.reshape(-1, rank).T[None], b[None]


def of_peft(
    config: GemmaConfig, rank: int, scale: float, arrays: Mapping[Place, HostPair]
) -> Adapter:
    """From PEFT's layout: A [R, in] and B [out, R] of each projection, ``scale`` = alpha / rank."""
    shapes = pair_shapes(config)
    pairs: dict[Place, HostPair] = {}
    for place, (a, b) in arrays.items():
        heads = shapes[place[1]].heads
        of_heads = (b * np.float32(scale)).reshape(heads, -1, rank)
        pairs[place] = a[None], of_heads.transpose(0, 2, 1)
    return Adapter(rank, pairs)


def random_adapter(config: GemmaConfig, rank: int, seed: int) -> Adapter:
    """One that adds a little to every projection."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return draw.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)

    return Adapter(
        rank,
        {
            (layer, target): (normal(heads, rank, in_width), normal(heads, rank, out_per_head))
            for layer in range(config.num_layers)
            for target, (heads, in_width, out_per_head) in pair_shapes(config).items()
        },
    )


class BankArrays(NamedTuple):
    """A bank as an argument of programs.

    Attributes:
        layers: Target -> pairs of all slots, for each layer.
        ranks: Target -> rank of each slot's adapter, 0 where it has no such pair.
    """

    layers: list[dict[str, BankPair]]
    ranks: dict[str, Int[Array, " slots"]]


def bank_terms(
    layer: Mapping[str, BankPair] | None,
    ranks: Mapping[str, Int[Array, " slots"]] | None,
    used: AdapterSlots,
) -> dict[str, BankTerm]:
    """What the projections of one layer gain; nothing without a bank."""
    if layer is None or ranks is None:
        return {}
    return {target: BankTerm(pair, ranks[target], used) for target, pair in layer.items()}


class AdapterBank:
    """The bank of one engine.

    Args:
        config: Of the model.
        num_slots: For adapters, beside the base; none: there is no bank.
        max_rank: That an adapter may have.
        programs: Of the engine, filled by it.
    """

    def __init__(
        self,
        config: GemmaConfig,
        *,
        num_slots: int,
        max_rank: int,
        programs: dict[str, Callable[..., Any]],
    ) -> None:
        self.num_slots = num_slots
        self.max_rank = max_rank
        self._config = config
        self._programs = programs
        self._shapes = pair_shapes(config)
        self._ranks = {target: np.zeros(num_slots, np.int32) for target in self._shapes}
        self.arrays: BankArrays | None = None
        if num_slots:
            layers = [self._empty_layer() for _ in range(config.num_layers)]
            self.arrays = BankArrays(layers, jax.device_put(self._ranks))

    def layer(self, layer: int) -> dict[str, BankPair] | None:
        """Pairs of one layer."""
        return None if self.arrays is None else self.arrays.layers[layer]

    @property
    def ranks(self) -> dict[str, Int[Array, " slots"]] | None:
        return None if self.arrays is None else self.arrays.ranks

    def program_specs(self) -> list[ProgramSpec]:
        """What is to be compiled."""
        if self.arrays is None:
            return []
        slot = jax.ShapeDtypeStruct((), jnp.int32)
        return [
            ProgramSpec(
                "adapt", write_pairs, (self.arrays.layers[0], slot, self._nothing()), donated=(0,)
            )
        ]

    def check(self, adapter: Adapter) -> None:
        """Whether it has a place here.

        Raises:
            AdapterUnfit: It has not; the message says why.
        """
        if self.arrays is None:
            raise AdapterUnfit("There is no room for adapters; raise --adapter-slots.")
        if adapter.rank > self.max_rank:
            raise AdapterUnfit(
                f"An adapter of rank {adapter.rank} needs --adapter-max-rank {adapter.rank}; it is "
                f"{self.max_rank}."
            )
        for (layer, target), (a, b) in adapter.pairs.items():
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise AdapterUnfit(f"Block {layer}, {target}: a weight is not a finite number.")

    def put(self, slot: int, adapter: Adapter) -> None:
        """Writes an adapter, which fits, into slot 1 or a later one; whatever was there is gone."""
        assert self.arrays is not None, "no bank"
        assert 1 <= slot <= self.num_slots, f"slot {slot} of {self.num_slots}"
        layers = self.arrays.layers
        place = np.array(slot - 1, np.int32)
        for layer in range(len(layers)):
            pairs = self._nothing()
            for target, (a, b) in pairs.items():
                if found := adapter.pairs.get((layer, target)):
                    # One for all heads is repeated.
                    a[:, : adapter.rank], b[:, : adapter.rank] = found
            layers[layer] = self._programs["adapt"](layers[layer], place, pairs)
        for target, ranks in self._ranks.items():
            has_target = any(each == target for _, each in adapter.pairs)
            ranks[slot - 1] = adapter.rank if has_target else 0
        # Copies: the device may read the array itself.
        copies = {target: ranks.copy() for target, ranks in self._ranks.items()}
        self.arrays = BankArrays(layers, jax.device_put(copies))

    def _empty_layer(self) -> dict[str, BankPair]:
        return {
            target: BankPair(
                _reserved((self.num_slots, heads, self.max_rank, in_width)),
                _reserved((self.num_slots, heads, self.max_rank, out_per_head)),
            )
            for target, (heads, in_width, out_per_head) in self._shapes.items()
        }

    def _nothing(self) -> dict[str, HostPair]:
        """An adapter that adds nothing, in one layer."""
        return {
            target: (
                np.zeros((heads, self.max_rank, in_width), np.float32),
                np.zeros((heads, self.max_rank, out), np.float32),
            )
            for target, (heads, in_width, out) in self._shapes.items()
        }


def write_pairs(
    layer: dict[str, BankPair], slot: Int[Array, ""], pairs: dict[str, tuple[Array, Array]]
) -> dict[str, BankPair]:
    """A layer of a bank with the pairs of one adapter in one slot."""
    return {
        target: BankPair(
            *(
                jax.lax.dynamic_update_index_in_dim(bank, own, slot, axis=0)
                for bank, own in zip(layer[target], pairs[target], strict=True)
            )
        )
        for target in layer
    }


def _reserved(shape: Sequence[int]) -> jax.Array:
    """Zeros that take no memory before they are written, on a device that shares ours."""
    num_bytes = int(np.prod(shape)) * 4
    raw = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    zeros = raw[begin : begin + num_bytes].view(np.float32).reshape(shape)
    on_device: jax.Array = jax.device_put(zeros)
    return on_device
