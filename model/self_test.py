"""Whether a row's bits depend on its company, tried on this machine with the programs that serve.

The programs are written so that they cannot (`model.gemma.padded_rows`, `model.gemma.attention`),
but that rests on what XLA makes of a product on a kind of processor. So an engine is tried before
its first request, on its own slots; what they hold afterwards is never seen. Three claims
here, two more each in `model.search_self_test`, `model.adapter_self_test`, `model.score_self_test`
and `model.joined_self_test`, one in `model.training_self_test`:

* a chunk program gives a position of a prompt the same keys and values in any slot, whatever stood
  there, and whatever else is in the chunk: tokens, padding or other prompts;
* a copied prompt is the prompt;
* a step gives a row the same bits alone and in any number of rows, at any place, however long its
  neighbours are, however they draw, and whatever is changed in their residual streams.

What is compared is all that leaves a step: the token, the likeliest alternatives, their
log-probabilities, and the keys and values that it wrote in every layer.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from model.adapter_self_test import AdapterSubject, compare_adapters
from model.errors import SelfTestFailed
from model.gemma.kv_cache import LayerCache
from model.intervention_slots import Intervention, StepIntervention
from model.joined_self_test import JoinedSubject, compare_joined
from model.search_self_test import SearchSubject, compare_searches
from model.self_test_report import REPORT, machine_of
from model.slots import (
    MAX_LOGPROBS,
    DecodeRow,
    Dispatch,
    EngineInfo,
    PromptChunk,
    RowRules,
    SampledToken,
    Sampling,
    SelfTest,
)

# A prime: its multiples spread over a vocabulary of any size.
_ID_STRIDE = 104_729

# Rows take turns with these, so that each meets neighbours that draw in another way.
_SAMPLINGS = (
    Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0),
    Sampling(temperature=0.9, top_k=0, top_p=0.95, seed=11),
    Sampling(temperature=1.5, top_k=40, top_p=1.0, seed=12),
    Sampling(1.0, 0, 1.0, 13, min_p=0.01, repetition_penalty=1.3, logit_bias=((9, 1.0),)),
)

_MAX_POSITIONS = 32

KeysAndValues = Float32[np.ndarray, "arrays kv_heads head_dim"]


@runtime_checkable
class Subject(SearchSubject, AdapterSubject, JoinedSubject, Protocol):
    """An engine, and a look into its slots."""

    def begin(self, slot: int, token_ids: Sequence[int]) -> None: ...

    def prefill(self, chunks: Sequence[PromptChunk]) -> Iterator[None]: ...

    def copy(self, source: int, targets: Sequence[int], num_tokens: int) -> None: ...

    def decode(self, rows: Sequence[DecodeRow], num_steps: int) -> Dispatch: ...

    def keys_and_values(self, slot: int, position: int) -> KeysAndValues:
        """What stands at one position of a slot: keys and values of every layer."""


@jax.jit
def read_position(
    caches: list[LayerCache], slot: Int[Array, ""], position: Int[Array, ""]
) -> Float[Array, "arrays kv_heads head_dim"]:
    """Keys and values of every layer at one position of a slot."""
    return jnp.stack(
        [array[slot, :, position % cache.num_positions] for cache in caches for array in cache]
    )


def compare_bits(subject: Subject) -> SelfTest:
    """Tries all claims.

    Raises:
        SelfTestFailed: Bits differ. The message says where, and what can be done.
    """
    info = subject.info
    num_tokens = min(info.context_tokens, 2 * info.chunk_tokens)
    token_ids = [_ID_STRIDE * (i + 1) % info.vocabulary_size for i in range(num_tokens)]
    num_held, num_positions = _compare_chunks(subject, token_ids)
    num_positions += _compare_copy(subject, num_held)
    num_rows = _compare_rows(subject, token_ids, num_held)
    num_rows += _compare_searches(subject, token_ids, num_held)
    num_rows += compare_adapters(subject, token_ids)
    return SelfTest(
        row_counts=tuple(info.buckets["decode_rows"]),
        chunk_tokens=tuple(info.buckets["prefill_tokens"]),
        num_comparisons=num_positions + num_rows,
    )


def _compare_chunks(subject: Subject, token_ids: Sequence[int]) -> tuple[list[int], int]:
    """How many tokens of the prompt each slot then holds, and how many positions were compared.

    Two prompts for each program, one padded and one full, and prompts that share a chunk. The
    longest is the last, in slot 0, and goes on there into a second block of keys.
    """
    info = subject.info
    room = min(info.context_tokens, info.chunk_tokens)
    sizes = [0, *info.buckets["prefill_tokens"]]
    spans = [(low, min(high, room)) for low, high in pairwise(sizes) if low < room]
    num_held = [0] * info.num_slots
    num_compared = 0

    def hold(batch: _Batch) -> None:
        _prefill(subject, [PromptChunk(slot, token_ids[:count], 0) for slot, count in batch])
        for slot, count in batch:
            num_held[slot] = count

    for place, (low, high) in enumerate(spans):
        slot = 2 * (len(spans) - 1 - place) % info.num_slots
        other = (slot + 1) % info.num_slots
        batches: list[_Batch] = [[(other, (low + high) // 2 + 1)]]
        if place == 0 and other != slot and info.packed_prompts > 1:
            first = min(info.packed_tokens // 3, high)
            batches.append([(other, first), (slot, min(info.packed_tokens - first, high))])
        hold([(slot, high)])
        counts = [count for batch in batches for _, count in batch]
        positions = sorted({each for count in counts for each in _some_positions(0, count)})
        expected = {position: _held_bits(subject, slot, position) for position in positions}
        for batch in batches:
            hold(batch)
            for held_in, count in batch:
                for position in _some_positions(0, count):
                    if _held_bits(subject, held_in, position) != expected[position]:
                        among = " and ".join(str(count) for _, count in batch)
                        raise SelfTestFailed(_other_bits(info, position, among, str(high)))
                    num_compared += 1
    if num_held[0] < room:
        hold([(0, room)])
    return num_held, num_compared + _compare_second_block(subject, token_ids, num_held)


# Slots, and how many tokens of the prompt each gets.
_Batch = list[tuple[int, int]]


def _compare_second_block(subject: Subject, token_ids: Sequence[int], num_held: list[int]) -> int:
    """Slot 0 goes on, padded and full. One program will do: only the attention has more to walk."""
    start = num_held[0]
    full = min(len(token_ids) - start, subject.info.buckets["prefill_tokens"][0])
    if full <= 0:
        return 0
    padded = full // 2 + 1
    positions = _some_positions(start, padded)
    written = []
    for count in (padded, full):
        _prefill(subject, [PromptChunk(0, token_ids[start : start + count], start)])
        written.append([_held_bits(subject, 0, position) for position in positions])
    for position, one, other in zip(positions, *written, strict=True):
        if one != other:
            raise SelfTestFailed(_other_bits(subject.info, position, str(padded), str(full)))
    num_held[0] = start + full
    return len(positions)


def _other_bits(info: EngineInfo, position: int, count: str, other: str) -> str:
    return (
        f"Position {position} of a prompt gets other bits among {count} tokens than among {other} "
        f"on {machine_of(info)}, so answers would depend on what they cannot see. "
        f"No setting avoids it; {REPORT}"
    )


def _prefill(subject: Subject, chunks: Sequence[PromptChunk]) -> None:
    for _ in subject.prefill(chunks):
        pass


def _some_positions(start: int, num_tokens: int) -> range:
    """At most `_MAX_POSITIONS` from ``start``, evenly spread."""
    return range(start, start + num_tokens, -(-num_tokens // _MAX_POSITIONS))


def _compare_copy(subject: Subject, num_held: list[int]) -> int:
    """Gives slot 1 what slot 0 holds; returns how many positions were compared."""
    if len(num_held) == 1:
        return 0
    num_held[1] = num_held[0]
    subject.copy(0, [1], num_held[0])
    positions = _some_positions(0, num_held[0])
    for position in positions:
        if _held_bits(subject, 0, position) != _held_bits(subject, 1, position):
            raise SelfTestFailed(
                f"Position {position} of a prompt has other bits in a copy on "
                f"{machine_of(subject.info)}. No setting avoids it; {REPORT}"
            )
    return len(positions)


def _compare_rows(subject: Subject, token_ids: Sequence[int], num_held: Sequence[int]) -> int:
    """Steps of one row each, then of two, three and more; returns how many rows were compared.

    The last token that a slot holds is decoded, as it would be for a request.
    """
    largest = subject.info.buckets["decode_rows"][-1]
    changes = _changes(subject.info)
    rows = [
        _row(subject, slot, max(num_tokens - 1, 0), token_ids, changes[slot % len(changes)])
        for slot, num_tokens in enumerate(num_held[:largest])
    ]
    alone = {row.slot: _step(subject, [row])[0] for row in rows}
    num_compared = 0
    for count in range(2, len(rows) + 1):
        # Another first row each time, so that rows stand at several places.
        batch = [rows[(count + place) % len(rows)] for place in range(count)]
        for place, (row, bits) in enumerate(zip(batch, _step(subject, batch), strict=True)):
            if bits != alone[row.slot]:
                raise SelfTestFailed(
                    f"A row gets other bits among {count} (at place {place}, position "
                    f"{row.position}) than alone on {machine_of(subject.info)}, so answers would "
                    f"depend on what else runs. {_remedy(subject.info, count)}"
                )
            num_compared += 1
    return num_compared + _compare_joined(subject, token_ids, rows)


def _compare_joined(subject: Subject, token_ids: Sequence[int], rows: Sequence[DecodeRow]) -> int:
    """The same rows beside a prompt, which is what the last slot then holds."""

    def step_bits(dispatch: Dispatch, stepped: Sequence[DecodeRow]) -> list[bytes]:
        return _step_bits(subject, dispatch, stepped)

    def held_bits(slot: int, position: int) -> bytes:
        return _held_bits(subject, slot, position)

    return compare_joined(subject, token_ids, rows, step_bits, held_bits)


def _compare_searches(subject: Subject, token_ids: Sequence[int], num_held: Sequence[int]) -> int:
    """The same rows in searches, if there are any; returns how many rows were compared."""
    if not subject.info.buckets.get("search_rows"):
        return 0
    positions = [max(num_tokens - 1, 0) for num_tokens in num_held]
    positions = positions[: subject.info.buckets["decode_rows"][-1]]
    rows = [_row(subject, slot, position, token_ids) for slot, position in enumerate(positions)]
    found = [subject.decode([row], 1).tokens()[0][0] for row in rows]
    tokens = [(position, token_ids[position]) for position in positions]
    return compare_searches(subject, tokens, found)


def _changes(info: EngineInfo) -> list[tuple[StepIntervention, ...]]:
    """Rows take turns with these; two of three leave their residual streams as they are."""
    numbers = np.arange(info.hidden_dim, dtype="<f4")
    vector = np.cos(numbers).astype("<f4").tobytes()
    middle = info.num_layers // 2
    changes = (
        Intervention("add", (-1, middle), 0.5, vector),
        Intervention("project_out", (0,), vector=vector),
        Intervention("scale", (info.num_layers - 1,), 0.9),
    )
    return [(), (), tuple(StepIntervention(each, True, True) for each in changes)]


def _row(
    subject: Subject,
    slot: int,
    position: int,
    token_ids: Sequence[int],
    interventions: tuple[StepIntervention, ...] = (),
) -> DecodeRow:
    """The row that continues a slot at ``position``; half of what it holds counts as its prompt."""
    subject.begin(slot, token_ids[: position + 1])
    rules = RowRules(
        _SAMPLINGS[slot % len(_SAMPLINGS)],
        num_prompt=position // 2 + 1,
        end=subject.info.context_tokens + 1,
        num_logprobs=MAX_LOGPROBS,
        interventions=interventions,
    )
    return DecodeRow(slot, position, rules)


def _step(subject: Subject, rows: Sequence[DecodeRow]) -> list[bytes]:
    """All that one step gives each row, and leaves in its slot."""
    return _step_bits(subject, subject.decode(rows, 1), rows)


def _step_bits(subject: Subject, dispatch: Dispatch, rows: Sequence[DecodeRow]) -> list[bytes]:
    return [
        _bits(token) + _held_bits(subject, row.slot, row.position)
        for row, (token,) in zip(rows, dispatch.tokens(), strict=True)
    ]


def _held_bits(subject: Subject, slot: int, position: int) -> bytes:
    return subject.keys_and_values(slot, position).tobytes()


def _bits(token: SampledToken) -> bytes:
    ids = [token.token_id, *(id_ for id_, _ in token.top)]
    logprobs = [token.logprob, *(logprob for _, logprob in token.top)]
    return (
        np.array([token.is_finite, *ids], np.int64).tobytes()
        + np.array(logprobs, np.float32).tobytes()
    )


def _remedy(info: EngineInfo, count: int) -> str:
    """Fewer slots, if fewer rows agreed: they need none of the larger programs."""
    program = next(rows for rows in info.buckets["decode_rows"] if rows >= count)
    agreed = [rows for rows in info.buckets["decode_rows"] if rows < program]
    if not agreed:
        return f"No number of slots avoids it; {REPORT}"
    return f"Serve with --slots {agreed[-1]}, which gave equal bits, and {REPORT}"
