"""What every Keras-named sampler shares: its arguments, and the loop that fills a padded batch.

The loop is keras-hub's (spec 4.2). All rows walk together, one column at a time, from ``index`` on:

    column        0    1    2    3    4    5         index starts at 2, the shortest prompt
    row 0        bos   a    .    .    .    .         . is free: mask False, a token is written
    row 1        bos   b    c    d    .    .         2 and 3 are replayed: mask True, kept

It ends at the last column, or when every row has a stop id on a free column. A prompt may be wider
than its ``end``, with columns that are not free, so that one compiled program serves many lengths.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import keras
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from model.samplers.draw import MIN_TEMPERATURE

# (prompt, cache, index) -> (logits [B, V], hidden states [B, D] or None, cache): feeds column
# index − 1 at position index − 1.
Next = Callable[[Array, Any, Array], tuple[Array, Any, Any]]
Variables = tuple[Array, ...]
SamplerClass = TypeVar("SamplerClass", bound="Sampler")


class Start(NamedTuple):
    """What one call was given, as arrays.

    Attributes:
        next: The model's step.
        prompt: Padded rows; the loop fills them.
        cache: Any pytree of arrays whose first axis is the row, or None.
        column: The first one to write.
        end: The column after the last one to write.
        mask: True on columns that keep their token.
        stop_token_ids: None never stops; −1 is no token and may fill the array up.
        hidden_states: Of the prefilled columns, or None.
    """

    next: Next
    prompt: Int[Array, "batch length"]
    cache: Any
    column: Int[Array, ""]
    end: Int[Array, ""]
    mask: Bool[Array, "batch length"]
    stop_token_ids: Int[Array, " stops"] | None
    hidden_states: Float[Array, "batch length width"] | None

    def goes_on(self, column: Int[Array, ""], prompt: Int[Array, "rows length"]) -> Bool[Array, ""]:
        """True while a column is left and some row lacks a stop id of its own.

        ``prompt`` may have several rows for each row of the batch, beside each other. Columns that
        are not written yet are looked at as well, as in keras-hub: never stop at the padding id.
        """
        is_left = column < self.end
        if self.stop_token_ids is None:
            return is_left
        mask = jnp.repeat(self.mask, prompt.shape[0] // self.mask.shape[0], axis=0)
        is_stop = jnp.isin(prompt, self.stop_token_ids.astype(prompt.dtype))
        has_ended = jnp.any(is_stop & ~mask, axis=1)
        return is_left & ~jnp.all(has_ended)


class Progress(NamedTuple):
    """Where a loop stands; all that is needed to go on."""

    column: Int[Array, ""]
    prompt: Int[Array, "batch length"]
    cache: Any
    variables: Variables


class Sampler:
    """Fills the free columns of a batch with tokens that `get_next_token` chooses.

    Subclass it and override that one method for a rule of your own::

        class SecondBest(Sampler):
            def get_next_token(self, probabilities):
                return jnp.argsort(probabilities, axis=-1)[:, -2]

    A `keras.random.SeedGenerator` or `keras.Variable` kept as an attribute takes part in the loop
    and keeps its value over calls.

    Args:
        temperature: Above 0. Logits are divided by it.

    Attributes:
        is_stepwise: Whether a column is final as soon as it is written, so that it can be streamed.

    Raises:
        ValueError: ``temperature`` is not a positive, finite number.
    """

    is_stepwise = True

    def __init__(self, temperature: float = 1.0) -> None:
        if not MIN_TEMPERATURE <= temperature < float("inf"):
            raise ValueError(
                f"temperature must be a finite number above 0, got {temperature}. "
                "For the likeliest token each time, use the sampler 'greedy'."
            )
        self.temperature = temperature

    def get_next_token(self, probabilities: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
        """One token id for each row."""
        raise NotImplementedError(f"{type(self).__name__} must override get_next_token.")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"temperature": self.temperature}

    @classmethod
    def from_config(cls: type[SamplerClass], config: dict[str, Any]) -> SamplerClass:
        """A sampler with the arguments of `get_config`."""
        return cls(**config)

    @property
    def variables(self) -> list[Any]:
        """The Keras variables among the attributes, those of seed generators included."""
        held = (
            value.state if isinstance(value, keras.random.SeedGenerator) else value
            for value in vars(self).values()
        )
        return [value for value in held if isinstance(value, keras.Variable)]

    def compute_probabilities(
        self, logits: Float[Array, "batch vocab"]
    ) -> Float[Array, "batch vocab"]:
        """``softmax(logits / temperature)`` in float32."""
        logits = logits.astype(jnp.float32)
        # The largest goes first: a tiny temperature then makes no infinity out of it.
        largest = jnp.max(logits, axis=-1, keepdims=True)
        return jax.nn.softmax((logits - largest) / self.temperature, axis=-1)

    def __call__(
        self,
        next: Next,
        prompt: ArrayLike,
        cache: Any = None,
        index: int | ArrayLike = 0,
        mask: ArrayLike | None = None,
        stop_token_ids: Sequence[int] | None = None,
        hidden_states: Float[Array, "batch length width"] | None = None,
        model: Any = None,
    ) -> Any:
        """``prompt`` with its free columns filled, from ``index`` on.

        Inside `jax.jit` use `stateless_call`: this one stores the new seed state.

        Args:
            next: ``(prompt, cache, index)`` to ``(logits, hidden_states, cache)``, where the logits
                are those of column ``index``.
            prompt: Token ids [B, T].
            cache: A pytree of arrays whose first axis is the row; handed to ``next``.
            index: The first column to write.
            mask: [B, T]; true columns keep their token. None: every column is free.
            stop_token_ids: Any of them ends its row, on a free column. None or empty: never.
            hidden_states: [B, T, D] of the prompt; contrastive search needs them.
            model: Accepted because keras-hub passes it; ``next`` knows its model.

        Raises:
            RuntimeError: Called inside `jax.jit`, where the new state would be lost.
        """
        before = tuple(variable.value for variable in self.variables)
        prompt = jnp.asarray(prompt)
        start = Start(
            next,
            prompt,
            cache,
            jnp.asarray(index, jnp.int32),
            jnp.int32(prompt.shape[1]),
            jnp.zeros(prompt.shape, bool) if mask is None else jnp.asarray(mask).astype(bool),
            jnp.asarray(stop_token_ids, jnp.int32) if stop_token_ids else None,
            hidden_states,
        )
        result, after = self.run(start, before)
        for variable, old, new in zip(self.variables, before, after, strict=True):
            if isinstance(new, jax.core.Tracer) and not isinstance(old, jax.core.Tracer):
                raise RuntimeError(
                    f"{type(self).__name__} has state that jax.jit would lose: call "
                    "stateless_call(state, ...) inside it and assign the state that it returns."
                )
            variable.assign(new)
        return result

    def stateless_call(
        self, state: Sequence[Array], *args: Any, **kwargs: Any
    ) -> tuple[Any, list[Array]]:
        """What a call returns, and the values that `variables` have after it. Changes nothing.

        Args:
            state: A value for each of `variables`.
            *args: As for a call.
            **kwargs: As for a call.
        """
        variables = self.variables
        with keras.StatelessScope(list(zip(variables, state, strict=True))) as scope:
            result = self(*args, **kwargs)
        return result, [scope.get_current_value(variable) for variable in variables]

    def run(self, start: Start, variables: Variables) -> tuple[Any, Variables]:
        """The loop: what a call returns, and the new values of the variables. Changes nothing."""
        last = self.advance(start, variables)
        return last.prompt, last.variables

    def advance(self, start: Start, variables: Variables) -> Progress:
        """The loop of a stepwise sampler, to where another call can go on."""

        def goes_on(at: Progress) -> Bool[Array, ""]:
            return start.goes_on(at.column, at.prompt)

        def step(at: Progress) -> Progress:
            logits, _, cache = start.next(at.prompt, at.cache, at.column)
            probabilities = self.compute_probabilities(logits)
            tokens, new_variables = self._choose(probabilities, at.variables)
            prompt = write_column(at.prompt, at.column, tokens, start.mask)
            return Progress(at.column + 1, prompt, cache, new_variables)

        first = Progress(start.column, start.prompt, start.cache, variables)
        return jax.lax.while_loop(goes_on, step, first)

    def _choose(
        self, probabilities: Float[Array, "batch vocab"], values: Variables
    ) -> tuple[Int[Array, " batch"], Variables]:
        """A token for each row, with the variables at ``values``, and their values afterwards."""
        variables = self.variables
        with keras.StatelessScope(list(zip(variables, values, strict=True))) as scope:
            tokens = self.get_next_token(probabilities)
        return tokens, tuple(scope.get_current_value(variable) for variable in variables)


def write_column(
    prompt: Int[Array, "rows length"],
    index: Int[Array, ""],
    tokens: Int[Array, " rows"],
    mask: Bool[Array, "rows length"],
) -> Int[Array, "rows length"]:
    """``prompt`` with ``tokens`` in column ``index``, except where the mask protects it."""
    kept = jnp.where(mask[:, index], prompt[:, index], tokens.astype(prompt.dtype))
    return prompt.at[:, index].set(kept)


def repeat_rows(tree: Any, times: int) -> Any:
    """Every array with each of its rows ``times`` times, beside each other."""
    return jax.tree.map(lambda array: jnp.repeat(array, times, axis=0), tree)


def take_rows(tree: Any, rows: Int[Array, " rows"]) -> Any:
    """Every array with these of its rows."""
    return jax.tree.map(lambda array: array[rows], tree)
