"""The part of `model.self_test` that is about training. One claim:

* a row that shares a micro-batch with rows of other adapters has the losses, and the derivatives by
  the pairs of a block, that it has alone.

The head and one block are tried, there and back: all blocks share their programs. Only the smallest
programs are: in the others every row is alone.
"""

from collections.abc import Generator
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np

from model.adapter_bank import random_adapter
from model.config import GemmaConfig
from model.errors import SelfTestFailed
from model.finetune.micro_batch import ByHead, Losses, MicroBatch, TakeGradient
from model.self_test_report import REPORT, machine_of
from model.slots import EngineInfo
from model.training import TrainingRow

# A prime: its multiples spread over a vocabulary of any size.
_ID_STRIDE = 104_729
# Tokens of each row, and how many of them are learned: one group of places in the head together.
# They take 64, 32 and 16 tokens of a micro-batch, and some are left over.
_ROWS = ((50, 15), (25, 10), (9, 7))


@runtime_checkable
class TrainingSubject(Protocol):
    """Micro-batches of an engine, on one block."""

    def run(self, batch: MicroBatch, take: TakeGradient) -> Generator[None, None, Losses]: ...


def compare_training(info: EngineInfo, config: GemmaConfig, subject: TrainingSubject) -> int:
    """Tries the claim; returns how many losses and derivatives were compared.

    Args:
        info: Of the engine.
        config: Of its model.
        subject: Of the engine.

    Raises:
        SelfTestFailed: Bits differ.
    """
    one_block = replace(config, num_layers=1)
    rows = [_row(info.vocabulary_size, *each) for each in _ROWS]
    adapters = [
        random_adapter(one_block, max(info.adapter_max_rank // (number + 1), 1), seed=number)
        for number in range(len(rows))
    ]
    together = MicroBatch(rows, adapters, range(len(rows)), wants_gradient=True)
    found = _bits(subject, together)
    for number, (row, adapter) in enumerate(zip(rows, adapters, strict=True)):
        [alone] = _bits(subject, MicroBatch([row], [adapter], [0], wants_gradient=True))
        if alone != found[number]:
            raise SelfTestFailed(
                f"A row of {len(row.token_ids)} tokens is trained with other bits beside "
                f"{len(rows) - 1} others than alone on {machine_of(info)}, so adapters would "
                "depend on what else is trained. Serve with --adapter-slots 0, which does "
                f"without, and {REPORT}"
            )
    return sum(map(len, found))


def _row(vocabulary_size: int, length: int, num_trained: int) -> TrainingRow:
    ids = [_ID_STRIDE * (place + length) % vocabulary_size for place in range(length)]
    trained = (False,) * (length - num_trained) + (True,) * num_trained
    return TrainingRow(tuple(ids), trained)


def _bits(subject: TrainingSubject, batch: MicroBatch) -> list[list[bytes]]:
    """Of each row: its losses, and its derivative by each pair."""
    found: list[list[bytes]] = [[] for _ in batch.rows]

    def take(layer: int, row: int, target: str, by_head: ByHead) -> None:
        found[row] += [each.tobytes() for each in by_head]

    running = subject.run(batch, take)
    while True:
        try:
            next(running)
        except StopIteration as done:
            losses: Losses = done.value
            break
    for own, of_row in zip(found, losses, strict=True):
        own += [np.float64(loss).tobytes() for loss in of_row]
    return found
