"""Prompts and a decode step in one pass through the blocks.

A block reads its weights once for all tokens that it is given, so a step beside a part of a prompt
costs little more than the part. The newest token of each row stands behind the prompts as one more
prompt of one token; behind the blocks the rows go through the head and draw::

    prompt  prompt  prompt  row  row        embed_joined
    ------------------------------------    block[128, ...], as for chunks
                            row  row        finish_joined

It is for the native block alone, in which nothing but a token's own sequence enters its bits. With
XLA a product of other shapes rounds otherwise, so there chunks and steps take turns.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.config import GemmaConfig
from model.decode import DecodeOutputs, RuleRows, draw_rows, goes_on, no_outputs
from model.dispatch import DispatchPart
from model.gemma.forward import final_hidden, scale_embeddings, unembed
from model.gemma.padded_rows import padded_again, step_rows
from model.gemma.slot_tokens import slots_of_prompts
from model.gemma.weights import GemmaWeights
from model.prefill import MAX_PACKED_PROMPTS, ChunkRows, chunk_of, num_packed
from model.programs import ProgramSpec
from model.rule_rows import RuleArrays
from model.slots import DecodeRow, PromptChunk

# Prompt tokens of a turn, and rows. Five turns make a block of 256. On two cores a turn of Gemma 3
# 270M beside four rows takes 2.6 times as long as their step alone.
JOINED_TOKENS = 52
JOINED_ROWS = 32
# Of one call of the head; more rows take several.
_FINISHED_ROWS = 8
_BUCKET = 128
# Stands for the newest token of a row, which only its slot knows.
_OF_SLOT = -1


def embed_joined(
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
    places: Int[Array, " batch"],
    slots: Int[Array, " batch"],
    positions: Int[Array, " batch"],
    rules: RuleRows,
) -> tuple[Int[Array, "slots context"], DecodeOutputs]:
    """What rows draw whose stream after the last block stands at ``places``.

    As the end of `model.decode.decode_steps`, for one step.
    """
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
    """The programs around the blocks, and their arguments.

    Args:
        config: Of the model.
        weights: Of the model.
        rules: Of rows, as arrays.
        num_slots: That the caches have; a row that fills up names this one.
        programs: Of the engine, filled by it.
    """

    def __init__(
        self,
        config: GemmaConfig,
        weights: GemmaWeights,
        rules: RuleArrays,
        num_slots: int,
        programs: dict[str, Callable[..., Any]],
    ) -> None:
        self._config = config
        self._weights = weights
        self._rules = rules
        self._num_slots = num_slots
        self._programs = programs

    def program_specs(self, tokens: jax.Array) -> list[ProgramSpec]:
        """What is to be compiled."""
        ids, each = _integers(1, _BUCKET), _integers(num_packed(_BUCKET))
        rows = ChunkRows(ids, each, each, each, each, _integers(), each)
        x = jax.ShapeDtypeStruct((1, _BUCKET, self._config.hidden_dim), jnp.float32)
        numbers = _integers(_FINISHED_ROWS)
        finish = partial(finish_joined, self._config)
        rules = self._rules.fillers(_FINISHED_ROWS)
        arguments = (self._weights, tokens, x, numbers, numbers, numbers, rules)
        return [
            ProgramSpec(
                "embed_joined", embed_joined, (self._weights.embeddings, tokens, ids, rows)
            ),
            ProgramSpec("finish_joined", finish, arguments, donated=(1,)),
        ]

    def begin(
        self, tokens: jax.Array, chunks: Sequence[PromptChunk], rows: Sequence[DecodeRow]
    ) -> tuple[jax.Array, ChunkRows]:
        """The stream of all before the first block, and where its tokens belong."""
        _check(chunks, rows)
        newest = [PromptChunk(row.slot, [_OF_SLOT], row.position, (), row.adapter) for row in rows]
        token_ids, placed = chunk_of([*chunks, *newest], _BUCKET)
        x = self._programs["embed_joined"](self._weights.embeddings, tokens, token_ids, placed)
        return x, placed

    def finish(
        self,
        tokens: jax.Array,
        x: jax.Array,
        chunks: Sequence[PromptChunk],
        rows: Sequence[DecodeRow],
    ) -> tuple[jax.Array, list[DispatchPart]]:
        """The tokens of all slots with those that the rows drew, and what these are."""
        offset = sum(len(chunk.token_ids) for chunk in chunks)
        parts = []
        for first in range(0, len(rows), _FINISHED_ROWS):
            own = rows[first : first + _FINISHED_ROWS]
            places, positions = np.zeros((2, _FINISHED_ROWS), np.int32)
            slots = np.full(_FINISHED_ROWS, self._num_slots, np.int32)
            for index, row in enumerate(own):
                places[index], slots[index] = offset + first + index, row.slot
                positions[index] = row.position
            rules = self._rules.of([row.rules for row in own], _FINISHED_ROWS)
            tokens, outputs = self._programs["finish_joined"](
                self._weights, tokens, x, places, slots, positions, rules
            )
            parts.append(DispatchPart(own, outputs))
        return tokens, parts


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
