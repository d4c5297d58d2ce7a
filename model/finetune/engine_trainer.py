"""The trainer of one engine, if it has slots for adapters."""

from collections.abc import Callable, Sequence
from typing import Any

from model.config import GemmaConfig
from model.finetune.micro_batch import MicroBatches
from model.finetune.trainer import SlicedTrainer
from model.gemma.block import LayerTraits
from model.gemma.weights import GemmaWeights


def engine_trainer(
    config: GemmaConfig,
    weights: GemmaWeights,
    traits: Sequence[LayerTraits],
    programs: dict[str, Callable[..., Any]],
    *,
    max_rank: int,
    is_native: bool,
) -> tuple[MicroBatches | None, SlicedTrainer | None]:
    """What runs micro-batches, and the trainer that chooses them; neither if no rank may be had."""
    if max_rank == 0:
        return None, None
    batches = MicroBatches(
        config, weights, traits, programs, max_rank=max_rank, is_native=is_native
    )
    return batches, SlicedTrainer(config, batches, max_rank=max_rank)
