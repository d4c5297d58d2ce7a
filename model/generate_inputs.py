"""What `generate` takes, as batches of rows: texts, rows of ids, or a dataset of either.

"a text"  ["a", "b"]          one batch, through the preprocessor
{"token_ids", "padding_mask"} one batch, as it is, of a model without a preprocessor
anything else to iterate      a dataset: each element is such a batch
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.preprocessor import GemmaCausalLMPreprocessor

_KEYS = {"token_ids", "padding_mask"}


class Prompts(NamedTuple):
    """One batch of padded rows; the mask is True where a token must stay."""

    token_ids: NDArray[Any]
    padding_mask: NDArray[np.bool_]


class GenerateInputs(NamedTuple):
    """Batches, and whether they came from one single string."""

    batches: Iterator[Prompts]
    is_single: bool


def generate_inputs(
    inputs: Any,
    preprocessor: GemmaCausalLMPreprocessor | None,
    *,
    max_length: int | None,
    vocabulary_size: int,
) -> GenerateInputs:
    """The batches of ``inputs``.

    Args:
        inputs: See above.
        preprocessor: Of the model.
        max_length: Total tokens of a row, prompt included; None and 0 mean the preprocessor's
            length. Without a preprocessor rows have the width that they come with.
        vocabulary_size: Ids must be below it.

    Raises:
        ValueError: The message says which row, and what to do.
    """
    if max_length is not None and (isinstance(max_length, bool) or max_length < 0):
        raise ValueError(f"max_length must be at least 1, got {max_length}.")
    is_single = _as_text(inputs) is not None

    def batches() -> Iterator[Prompts]:
        for batch in [inputs] if _is_batch(inputs) else _elements(inputs):
            rows = _rows(batch, preprocessor, max_length or None)
            _check(rows, vocabulary_size)
            yield rows._replace(token_ids=rows.token_ids.astype(np.int32))

    return GenerateInputs(batches(), is_single)


def _rows(
    batch: Any, preprocessor: GemmaCausalLMPreprocessor | None, max_length: int | None
) -> Prompts:
    texts = _as_texts(batch)
    if texts is not None:
        if preprocessor is None:
            raise ValueError(
                "Texts need a preprocessor; this model has none. Pass a dict with token_ids and "
                "padding_mask."
            )
        if not texts:
            raise ValueError("There is no text to generate from: the list is empty.")
        packed = preprocessor.generate_preprocess(texts, sequence_length=max_length)
        return Prompts(packed["token_ids"], packed["padding_mask"])
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"A batch must be texts or a dict of arrays, got {type(batch).__name__}. Put single "
            "rows of a dataset into batches first."
        )
    if preprocessor is not None:
        raise ValueError(
            "This model has a preprocessor, which takes texts. Set model.preprocessor = None to "
            "pass token ids."
        )
    if missing := sorted(_KEYS - batch.keys()):
        raise ValueError(f"The dict needs {' and '.join(missing)}.")
    token_ids, mask = np.asarray(batch["token_ids"]), np.asarray(batch["padding_mask"])
    if token_ids.ndim != 2 or 0 in token_ids.shape or mask.shape != token_ids.shape:
        raise ValueError(
            "token_ids and padding_mask must both be [batch, tokens], not empty; got shapes "
            f"{token_ids.shape} and {mask.shape}."
        )
    if token_ids.dtype.kind not in "iu":
        raise ValueError(f"token_ids must be integers, got {token_ids.dtype}.")
    return Prompts(token_ids, mask.astype(bool))


def _check(rows: Prompts, vocabulary_size: int) -> None:
    outside = (rows.token_ids < 0) | (rows.token_ids >= vocabulary_size)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"Row {row} has the token id {rows.token_ids[row, column]} at column {column}; ids "
            f"must be in [0, {vocabulary_size})."
        )
    empty = np.flatnonzero(~rows.padding_mask.any(axis=1))
    if empty.size:
        raise ValueError(
            f"Row {empty[0]} has no prompt: its padding_mask is False everywhere. A prompt has at "
            "least one token, <bos>."
        )


def _is_batch(inputs: Any) -> bool:
    return isinstance(inputs, Mapping) or _as_texts(inputs) is not None


def _elements(inputs: Any) -> Iterable[Any]:
    """The batches of a dataset; those of tf.data as NumPy arrays."""
    if hasattr(inputs, "as_numpy_iterator"):
        elements: Iterable[Any] = inputs.as_numpy_iterator()
        return elements
    if isinstance(inputs, Iterable):
        return inputs
    raise ValueError(
        "generate takes a string, a list of strings, a dict of arrays, or a dataset of such "
        f"batches; got {type(inputs).__name__}."
    )


def _as_text(value: Any) -> str | None:
    """A single text, from str, bytes or a scalar array of either."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if getattr(value, "ndim", None) == 0 or getattr(value, "shape", None) == ():
        held = value.numpy() if hasattr(value, "numpy") else value
        held = held.item() if hasattr(held, "item") else held
        return _as_text(held) if isinstance(held, (str, bytes)) else None
    return None


def _as_texts(value: Any) -> list[str] | None:
    """The texts of a batch, or None if it holds something else."""
    single = _as_text(value)
    if single is not None:
        return [single]
    is_array = getattr(value, "ndim", None) == 1
    if not is_array and not isinstance(value, (list, tuple)):
        return None
    held = value.numpy() if hasattr(value, "numpy") else value
    texts = [_as_text(text) for text in held]
    return [text for text in texts if text is not None] if None not in texts else None
