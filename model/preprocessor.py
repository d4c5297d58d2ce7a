"""`GemmaCausalLMPreprocessor`: texts to padded rows of ids, labels and weights, and back.

Training: a row of n + 1 tokens becomes n inputs and n labels, one place later::

    text        bos  the  quick  eos  pad          (n = 4)
    token_ids   bos  the  quick  eos
    y                the  quick  eos  pad
    weight            1     1     1    0

Pairs of prompt and response are one row, of which only the response has weight. Generation: bos and
the text, padded; the mask marks what must stay.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.errors import PresetFileMissing
from model.keras_tokenizer import GemmaTokenizer
from model.preset_source import PresetSource, open_source
from model.presets.keras_json import Preprocessing

Rows = dict[str, NDArray[Any]]
# A text, several, or {"prompts": …, "responses": …}.
Texts = str | Sequence[str] | Mapping[str, Any]


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

    @classmethod
    def from_preset(cls, preset: str, **arguments: Any) -> "GemmaCausalLMPreprocessor":
        """The preprocessor of a preset, which is downloaded whole if it is not here.

        Args:
            preset: As for `GemmaBackbone.from_preset`.
            **arguments: Of the constructor, in place of the preset's own.

        Raises:
            PresetFileMissing: The preset has no tokenizer.
            PresetError: There is no such preset, or it cannot be had or read.
        """
        preprocessor = cls.from_source(open_source(preset, load_weights=True), **arguments)
        if preprocessor is None:
            raise PresetFileMissing(f"The preset {preset!r:.200} has no tokenizer.")
        return preprocessor

    @classmethod
    def from_source(
        cls, source: PresetSource, **arguments: Any
    ) -> "GemmaCausalLMPreprocessor | None":
        """The preprocessor of a preset that is open; None if it has no tokenizer."""
        proto = source.tokenizer_proto()
        if proto is None:
            return None
        own = dataclasses.asdict(source.preprocessing)
        return cls(**{"tokenizer": GemmaTokenizer(proto), **own, **arguments})

    @property
    def preprocessing(self) -> Preprocessing:
        """How it packs, as a preset states it."""
        return Preprocessing(self.sequence_length, self.add_start_token, self.add_end_token)

    def __call__(
        self,
        x: Texts,
        y: Any = None,
        sample_weight: Any = None,
        sequence_length: int | None = None,
    ) -> TrainingRows:
        """Training rows; ``y`` and ``sample_weight`` are made from the text, whatever is passed.

        Args:
            x: A text, which gives rows without a batch axis; several texts; or pairs, as
                ``{"prompts": …, "responses": …}``, a text or several each. Of a pair that is too
                long both ends are cut: the two get places in turn, as in keras-hub.
            y: Ignored.
            sample_weight: Ignored.
            sequence_length: In place of the preprocessor's own.

        Raises:
            ValueError: Not as many responses as prompts.
        """
        prompts, responses = _pairs(x)
        is_single = isinstance(prompts, str)
        length = self._length(sequence_length) + 1
        room = length - self.add_start_token - self.add_end_token
        rows, num_prompt_tokens = [], []
        for number, prompt in enumerate(_as_list(prompts)):
            prompt_ids = self._ids(prompt)
            response_ids = [] if responses is None else self._ids(_as_list(responses)[number])
            kept = _places_of_prompt(len(prompt_ids), len(response_ids), max(room, 0))
            rows.append(prompt_ids[:kept] + response_ids[: max(room - kept, 0)])
            num_prompt_tokens.append(0 if responses is None else kept + self.add_start_token)
        token_ids, mask = self._packed(
            rows, length, add_bos=self.add_start_token, add_eos=self.add_end_token
        )
        weight = mask & (np.arange(length) >= np.array(num_prompt_tokens)[:, None])
        columns = (0,) if is_single else (slice(None),)
        return TrainingRows(
            {
                "token_ids": token_ids[..., :-1][columns],
                "padding_mask": mask[..., :-1][columns],
            },
            token_ids[..., 1:][columns],
            weight[..., 1:][columns],
        )

    def generate_preprocess(self, x: Texts, sequence_length: int | None = None) -> Rows:
        """Prompts, cut to ``sequence_length`` and padded to it; of pairs the prompts alone."""
        prompts, _ = _pairs(x)
        length = self._length(sequence_length)
        rows = [self._ids(prompt)[: length - 1] for prompt in _as_list(prompts)]
        token_ids, mask = self._packed(rows, length, add_bos=True, add_eos=False)
        if isinstance(prompts, str):
            token_ids, mask = token_ids[0], mask[0]
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

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.tokenize(text).tolist()
        return ids

    def _packed(
        self, rows: Sequence[list[int]], length: int, *, add_bos: bool, add_eos: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids and mask [B, length] of rows that fit with their specials."""
        tokenizer = self.tokenizer
        token_ids = np.full((len(rows), length), tokenizer.pad_token_id, np.int32)
        mask = np.zeros((len(rows), length), bool)
        for row, text_ids in enumerate(rows):
            ids = [tokenizer.start_token_id] * add_bos + text_ids
            ids += [tokenizer.end_token_id] * add_eos
            token_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return token_ids, mask

    def _text(self, token_ids: NDArray[Any], mask: NDArray[np.bool_]) -> str:
        tokenizer = self.tokenizer
        specials = (tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id)
        kept = token_ids[mask & ~np.isin(token_ids, specials)]
        text = tokenizer.detokenize(kept)
        assert isinstance(text, str)
        return text


def _pairs(x: Texts) -> tuple[str | list[str], str | list[str] | None]:
    """Prompts and responses; plain texts have no responses."""
    if not isinstance(x, Mapping):
        return x if isinstance(x, str) else [str(text) for text in x], None
    if x.keys() != {"prompts", "responses"}:
        raise ValueError(f'Pairs are {{"prompts": …, "responses": …}}; got {sorted(x)!r:.80}.')
    (prompts, _), (responses, _) = _pairs(x["prompts"]), _pairs(x["responses"])
    if len(_as_list(prompts)) != len(_as_list(responses)):
        raise ValueError(
            f"There are {len(_as_list(prompts))} prompts and {len(_as_list(responses))} responses."
        )
    return prompts, responses


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _places_of_prompt(num_prompt: int, num_response: int, room: int) -> int:
    """Tokens of the prompt in ``room`` places that prompt and response take in turn."""
    if num_prompt + num_response <= room:
        return num_prompt
    half = (room + 1) // 2
    return min(num_prompt, max(half, room - num_response))
