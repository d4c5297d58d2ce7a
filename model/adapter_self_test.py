"""The part of `model.self_test` that is about adapters. Two claims:

* a chunk gives a position the same keys and values alone and beside prompts of other adapters and
  of the base, whatever padding is behind it;
* a step gives a row the same bits alone and beside rows of other adapters and of the base.

The adapters are drawn at random and add to every projection, with a rank of their own each; the
bank's slots that they are in are free afterwards, as whoever gets one writes all of it.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from model.errors import SelfTestFailed
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
)

# Adapters that are tried at once, if there are slots for them.
_MAX_ADAPTERS = 3
_PROMPT_TOKENS = 19
_GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)


@runtime_checkable
class AdapterSubject(Protocol):
    """An engine with adapters, and a look into its slots."""

    @property
    def info(self) -> EngineInfo: ...

    def begin(self, slot: int, token_ids: Sequence[int]) -> None: ...

    def prefill(self, chunks: Sequence[PromptChunk]) -> Iterator[None]: ...

    def decode(self, rows: Sequence[DecodeRow], num_steps: int) -> Dispatch: ...

    def put_random_adapter(self, slot: int, rank: int) -> None:
        """Fills a slot of the bank with an adapter of all projections."""

    def keys_and_values(
        self, slot: int, position: int
    ) -> Float32[np.ndarray, "arrays kv_heads head_dim"]: ...


def compare_adapters(subject: AdapterSubject, token_ids: Sequence[int]) -> int:
    """Tries both claims, if there is a bank; returns how many rows and positions were compared.

    Raises:
        SelfTestFailed: Bits differ.
    """
    info = subject.info
    num_adapters = min(info.adapter_slots, _MAX_ADAPTERS)
    if num_adapters == 0:
        return 0
    for number in range(1, num_adapters + 1):
        subject.put_random_adapter(number, max(info.adapter_max_rank // number, 1))
    adapters = [slot % (num_adapters + 1) for slot in range(info.num_slots)]
    count = min(_PROMPT_TOKENS, info.context_tokens, len(token_ids))
    return _compare_chunks(subject, token_ids, count, adapters) + _compare_rows(
        subject, token_ids, count, adapters
    )


def _compare_chunks(
    subject: AdapterSubject, token_ids: Sequence[int], count: int, adapters: Sequence[int]
) -> int:
    """Prompts alone, shorter and longer ones by each program, and several in one chunk."""
    info = subject.info
    positions = range(0, min(count, info.context_tokens // 2), 3)
    last = min(len(adapters), max(adapters) + 1) - 1
    alone: dict[int, list[bytes]] = {}

    def held(slot: int) -> list[bytes]:
        return [subject.keys_and_values(slot, each).tobytes() for each in positions]

    for slot in range(last + 1):
        _prefill(subject, [PromptChunk(slot, token_ids[:count], 0, adapter=adapters[slot])])
        alone[slot] = held(slot)
    num_compared = 0
    room = min(info.context_tokens, info.chunk_tokens, len(token_ids))
    for low, high in pairwise([0, *info.buckets["prefill_tokens"]]):
        if low >= room:
            break
        full = min(high, room)
        written = []
        for length in ((low + full) // 2 + 1, full):
            _prefill(subject, [PromptChunk(last, token_ids[:length], 0, adapter=adapters[last])])
            written.append(held(last))
        if written[0] != written[1]:
            raise _failure(info, f"a prompt of an adapter among {full} tokens than among fewer")
        num_compared += len(positions)
    num_shared = min(last + 1, info.packed_tokens // count, info.packed_prompts)
    if num_shared > 1:
        slots = range(last, last - num_shared, -1)
        _prefill(
            subject,
            [PromptChunk(each, token_ids[:count], 0, adapter=adapters[each]) for each in slots],
        )
        for slot in slots:
            if held(slot) != alone[slot]:
                raise _failure(info, "a prompt beside those of other adapters than alone")
            num_compared += len(positions)
    return num_compared


def _compare_rows(
    subject: AdapterSubject, token_ids: Sequence[int], count: int, adapters: Sequence[int]
) -> int:
    """Each row alone, and then all of them together, in two orders."""
    info = subject.info
    rules = RowRules(_GREEDY, count, info.context_tokens + 1, num_logprobs=MAX_LOGPROBS)
    largest = info.buckets["decode_rows"][-1]
    rows = [
        DecodeRow(slot, count - 1, rules, adapter)
        for slot, adapter in enumerate(adapters[:largest])
    ]
    for row in rows:
        subject.begin(row.slot, token_ids[:count])
        _prefill(subject, [PromptChunk(row.slot, token_ids[:count], 0, adapter=row.adapter)])
    alone = {row.slot: _step(subject, [row])[0] for row in rows}
    for together in (rows, [*rows[1:], rows[0]]):
        for row, bits in zip(together, _step(subject, together), strict=True):
            if bits != alone[row.slot]:
                raise _failure(
                    info, f"a row beside rows of other adapters, {len(rows)} in all, than alone"
                )
    return 2 * len(rows)


def _prefill(subject: AdapterSubject, chunks: Sequence[PromptChunk]) -> None:
    for _ in subject.prefill(chunks):
        pass


def _step(subject: AdapterSubject, rows: Sequence[DecodeRow]) -> list[bytes]:
    drawn = subject.decode(rows, 1).tokens()
    return [
        _bits(token) + subject.keys_and_values(row.slot, row.position).tobytes()
        for row, (token,) in zip(rows, drawn, strict=True)
    ]


def _bits(token: SampledToken) -> bytes:
    ids = [token.token_id, *(id_ for id_, _ in token.top)]
    logprobs = [token.logprob, *(logprob for _, logprob in token.top)]
    return np.array(ids, np.int64).tobytes() + np.array(logprobs, np.float32).tobytes()


def _failure(info: EngineInfo, what: str) -> SelfTestFailed:
    return SelfTestFailed(
        f"Other bits for {what} on {machine_of(info)}, so answers would depend on what else runs. "
        f"Serve with --adapter-slots 0, which does without, and {REPORT}"
    )
