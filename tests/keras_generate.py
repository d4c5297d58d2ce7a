"""What keras-hub's greedy ``generate`` does to a padded batch, on one of our engines.

keras-hub walks all rows together from the shortest prompt on, keeps prompt tokens where there are
some, writes drawn tokens elsewhere, and goes on with rows that have stopped until every row has
(spec 2.3). An engine knows nothing of that, so the goldens are compared through this walk.
"""

from collections.abc import Sequence

import numpy as np

from model.slots import DecodeRow, Engine, PromptChunk, RowRules, Sampling

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)


def generate(
    engine: Engine, token_ids: np.ndarray, mask: np.ndarray, stop_ids: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and padding mask as keras-hub returns them; row b uses slot b."""
    rows = np.array(token_ids, np.int32)
    is_prompt = np.array(mask, bool)
    start = int(is_prompt.sum(axis=1).min())
    for slot, row in enumerate(rows):
        if start > 1:
            for _ in engine.prefill([PromptChunk(slot, row[: start - 1].tolist(), 0)]):
                pass
    for column in range(start, rows.shape[1]):
        rules = RowRules(GREEDY, num_prompt=column, end=column + 1)
        for slot, row in enumerate(rows):
            engine.begin(slot, row[:column].tolist())
        step = [DecodeRow(slot, column - 1, rules) for slot in range(len(rows))]
        drawn = [token.token_id for (token,) in engine.decode(step, 1).tokens()]
        rows[:, column] = np.where(is_prompt[:, column], rows[:, column], drawn)
        if stop_ids is not None and _ends(rows, is_prompt, stop_ids).any(axis=1).all():
            break
    if stop_ids is None:
        return rows, np.ones_like(is_prompt)
    ends = _ends(rows, is_prompt, stop_ids)
    ended_before = np.cumsum(ends, axis=1) - ends
    return rows, ended_before == 0


def _ends(rows: np.ndarray, is_prompt: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    return np.isin(rows, list(stop_ids)) & ~is_prompt
