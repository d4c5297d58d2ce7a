"""Prompts and a decode step in one pass through the blocks.

A block reads its weights once for all tokens that it is given, so a step beside a part of a prompt
costs little more than the part. The newest token of each row stands behind the prompts as one more
prompt of one token; behind the blocks the rows go through the head and draw::

    prompt  prompt  prompt  row  row        embedded
    ------------------------------------    every block
                            row  row        head, and a token for each

All of it is one program, ``join``; with a program for every block a turn took an eighth longer.
Rows beyond the first eight draw in ``finish_joined``.

It is for the native block alone, in which nothing but a token's own sequence enters its bits. With
XLA a product of other shapes rounds otherwise, so there chunks and steps take turns.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.adapter_bank import AdapterBank, BankArrays
from model.config import GemmaConfig
from model.decode import DecodeOutputs, RuleRows, SlotStates, draw_rows, goes_on, no_outputs
from model.dispatch import DispatchPart
from model.gemma.block import LayerTraits
from model.gemma.forward import final_hidden, scale_embeddings, unembed
from model.gemma.padded_rows import padded_again, step_rows
from model.gemma.slot_tokens import slots_of_prompts
from model.gemma.weights import GemmaWeights
from model.prefill import MAX_PACKED_PROMPTS, ChunkRows, chunk_of, num_packed, prefill_block
from model.programs import ProgramSpec
from model.rule_rows import RuleArrays
from model.slots import DecodeRow, PromptChunk

# Prompt tokens of a turn, and rows. Five turns make a block of 256. On two cores a turn of Gemma 3
# 270M beside four rows takes 2.4 times as long as their step alone.
JOINED_TOKENS = 52
JOINED_ROWS = 32
# Of one call of the head; more rows take several.
_FINISHED_ROWS = 8
_BUCKET = 128
# Stands for the newest token of a row, which only its slot knows.
_OF_SLOT = -1


class DrawingRows(NamedTuple):
    """Rows that draw a token.

    Attributes:
        places: Of their newest tokens in the stream.
        slots: Of theirs; one that there is not marks a row that only fills up.
        positions: Of their newest tokens.
        rules: Of each.
    """

    places: Int[Array, " batch"]
    slots: Int[Array, " batch"]
    positions: Int[Array, " batch"]
    rules: RuleRows


def join(
    config: GemmaConfig,
    weights: GemmaWeights,
    traits: list[LayerTraits],
    states: SlotStates,
    token_ids: Int[Array, "1 seq"],
    rows: ChunkRows,
    bank: BankArrays | None,
    drawing: DrawingRows,
) -> tuple[SlotStates, Float[Array, "1 seq width"], DecodeOutputs]:
    """The states after a turn, the stream after its last block, and what the first rows drew."""
    x = _embed_joined(weights.embeddings, states.tokens, token_ids, rows)
    caches = []
    for layer, cache in enumerate(states.caches):
        pairs = (None, None) if bank is None else (bank.layers[layer], bank.ranks)
        block = (weights.blocks[layer], traits[layer], cache)
        x, after = prefill_block(config, *block, x, rows, *pairs, is_native=True)
        caches.append(after)
    tokens, outputs = finish_joined(config, weights, states.tokens, x, drawing)
    return SlotStates(tokens, caches), x, outputs


def _embed_joined(
    embeddings: Float[Array, "vocab width"],
    tokens: Int[Array, "slots context"],
    token_ids: Int[Array, "1 seq"],
    rows: ChunkRows,
) -> Float[Array, "1 seq width"]:
    """The residual stream before the first block; rows find their tokens in their slots."""
    prompts = (rows.slots, rows.offsets, rows.lengths, rows.num_prompts)
    slots, _ = slots_of_prompts(*prompts, token_ids.shape[1])
    newest = tokens.at[slots, rows.positions[0]].get(mode="clip")
    known = jnp.where(token_ids == _OF_SLOT, newest[None], token_ids)
    return scale_embeddings(embeddings[known])


def finish_joined(
    config: GemmaConfig,
    weights: GemmaWeights,
    tokens: Int[Array, "slots context"],
    x: Float[Array, "1 seq width"],
    drawing: DrawingRows,
) -> tuple[Int[Array, "slots context"], DecodeOutputs]:
    """What rows draw, given the stream after the last block.

    As the end of `model.decode.decode_steps`, for one step.
    """
    places, slots, positions, rules = drawing
    num_slots = tokens.shape[0]
    newest = tokens.at[slots, positions].get(mode="clip")
    is_going = (slots < num_slots) & goes_on(newest, positions, rules)
    step = step_rows(len(slots), is_native=True)
    hidden = final_hidden(config, weights, padded_again(x[0, places][:, None], step))
    logits = unembed(config, weights, hidden, step)[:, 0].astype(jnp.float32)
    own = jnp.where(is_going, slots, num_slots)
    tokens, drawn = draw_rows(tokens, logits, own, positions, rules)
    outputs = jax.tree.map(
        lambda all_, first: all_.at[0].set(first),
        no_outputs(config, len(slots)),
        drawn._replace(is_drawn=is_going),
    )
    return tokens, outputs


class JoinedTurns:
    """The programs of turns, and their arguments.

    Args:
        config: Of the model.
        weights: Of the model.
        traits: Of the layers.
        rules: Of rows, as arrays.
        bank: Of adapters.
        num_rows: That may be decoded together.
        programs: Of the engine, filled by it.
    """

    def __init__(
        self,
        config: GemmaConfig,
        weights: GemmaWeights,
        traits: list[LayerTraits],
        rules: RuleArrays,
        bank: AdapterBank,
        num_rows: int,
        programs: dict[str, Callable[..., Any]],
    ) -> None:
        self._config = config
        self._weights = weights
        self._traits = traits
        self._rules = rules
        self._bank = bank
        self._num_rows = num_rows
        self._programs = programs

    def program_specs(self, states: SlotStates) -> Iterator[ProgramSpec]:
        """What is to be compiled."""
        ids, each = _integers(1, _BUCKET), _integers(num_packed(_BUCKET))
        rows = ChunkRows(ids, each, each, each, each, _integers(), each)
        number = _integers(_FINISHED_ROWS)
        drawing = DrawingRows(number, number, number, self._rules.fillers(_FINISHED_ROWS))
        model = (self._weights, self._traits, states)
        arguments = (*model, ids, rows, self._bank.arrays, drawing)
        yield ProgramSpec("join", partial(join, self._config), arguments, donated=(2,))
        if self._num_rows > _FINISHED_ROWS:
            x = jax.ShapeDtypeStruct((1, _BUCKET, self._config.hidden_dim), jnp.float32)
            yield ProgramSpec(
                "finish_joined",
                partial(finish_joined, self._config),
                (self._weights, states.tokens, x, drawing),
                donated=(1,),
            )

    def take(
        self, states: SlotStates, chunks: Sequence[PromptChunk], rows: Sequence[DecodeRow]
    ) -> tuple[SlotStates, jax.Array, list[DispatchPart]]:
        """Starts a turn: the states after it, the stream of its tokens, and what the rows draw."""
        _check(chunks, rows)
        newest = [PromptChunk(row.slot, [_OF_SLOT], row.position, (), row.adapter) for row in rows]
        token_ids, placed = chunk_of([*chunks, *newest], _BUCKET)
        first_place = sum(len(chunk.token_ids) for chunk in chunks)
        num_slots = states.tokens.shape[0]
        groups = [
            (rows[first : first + _FINISHED_ROWS], first_place + first)
            for first in range(0, len(rows), _FINISHED_ROWS)
        ]
        own, place = groups[0]
        states, x, outputs = self._programs["join"](
            *(self._weights, self._traits, states, token_ids, placed, self._bank.arrays),
            self._drawing(own, place, num_slots),
        )
        parts = [DispatchPart(own, outputs)]
        for own, place in groups[1:]:
            drawing = self._drawing(own, place, num_slots)
            tokens, outputs = self._programs["finish_joined"](
                self._weights, states.tokens, x, drawing
            )
            states = states._replace(tokens=tokens)
            parts.append(DispatchPart(own, outputs))
        return states, x, parts

    def _drawing(self, rows: Sequence[DecodeRow], place: int, num_slots: int) -> DrawingRows:
        """Of rows whose newest tokens stand behind each other from ``place`` on."""
        places, positions = np.zeros((2, _FINISHED_ROWS), np.int32)
        slots = np.full(_FINISHED_ROWS, num_slots, np.int32)
        for index, row in enumerate(rows):
            places[index], slots[index] = place + index, row.slot
            positions[index] = row.position
        rules = self._rules.of([row.rules for row in rows], _FINISHED_ROWS)
        of_rows = (jnp.asarray(places), jnp.asarray(slots), jnp.asarray(positions))
        return DrawingRows(*of_rows, rules)


def _check(chunks: Sequence[PromptChunk], rows: Sequence[DecodeRow]) -> None:
    num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
    fits = num_tokens <= JOINED_TOKENS and len(chunks) <= MAX_PACKED_PROMPTS
    is_changed = any(chunk.touches for chunk in chunks) or any(
        row.rules.interventions for row in rows
    )
    if not fits or not 1 <= len(rows) <= JOINED_ROWS or is_changed:
        raise ValueError(
            f"{num_tokens} tokens of {len(chunks)} prompts and {len(rows)} rows cannot be joined: "
            f"{JOINED_TOKENS}, {MAX_PACKED_PROMPTS} and {JOINED_ROWS} are the most, without "
            "interventions."
        )


def _integers(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
