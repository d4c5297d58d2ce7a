"""Memory for the logits of the head of scores, which one call hands on to the next.

Those of 48 places are 50 MB for a vocabulary of 262,144 tokens. As a new result of each call they
would be new pages of the system each time, or holes in the heap; so the call gets the memory of an
earlier one, whose logits nobody needs any more::

    take() -> score(..., room) -> HeadOutputs.logits -> give_back()
                                     └ score_gradient(...) ┘
"""

import jax
import jax.numpy as jnp


class LogitsRoom:
    """That of one engine.

    Args:
        num_rows: Places that go through the head together.
        vocabulary_size: Of the model.
    """

    def __init__(self, num_rows: int, vocabulary_size: int) -> None:
        self.shape = (num_rows, vocabulary_size)
        self._kept: list[jax.Array] = []

    def take(self) -> jax.Array:
        """For one call, which takes it over; what it holds means nothing."""
        if self._kept:
            return self._kept.pop()
        # Compiled for the first of them, which is taken when an engine warms up.
        return jnp.zeros(self.shape, jnp.float32)

    def give_back(self, logits: jax.Array) -> None:
        """Logits that nobody looks at any more. Those that are not given back are simply freed."""
        self._kept.append(logits)

    def shrink(self) -> None:
        """Attribution is over, which kept one while scores took another."""
        del self._kept[1:]
