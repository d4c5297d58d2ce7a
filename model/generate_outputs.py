"""Generated rows, as keras-hub's `generate` returns them: masks, prompts cut, batches joined."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def until_stop(
    token_ids: NDArray[Any], is_prompt: NDArray[np.bool_], stops: Sequence[int]
) -> NDArray[np.bool_]:
    """True up to and including the first stop of each row that is not of its prompt."""
    ends = np.isin(token_ids, stops) & ~is_prompt
    return np.cumsum(ends, axis=-1) - ends == 0


def without_prompt(
    token_ids: NDArray[Any], mask: NDArray[np.bool_], is_prompt: NDArray[np.bool_]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Each row turned left by the length of its prompt, whose tokens the mask then hides."""
    length = token_ids.shape[-1]
    num_prompt = is_prompt.sum(axis=-1, keepdims=True)
    columns = (np.arange(length) + num_prompt) % length
    turned, kept, was_prompt = (
        np.take_along_axis(array, columns, axis=-1) for array in (token_ids, mask, is_prompt)
    )
    return turned, kept ^ was_prompt


def concatenated(outputs: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    widths = {output["token_ids"].shape[-1] for output in outputs}
    if len(widths) > 1:
        raise ValueError(
            f"The batches have rows of {', '.join(map(str, sorted(widths)))} tokens, which cannot "
            "be joined. Pad them to one length, or generate them one by one."
        )
    return {key: np.concatenate([output[key] for output in outputs]) for key in outputs[0]}
