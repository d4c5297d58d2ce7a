"""What clients ask for: prompts of random token ids, the same ones for the same seed.

Each measurement has a generator of its own, seeded with its name as well, so that no prompt of one
is in the prefix cache because of another.
"""

import math
import random
from collections.abc import Callable

from bench.streams import Ask

_BOS = 2
# Ordinary tokens: special ones have lower ids, pictures higher ones.
_FIRST_ID, _LAST_ID = 1_000, 200_000
PREFIX_TOKENS = 1_280

Generator = random.Random


def prompt(generator: Generator, num_tokens: int) -> tuple[int, ...]:
    """``<bos>`` and random ids, ``num_tokens`` in all."""
    return (_BOS, *(generator.randint(_FIRST_ID, _LAST_ID) for _ in range(num_tokens - 1)))


def short(generator: Generator, count: int) -> list[Ask]:
    """Chat as its shortest: 16 tokens in, 32 out."""
    return [Ask(prompt(generator, 16), 32) for _ in range(count)]


def mixed(generator: Generator, count: int) -> list[Ask]:
    """Short prompts are frequent and long ones rare: 16 to 1,024 tokens in, 8 to 64 out."""

    def length() -> int:
        return round(math.exp(generator.uniform(math.log(16), math.log(1024))))

    return [Ask(prompt(generator, length()), generator.randint(8, 64)) for _ in range(count)]


def shared_prefix(generator: Generator, count: int) -> list[Ask]:
    """One of two prefixes of 1,280 tokens and 16 tokens of its own in, 32 out."""
    prefixes = [prompt(generator, PREFIX_TOKENS) for _ in range(2)]
    return [Ask(generator.choice(prefixes) + prompt(generator, 16)[1:], 32) for _ in range(count)]


MIXES: dict[str, Callable[[Generator, int], list[Ask]]] = {
    "short": short,
    "mixed": mixed,
    "shared prefix": shared_prefix,
}
