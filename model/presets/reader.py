"""What every reader of a preset offers, whatever the container format."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from model.config import GemmaConfig


# Checkable because the tests execute every annotation.
@runtime_checkable
class PresetReader(Protocol):
    """A preset whose config is known and whose weights are still on disk.

    Making one reads headers only, so that a preset converted earlier is served without its
    source weights being read again.
    """

    @property
    def config(self) -> GemmaConfig: ...

    @property
    def source_files(self) -> tuple[Path, ...]:
        """Every file that decides the model or the tokenizer, always in the same order."""
        ...

    def tokenizer_proto(self) -> bytes | None:
        """The SentencePiece model, with `GemmaConfig.vocabulary_size` pieces.

        None for a preset of a backbone alone.
        """
        ...

    def arrays(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Name and C-contiguous run-time array, in the order of `weight_specs`."""
        ...
