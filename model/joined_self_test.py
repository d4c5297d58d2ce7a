"""The part of `model.self_test` that is about turns that join steps to prompts. Two claims:

* a row of such a turn gets the same bits as in a step alone;
* a part of a prompt in it gets the same keys and values as in a chunk, wherever the parts begin.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

from model.errors import SelfTestFailed
from model.self_test_report import REPORT, machine_of
from model.slots import DecodeRow, Dispatch, EngineInfo, PromptChunk

_PROMPT_TOKENS = 100

# What one step gives each row, and leaves in its slot.
StepBits = Callable[[Dispatch, Sequence[DecodeRow]], list[bytes]]
# What stands at one position of a slot.
HeldBits = Callable[[int, int], bytes]


@runtime_checkable
class JoinedSubject(Protocol):
    """An engine that may join steps to prompts."""

    @property
    def info(self) -> EngineInfo: ...

    def prefill(self, chunks: Sequence[PromptChunk]) -> Iterator[None]: ...

    def decode(self, rows: Sequence[DecodeRow], num_steps: int) -> Dispatch: ...

    def join(self, chunks: Sequence[PromptChunk], rows: Sequence[DecodeRow]) -> Dispatch: ...


def compare_joined(
    subject: JoinedSubject,
    token_ids: Sequence[int],
    rows: Sequence[DecodeRow],
    step_bits: StepBits,
    held_bits: HeldBits,
) -> int:
    """Tries both claims; returns how many rows and positions were compared.

    Args:
        subject: The engine.
        token_ids: Of a prompt.
        rows: Of all slots; the last slot is given to the prompt.
        step_bits: Of rows that made a step.
        held_bits: Of a position.

    Raises:
        SelfTestFailed: Bits differ.
    """
    info = subject.info
    rows = [row for row in rows[:-1] if not row.rules.interventions][: info.joined_rows]
    if not info.joined_tokens or not rows:
        return 0
    slot = info.num_slots - 1
    count = min(_PROMPT_TOKENS, info.context_tokens, info.chunk_tokens, len(token_ids))
    positions = range(count)
    for _ in subject.prefill([PromptChunk(slot, token_ids[:count], 0)]):
        pass
    prefilled = [held_bits(slot, position) for position in positions]
    stepped = step_bits(subject.decode(rows, 1), rows)
    # Parts that begin anywhere, the last one with a single row.
    borders = [*range(0, count, info.joined_tokens - 27), count]
    for start, end in pairwise(borders):
        own = rows if end < count else rows[-1:]
        dispatch = subject.join([PromptChunk(slot, token_ids[start:end], start)], own)
        if step_bits(dispatch, own) != stepped[-len(own) :]:
            raise _failure(info, "A row gets other bits beside a prompt than alone")
    if [held_bits(slot, position) for position in positions] != prefilled:
        raise _failure(info, "A prompt gets other bits beside rows than alone")
    return len(rows) * (len(borders) - 2) + 1 + count


def _failure(info: EngineInfo, what: str) -> SelfTestFailed:
    return SelfTestFailed(
        f"{what} on {machine_of(info)}, so answers would depend on what they cannot see. "
        f"Serve with --kernels xla, and {REPORT}"
    )
