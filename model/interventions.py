"""Changes of the residual stream that a request asks for, as arrays and pure functions.

Which token is changed, and how, are numbers: so tokens of many requests share one call, and no
value compiles anything. A token that no intervention is about comes out as it went in, to the last
bit, and so does one to which nothing is added. Each token is computed by itself.

`intervene` is for tokens that lie one behind the other, as in a chunk, and has a gradient by ``x``;
`intervene_rows` is for rows of a decode step. Both do `_change` to each of up to four stages.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from model.intervention_slots import MAX_INTERVENTIONS, Intervention, Operation, Touch

# Vectors that one call of `intervene` may use, of any number of requests.
MAX_VECTORS = 16
_CODES: dict[Operation, int] = {"add": 1, "scale": 2, "zero": 3, "set": 4, "project_out": 5}
_NOTHING = 0


class TokenInterventions(NamedTuple):
    """What is done to each token, stage by stage; an operation of 0 does nothing.

    Attributes:
        operations: `code_of` each.
        scales: Of each.
        vector_ids: Rows of ``vectors``.
        vectors: Of length 1 where they are projected out.
    """

    operations: Int[Array, "stages tokens"]
    scales: Float[Array, "stages tokens"]
    vector_ids: Int[Array, "stages tokens"]
    vectors: Float[Array, "vectors width"]


class RowInterventions(NamedTuple):
    """The same for rows of a step, at all layers.

    ``layers`` holds, for −1 and every block, whether a stage acts there.
    """

    operations: Int[Array, "rows stages"]
    scales: Float[Array, "rows stages"]
    vectors: Float[Array, "rows stages width"]
    layers: Bool[Array, "rows stages layers"]


class DrawingInterventions(NamedTuple):
    """Those of rows that draw, at all steps.

    Attributes:
        rows: At all steps together.
        at_prompt_end: Stages that act on the last token of the prompt,
        at_completion: and on those that were drawn.
    """

    rows: RowInterventions
    at_prompt_end: Bool[Array, "rows stages"]
    at_completion: Bool[Array, "rows stages"]

    def at(
        self, positions: Int[Array, " rows"], num_prompt: Int[Array, " rows"]
    ) -> RowInterventions:
        """Those of one step, of whose rows the newest tokens have these positions."""
        is_drawn = (positions >= num_prompt)[:, None]
        acts = jnp.where(is_drawn, self.at_completion, self.at_prompt_end)
        return self.rows._replace(layers=self.rows.layers & acts[:, :, None])


def intervene(
    x: Float[Array, "tokens width"], changes: TokenInterventions
) -> Float[Array, "tokens width"]:
    """The residual stream of tokens after the interventions of one layer."""
    for stage in range(changes.operations.shape[0]):
        operations = changes.operations[stage]
        x = jax.lax.cond(
            jnp.any(operations != _NOTHING),
            lambda x, stage=stage, operations=operations: _change(
                x,
                operations,
                changes.scales[stage],
                changes.vectors[changes.vector_ids[stage]],
            ),
            lambda x: x,
            x,
        )
    return x


def intervene_rows(
    x: Float[Array, "rows 1 width"], changes: RowInterventions, layer: int, num_padded: int
) -> Float[Array, "rows 1 width"]:
    """The residual stream of one token of each row, after the interventions of ``layer`` (static).

    ``x`` may have more rows than ``changes``; those are left alone. If nobody wants anything here,
    that costs one condition. What is computed is computed for ``num_padded`` rows, however many
    there are: see `model.gemma.padded_rows`.
    """
    is_due = changes.layers[:, :, layer + 1]

    def change(x: Float[Array, "rows 1 width"]) -> Float[Array, "rows 1 width"]:
        missing = num_padded - is_due.shape[0]
        operations = _padded(jnp.where(is_due, changes.operations, _NOTHING), missing)
        scales, vectors = _padded(changes.scales, missing), _padded(changes.vectors, missing)
        flat = _padded(x[:, 0], num_padded - x.shape[0])
        for stage in range(operations.shape[1]):
            flat = _change(flat, operations[:, stage], scales[:, stage], vectors[:, stage])
        return flat[: x.shape[0], None]

    # XLA would move what stands before and behind into the branches, and fuse it there.
    x = jax.lax.optimization_barrier(x)
    changed = jax.lax.cond(jnp.any(is_due), change, lambda x: x, x)
    barred: Array = jax.lax.optimization_barrier(changed)
    return barred


def _padded(x: Array, missing: int) -> Array:
    return jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))


def _change(
    x: Float[Array, "tokens width"],
    operations: Int[Array, " tokens"],
    scales: Float[Array, " tokens"],
    vectors: Float[Array, "tokens width"],
) -> Float[Array, "tokens width"]:
    """One operation on each token."""
    # What is chosen for one token must not be fused with what another one needs.
    x, vectors = jax.lax.optimization_barrier((x, vectors.astype(x.dtype)))
    scale = scales.astype(x.dtype)[:, None]
    offset = scale * vectors
    along = jnp.sum(x * vectors, axis=-1, keepdims=True)
    results: dict[Operation, Array] = {
        # −0 + 0 would be 0.
        "add": jnp.where(offset == 0, x, x + offset),
        "scale": scale * x,
        "zero": jnp.zeros_like(x),
        "set": vectors,
        "project_out": x - along * vectors,
    }
    changed = x
    for operation, result in results.items():
        is_due = jnp.equal(operations, code_of(operation))[:, None]
        changed = jnp.where(is_due, result, changed)
    barred: Array = jax.lax.optimization_barrier(changed)
    return barred


def code_of(operation: Operation) -> int:
    """The number that stands for an operation in arrays."""
    return _CODES[operation]


def vector_of(intervention: Intervention, width: int) -> np.ndarray:
    """Its vector, of length 1 if it is projected out; zeros if it has none."""
    if not intervention.vector:
        return np.zeros(width, np.float32)
    vector = np.frombuffer(intervention.vector, "<f4")
    if vector.shape != (width,):
        raise ValueError(f"A vector has {len(vector)} numbers; the residual stream has {width}.")
    if intervention.operation == "project_out":
        exact = vector.astype(np.float64)
        # By the largest number first: a square of it might not be finite.
        exact /= np.abs(exact).max()
        vector = (exact / np.linalg.norm(exact)).astype(np.float32)
    return vector


def token_interventions(
    touches: Sequence[Sequence[Touch]], layer: int, num_tokens: int, width: int
) -> list[TokenInterventions]:
    """What `intervene` is to be called with at ``layer``, once after another; nothing if empty.

    Args:
        touches: Of each request, in order; places are those among all tokens.
        layer: −1 to the last.
        num_tokens: Of the chunk.
        width: Of the residual stream.
    """
    calls: list[list[list[Touch]]] = []
    num_vectors = MAX_VECTORS
    for of_request in touches:
        here = [touch for touch in of_request if layer in touch.intervention.layers]
        assert len(here) <= MAX_INTERVENTIONS, "admission bounds the interventions"
        if not here:
            continue
        if num_vectors + len(here) > MAX_VECTORS:
            calls.append([])
            num_vectors = 0
        calls[-1].append(here)
        num_vectors += len(here)
    return [_token_arrays(requests, num_tokens, width) for requests in calls]


def no_interventions(num_tokens: int, width: int) -> TokenInterventions:
    """An argument that changes nothing."""
    return _token_arrays([], num_tokens, width)


def _token_arrays(
    requests: Sequence[Sequence[Touch]], num_tokens: int, width: int
) -> TokenInterventions:
    """Each touch of a request is a stage of its own, and has a vector of its own."""
    shape = (MAX_INTERVENTIONS, num_tokens)
    operations = np.zeros(shape, np.int32)
    scales = np.zeros(shape, np.float32)
    vector_ids = np.zeros(shape, np.int32)
    vectors = np.zeros((MAX_VECTORS, width), np.float32)
    num_vectors = 0
    for touches in requests:
        for stage, touch in enumerate(touches):
            places = list(touch.places)
            operations[stage, places] = code_of(touch.intervention.operation)
            scales[stage, places] = touch.intervention.scale
            vector_ids[stage, places] = num_vectors
            vectors[num_vectors] = vector_of(touch.intervention, width)
            num_vectors += 1
    return TokenInterventions(*map(jnp.asarray, (operations, scales, vector_ids, vectors)))
