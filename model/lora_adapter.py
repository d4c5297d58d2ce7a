"""A LoRA adapter as it was made: its form, and A and B of every adapted projection.

Two layouts say which heads share what (`model.gemma.keras_lora`; PEFT has one pair for a whole
projection)::

    keras   A per head, one B for all   alpha = rank, so what is added is A · B
    peft    one A for all, B per head   what is added is A · B · alpha / rank
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.adapter_bank import Adapter, of_keras, of_peft
from model.config import GemmaConfig

Layout = Literal["keras", "peft"]
Place = tuple[int, str]
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class LoraForm:
    """What an adapter is made of.

    Attributes:
        layout: Which heads share what.
        rank: Of every pair.
        alpha: What is added is multiplied by alpha / rank; in Keras' layout it is the rank.
        targets: Fields of `model.gemma.weights.BlockWeights`, sorted; the same in every block.
    """

    layout: Layout
    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """An adapter outside a bank.

    Attributes:
        form: What it is made of.
        pairs: (layer, target) -> A and B in its own layout: Keras' shapes, or PEFT's A [R, in] and
            B [out, R].
    """

    form: LoraForm
    pairs: Mapping[Place, Pair]

    def for_bank(self, config: GemmaConfig) -> Adapter:
        """As a bank takes it."""
        if self.form.layout == "keras":
            return of_keras(self.form.rank, self.pairs)
        return of_peft(config, self.form.rank, self.form.alpha / self.form.rank, self.pairs)
