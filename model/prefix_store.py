"""Blocks of prompts that were prefilled, for later prompts that begin with the same tokens.

Bounded in bytes; what was not used for longest goes first. A key stands for everything that made
the block: its tokens, all tokens before them, and who may know of them. The store never looks into
it.

Whether a block is finite the device may not have told yet when the block is added, so it is asked
when the block is looked for. One that is not is forgotten.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Array, Bool

from model.slot_blocks import KeptBlock


class _Entry(NamedTuple):
    block: KeptBlock
    is_finite: Bool[Array, ""]


class PrefixStore:
    """Blocks by key.

    Args:
        max_bytes: Of all blocks together.
        block_bytes: Of one; all are alike.
    """

    def __init__(self, max_bytes: int, block_bytes: int) -> None:
        self.max_blocks = max_bytes // block_bytes
        self._blocks: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def wants(self, key: bytes) -> bool:
        """Whether a block under this key would be kept and is not there yet."""
        return self.max_blocks > 0 and key not in self._blocks

    def add(self, keys: Sequence[bytes], block: KeptBlock, is_finite: Bool[Array, ""]) -> None:
        """Keeps a block that it `wants`, under the last of ``keys``.

        The others are those of the blocks before it. They stay longer: without them it is of no
        use.
        """
        self._blocks[keys[-1]] = _Entry(block, is_finite)
        self._touch(keys[:-1])
        while len(self._blocks) > self.max_blocks:
            self._blocks.popitem(last=False)

    def leading(self, keys: Sequence[bytes]) -> list[KeptBlock]:
        """The blocks under the first keys, up to the first that is not there or not finite."""
        found = []
        for key in keys:
            entry = self._blocks.get(key)
            if entry is None:
                break
            if not entry.is_finite:
                del self._blocks[key]
                break
            found.append(entry.block)
        self._touch(keys[: len(found)])
        return found

    def _touch(self, keys: Sequence[bytes]) -> None:
        """The first is the last to go."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)
