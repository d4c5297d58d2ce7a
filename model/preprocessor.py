"""`GemmaCausalLMPreprocessor`: texts to padded rows of ids, labels and weights, and back.

Training: a row of n + 1 tokens becomes n inputs and n labels, one place later::

    text        bos  the  quick  eos  pad          (n = 4)
    token_ids   bos  the  quick  eos
    y                the  quick  eos  pad
    weight            1     1     1    0

Generation: bos and the text, padded; the mask marks what must stay.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.keras_tokenizer import GemmaTokenizer

Rows = dict[str, NDArray[Any]]


class TrainingRows(NamedTuple):
    """Inputs, labels and weights, as `keras.Model.fit` unpacks them."""

    x: Rows
    y: NDArray[np.int32]
    sample_weight: NDArray[np.bool_]


class GemmaCausalLMPreprocessor:
    """Packs texts for a Gemma.

    Args:
        tokenizer: Its vocabulary.
        sequence_length: Tokens of a row, unless a call says otherwise.
        add_start_token: Put ``<bos>`` in front of training rows. Prompts always have it (as in
            keras-hub, spec 3.2).
        add_end_token: Put ``<eos>`` behind training rows.
    """

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        sequence_length: int = 1024,
        add_start_token: bool = True,
        add_end_token: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.add_start_token = add_start_token
        self.add_end_token = add_end_token

    def __call__(
        self,
        x: str | Sequence[str],
        y: Any = None,
        sample_weight: Any = None,
        sequence_length: int | None = None,
    ) -> TrainingRows:
        """Training rows; ``y`` and ``sample_weight`` are made from the text, whatever is passed.

        A single string gives rows without a batch axis.
        """
        length = self._length(sequence_length)
        token_ids, mask = self._pack(
            x, length + 1, add_bos=self.add_start_token, add_eos=self.add_end_token
        )
        return TrainingRows(
            {"token_ids": token_ids[..., :-1], "padding_mask": mask[..., :-1]},
            token_ids[..., 1:],
            mask[..., 1:],
        )

    def generate_preprocess(
        self, x: str | Sequence[str], sequence_length: int | None = None
    ) -> Rows:
        """Prompts, cut to ``sequence_length`` and padded to it."""
        token_ids, mask = self._pack(x, self._length(sequence_length), add_bos=True, add_eos=False)
        return {"token_ids": token_ids, "padding_mask": mask}

    def generate_postprocess(self, x: Mapping[str, Any]) -> str | list[str]:
        """Rows as text: without what the mask hides, and without bos, eos and pad anywhere."""
        token_ids = np.asarray(x["token_ids"])
        mask = np.asarray(x["padding_mask"]).astype(bool)
        if token_ids.ndim == 1:
            return self._text(token_ids, mask)
        return [self._text(row, kept) for row, kept in zip(token_ids, mask, strict=True)]

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "name": "gemma_causal_lm_preprocessor",
            "trainable": True,
            "config_file": "preprocessor.json",
            "sequence_length": self.sequence_length,
            "add_start_token": self.add_start_token,
            "add_end_token": self.add_end_token,
        }

    def _length(self, asked: int | None) -> int:
        length = self.sequence_length if asked is None else asked
        if length < 1:
            raise ValueError(f"sequence_length must be at least 1, got {length}.")
        return length

    def _pack(
        self, x: str | Sequence[str], length: int, *, add_bos: bool, add_eos: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids and mask of [length] for a string, [B, length] for several."""
        texts = [x] if isinstance(x, str) else [str(text) for text in x]
        token_ids = np.full((len(texts), length), self.tokenizer.pad_token_id, np.int32)
        mask = np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            ids = self.tokenizer.tokenize(text).tolist()[: length - add_bos - add_eos]
            ids = [self.tokenizer.start_token_id] * add_bos + ids
            ids += [self.tokenizer.end_token_id] * add_eos
            token_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return (token_ids[0], mask[0]) if isinstance(x, str) else (token_ids, mask)

    def _text(self, token_ids: NDArray[Any], mask: NDArray[np.bool_]) -> str:
        tokenizer = self.tokenizer
        specials = (tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id)
        kept = token_ids[mask & ~np.isin(token_ids, specials)]
        text = tokenizer.detokenize(kept)
        assert isinstance(text, str)
        return text
