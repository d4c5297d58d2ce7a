"""One micro-batch through the model and back, in pieces that a caller can pause between.

Programs, made and tried with those of the engine: ``train_forward[tokens]`` and
``train_backward[tokens]`` are a block, ``train_head`` a part of the vocabulary for some places, and
``train_loss`` what follows from all parts. Derivatives of each row's pairs are handed out layer by
layer, from the last to the first, as soon as they are there.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from model.adapter_bank import Adapter
from model.adapter_shapes import pair_shapes
from model.block_gradient import SequenceRows
from model.config import GemmaConfig
from model.finetune.kept_products import (
    TILE_TOKENS,
    RowPairs,
    TileRows,
    backward_from_kept,
    forward_keeping,
)
from model.finetune.loss_head import add_part, loss_and_derivative, no_sums
from model.finetune.row_order import (
    MAX_ADAPTERS,
    MICRO_BATCH_TOKENS,
    max_rows,
    placed,
    room_of,
    size_of,
)
from model.gemma.block import LayerTraits
from model.gemma.weights import GemmaWeights
from model.programs import ProgramSpec
from model.training import TrainingRow

HEAD_PLACES = 32
# Rows of the table that go through the head at once, on a CPU.
_PART_ROWS = 32_768

Floats = NDArray[np.float32]
# Of each row: losses of its trained tokens, in order.
Losses = list[list[float]]
ByHead = tuple[Floats, Floats]
# Layer, row, target, derivative by A and B of each head.
TakeGradient = Callable[[int, int, str, ByHead], None]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows, the longest rooms first, and the adapter of each.

    Attributes:
        rows: Of one `size_of`, which has room for all.
        adapters: As a bank takes them, at most `MAX_ADAPTERS`.
        adapter_of: Index of each row's adapter.
        wants_gradient: Whether it goes back, too.
    """

    rows: Sequence[TrainingRow]
    adapters: Sequence[Adapter]
    adapter_of: Sequence[int]
    wants_gradient: bool

    @property
    def num_tokens(self) -> int:
        """Of the program."""
        [size] = set(map(size_of, self.rows))
        return size


class RunSeconds(NamedTuple):
    """How long the programs of one size take: all blocks one way each, and a group of places."""

    forward: float
    backward: float
    head: float


class MicroBatches:
    """Runs micro-batches on one engine.

    Args:
        config: Of the model.
        weights: Of the model.
        traits: Of the layers.
        programs: Of the engine, filled by it.
        max_rank: To which pairs are filled up.
        is_native: Products of the way forward are the native kernel's.
    """

    def __init__(
        self,
        config: GemmaConfig,
        weights: GemmaWeights,
        traits: Sequence[LayerTraits],
        programs: dict[str, Callable[..., Any]],
        *,
        max_rank: int,
        is_native: bool,
    ) -> None:
        self._config = config
        self._weights = weights
        self._traits = traits
        self._programs = programs
        self._max_rank = max_rank
        self._is_native = is_native
        self._shapes = pair_shapes(config)
        self._parts = _table_parts(weights.embeddings)
        self._nothing = {count: self._no_pairs(count) for count in set(map(_num_adapters, _SIZES))}

    def program_specs(self) -> Iterator[ProgramSpec]:
        """What is to be compiled."""
        width = self._config.hidden_dim
        for size in MICRO_BATCH_TOKENS:
            x = _floats(1, size, width)
            ids: Any = jax.ShapeDtypeStruct((1, size), jnp.int32)
            tile: Any = jax.ShapeDtypeStruct((size // TILE_TOKENS,), jnp.int32)
            number: Any = jax.ShapeDtypeStruct((), jnp.int32)
            tiles = TileRows(tile, tile, number)
            pairs = self._nothing[_num_adapters(size)]
            model = (self._weights.blocks[0], self._traits[0], x, SequenceRows(ids, ids))
            forward = partial(forward_keeping, self._config, is_native=self._is_native)
            backward = partial(
                backward_from_kept,
                self._config,
                num_rows=max_rows(size),
                is_native=self._is_native,
            )
            given = (*model, tiles, pairs)
            yield ProgramSpec(f"train_forward[{size}]", forward, given)
            _, kept = jax.eval_shape(forward, *given)
            yield ProgramSpec(f"train_backward[{size}]", backward, (*given, kept, x))
        ids = jax.ShapeDtypeStruct((HEAD_PLACES,), jnp.int32)
        x, sums = _floats(HEAD_PLACES, width), no_sums(HEAD_PLACES, width)
        norm = self._weights.final_norm
        head = partial(add_part, self._config, is_native=self._is_native)
        part = (self._parts[0][1], number, number)
        yield ProgramSpec("train_head", head, (*part, norm, x, ids, number, sums))
        loss = partial(loss_and_derivative, self._config)
        given_loss = (self._weights.embeddings, norm, x, ids, sums)
        yield ProgramSpec("train_loss", loss, given_loss)

    def of_one_block(self) -> "MicroBatches":
        """The same programs on the first block alone, for the self-test."""
        return MicroBatches(
            self._config,
            self._weights._replace(blocks=self._weights.blocks[:1]),
            self._traits[:1],
            self._programs,
            max_rank=self._max_rank,
            is_native=self._is_native,
        )

    def warm_up(self, size: int, adapter: Adapter) -> RunSeconds:
        """Runs every program of a size.

        One block is run for all: they share their programs. The second run is timed, as the first
        one also makes room.
        """
        row = TrainingRow((0,) * size, (False,) * (size - HEAD_PLACES) + (True,) * HEAD_PLACES)
        batch = MicroBatch([row], [adapter], [0], wants_gradient=True)
        rows, tiles, ids = _layout(batch, size)
        x, pairs = self._embedded(ids), self._pairs(batch, 0, size)
        forward, backward = (self._programs[f"train_{way}[{size}]"] for way in _WAYS)
        given = (self._weights.blocks[0], self._traits[0], x, rows, tiles, pairs)
        for _ in range(2):
            began = time.monotonic()
            after, kept = jax.block_until_ready(forward(*given))
            is_there = time.monotonic()
            jax.block_until_ready(backward(*given, kept, after))
            is_back = time.monotonic()
        for _ in self._head(batch, np.asarray(x)[0]):
            pass
        count = len(self._weights.blocks)
        return RunSeconds(
            (is_there - began) * count, (is_back - is_there) * count, time.monotonic() - is_back
        )

    def run(self, batch: MicroBatch, take: TakeGradient) -> Generator[None, None, Losses]:
        """Losses of every row; derivatives go to ``take``. Yields after each piece."""
        size = batch.num_tokens
        rows, tiles, ids = _layout(batch, size)
        x = self._embedded(ids)
        before, kept, pairs = [], [], []
        forward, backward = (self._programs[f"train_{way}[{size}]"] for way in _WAYS)
        for layer, weights in enumerate(self._weights.blocks):
            before.append(x)
            of_layer = self._pairs(batch, layer, size)
            x, own = forward(weights, self._traits[layer], x, rows, tiles, of_layer)
            kept.append(own if batch.wants_gradient else None)
            pairs.append(of_layer if batch.wants_gradient else None)
            x.block_until_ready()
            yield
        losses, by_x = yield from self._head(batch, np.asarray(x)[0])
        if not batch.wants_gradient or not np.isfinite(by_x).all():
            return losses
        derivative = jax.device_put(by_x[None])
        while before:
            layer = len(before) - 1
            given = (self._weights.blocks[layer], self._traits[layer], before.pop(), rows)
            derivative, by_pairs = backward(*given, tiles, pairs.pop(), kept.pop(), derivative)
            derivative.block_until_ready()
            self._hand_out(batch, layer, by_pairs, take)
            yield
        return losses

    def _embedded(self, token_ids: NDArray[np.int32]) -> jax.Array:
        """By the program of prefill, so that the first stream is that of a prompt."""
        size = token_ids.shape[1]
        step = min(size, 256)
        program = self._programs[f"embed[{step}]"]
        found = [
            np.asarray(program(self._weights.embeddings, token_ids[:, first : first + step]))
            for first in range(0, size, step)
        ]
        x: jax.Array = jax.device_put(np.concatenate(found, axis=1))
        return x

    def _head(self, batch: MicroBatch, x: Floats) -> Generator[None, None, tuple[Losses, Floats]]:
        asked = [
            (number, each.offset + place - 1, each.row.token_ids[place])
            for number, each in enumerate(placed(batch.rows))
            for place, is_trained in enumerate(each.row.is_trained)
            if is_trained
        ]
        losses: Losses = [[] for _ in batch.rows]
        by_x = np.zeros_like(x)
        norm = self._weights.final_norm
        for first in range(0, len(asked), HEAD_PLACES):
            own = asked[first : first + HEAD_PLACES]
            places = [place for _, place, _ in own]
            ids = np.zeros(HEAD_PLACES, np.int32)
            ids[: len(own)] = [token_id for *_, token_id in own]
            at_places = np.zeros((HEAD_PLACES, x.shape[1]), np.float32)
            at_places[: len(own)] = x[places]
            sums = no_sums(HEAD_PLACES, x.shape[1])
            for first_id, part, num_done in self._parts:
                sums = self._programs["train_head"](
                    part, first_id, num_done, norm, at_places, ids, np.int32(len(own)), sums
                )
                sums.total.block_until_ready()
                yield
            loss, by_places = self._programs["train_loss"](
                self._weights.embeddings, norm, at_places, ids, sums
            )
            by_x[places] = np.asarray(by_places)[: len(own)]
            for (number, *_), each in zip(own, np.asarray(loss).tolist(), strict=False):
                losses[number].append(each)
            yield
        return losses, by_x

    def _hand_out(
        self,
        batch: MicroBatch,
        layer: int,
        by_pairs: Mapping[str, tuple[jax.Array, jax.Array]],
        take: TakeGradient,
    ) -> None:
        used = {target for adapter in batch.adapters for target in adapter.targets}
        for target in sorted(used):
            by_a, by_b = (np.asarray(each) for each in by_pairs[target])
            for row, number in enumerate(batch.adapter_of):
                adapter = batch.adapters[number]
                if target in adapter.targets:
                    rank = adapter.rank
                    take(layer, row, target, (by_a[row, :, :rank], by_b[row, :, :rank]))

    def _pairs(self, batch: MicroBatch, layer: int, size: int) -> dict[str, RowPairs]:
        pairs = dict(self._nothing[_num_adapters(size)])
        for target in {target for adapter in batch.adapters for target in adapter.targets}:
            a, b = (np.zeros(each.shape, np.float32) for each in pairs[target][:2])
            is_used = np.zeros(a.shape[0], bool)
            for number, adapter in enumerate(batch.adapters):
                if found := adapter.pairs.get((layer, target)):
                    a[number, :, : adapter.rank], b[number, :, : adapter.rank] = found
                    is_used[number] = True
            # `jnp.asarray` would compile something for each shape that it meets first.
            pairs[target] = RowPairs(*map(jax.device_put, (a, b, is_used)))
        return pairs

    def _no_pairs(self, count: int) -> dict[str, RowPairs]:
        return {
            target: RowPairs(
                jnp.zeros((count, heads, self._max_rank, in_width), jnp.float32),
                jnp.zeros((count, heads, self._max_rank, out), jnp.float32),
                jnp.zeros(count, bool),
            )
            for target, (heads, in_width, out) in self._shapes.items()
        }


_SIZES = MICRO_BATCH_TOKENS
_WAYS = ("forward", "backward")


def _num_adapters(size: int) -> int:
    return min(max_rows(size), MAX_ADAPTERS)


def _layout(batch: MicroBatch, size: int) -> tuple[SequenceRows, TileRows, NDArray[np.int32]]:
    """Positions and rows of all tokens, rows and adapters of all tiles, and token ids."""
    ids, positions = np.zeros((2, 1, size), np.int32)
    sequences = np.full((1, size), -1, np.int32)
    tile_rows = np.full(size // TILE_TOKENS, max_rows(size), np.int32)
    # Padding names the adapter 0; nothing comes back from it.
    tile_adapters = np.zeros_like(tile_rows)
    num_real = 0
    for number, each in enumerate(placed(batch.rows)):
        num_real = each.offset + len(each.row.token_ids)
        own = slice(each.offset, num_real)
        ids[0, own] = each.row.token_ids
        positions[0, own] = np.arange(len(each.row.token_ids))
        sequences[0, own] = number
        end = each.offset + room_of(each.row)
        of_row = slice(each.offset // TILE_TOKENS, end // TILE_TOKENS)
        tile_rows[of_row], tile_adapters[of_row] = number, batch.adapter_of[number]
    tiles = TileRows(*map(jax.device_put, (tile_rows, tile_adapters, np.int32(num_real))))
    return SequenceRows(jax.device_put(positions), jax.device_put(sequences)), tiles, ids


def _table_parts(table: jax.Array) -> list[tuple[Any, jax.Array, Any]]:
    """First id, rows, and how many of them the part before had.

    On a CPU parts lie in the table itself: nothing is copied.
    """
    vocab = table.shape[0]
    if jax.default_backend() != "cpu" or vocab <= _PART_ROWS:
        return [(np.int32(0), table, np.int32(0))]
    on_host = np.asarray(table)
    parts = []
    for start in range(0, vocab, _PART_ROWS):
        first = min(start, vocab - _PART_ROWS)
        rows = jax.device_put(on_host[first : first + _PART_ROWS], may_alias=True)
        parts.append((np.int32(first), rows, np.int32(start - first)))
    return parts


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
