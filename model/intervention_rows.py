"""What rows of a step want changed, as arrays; made once for rows that stay together.

Rows that want nothing, which are almost all, share arrays that stay on the device.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from model.intervention_slots import MAX_INTERVENTIONS, Intervention, StepIntervention
from model.interventions import DrawingInterventions, RowInterventions, code_of, vector_of

# Of each row, in their order.
_Wanted = tuple[tuple[Intervention, ...], ...]


class InterventionArrays:
    """Makes arrays, and keeps the newest of each number of rows, and those of none.

    Args:
        num_layers: Of the model.
        hidden_dim: Of its residual stream.
    """

    def __init__(self, num_layers: int, hidden_dim: int) -> None:
        self._num_layers = num_layers
        self._hidden_dim = hidden_dim
        self._none: dict[int, DrawingInterventions] = {}
        self._newest: dict[int, tuple[list[tuple[StepIntervention, ...]], DrawingInterventions]]
        self._newest = {}
        self._newest_rows: dict[int, tuple[_Wanted, RowInterventions]] = {}

    def none(self, num_rows: int) -> DrawingInterventions:
        """For rows that want nothing."""
        if num_rows not in self._none:
            self._none[num_rows] = self._drawing([], num_rows)
        return self._none[num_rows]

    def of_drawing(
        self, wanted: Sequence[tuple[StepIntervention, ...]], num_rows: int
    ) -> DrawingInterventions:
        """What rows want that draw, with fillers behind them, ``num_rows`` in all."""
        if not any(wanted):
            return self.none(num_rows)
        kept = self._newest.get(num_rows)
        if kept is None or not _are_the_same(kept[0], wanted):
            kept = self._newest[num_rows] = [*wanted], self._drawing(wanted, num_rows)
        return kept[1]

    def of_rows(self, interventions: tuple[Intervention, ...], num_rows: int) -> RowInterventions:
        """What all rows of a search want at one step."""
        if not interventions:
            return self.none(num_rows).rows
        wanted = (interventions,) * num_rows
        kept = self._newest_rows.get(num_rows)
        if kept is None or kept[0] != wanted:
            kept = self._newest_rows[num_rows] = wanted, self._rows(wanted, num_rows)
        return kept[1]

    def _drawing(
        self, wanted: Sequence[tuple[StepIntervention, ...]], num_rows: int
    ) -> DrawingInterventions:
        at_prompt_end = np.zeros((num_rows, MAX_INTERVENTIONS), bool)
        at_completion = np.zeros((num_rows, MAX_INTERVENTIONS), bool)
        for row, of_row in enumerate(wanted):
            at_prompt_end[row, : len(of_row)] = [each.at_prompt_end for each in of_row]
            at_completion[row, : len(of_row)] = [each.at_completion for each in of_row]
        changes = tuple(tuple(each.intervention for each in of_row) for of_row in wanted)
        return DrawingInterventions(
            self._rows(changes, num_rows), jnp.asarray(at_prompt_end), jnp.asarray(at_completion)
        )

    def _rows(self, wanted: _Wanted, num_rows: int) -> RowInterventions:
        shape = (num_rows, MAX_INTERVENTIONS)
        operations = np.zeros(shape, np.int32)
        scales = np.zeros(shape, np.float32)
        vectors = np.zeros((*shape, self._hidden_dim), np.float32)
        layers = np.zeros((*shape, self._num_layers + 1), bool)
        for row, of_row in enumerate(wanted):
            for stage, each in enumerate(of_row):
                operations[row, stage] = code_of(each.operation)
                scales[row, stage] = each.scale
                vectors[row, stage] = vector_of(each, self._hidden_dim)
                layers[row, stage, [layer + 1 for layer in each.layers]] = True
        return RowInterventions(*map(jnp.asarray, (operations, scales, vectors, layers)))


def _are_the_same(
    one: Sequence[tuple[StepIntervention, ...]], other: Sequence[tuple[StepIntervention, ...]]
) -> bool:
    """Compared as objects: an output hands in the same ones at every step."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
