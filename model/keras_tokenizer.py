"""`GemmaTokenizer`: the vocabulary as Keras users know it.

The service's own view of a vocabulary is `model.tokenizer`; this one adds what the Keras interface
promises: batches, padding to a length, and detokenising of whole rows.
"""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import PresetFileInvalid, PresetFileMissing
from model.preset_source import open_source
from model.tokenizer import Tokenizer

# keras-hub takes longer strings for base64 and shorter ones for paths.
_LONGEST_PATH = 2048
_INTEGER_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


class GemmaTokenizer:
    """Text to ids and back, with a SentencePiece model.

    Args:
        proto: Path of the model, its bytes, or its bytes in base64.
        sequence_length: Length to which rows are cut and padded; None leaves them as they are.
        dtype: An integer type, or "string" for the pieces themselves.
        add_bos: Put ``<bos>`` in front of every row.
        add_eos: Put ``<eos>`` behind every row.

    Raises:
        ValueError: ``dtype`` is neither an integer type nor "string".
        PresetFileMissing: No file at that path.
        PresetFileInvalid: Not a SentencePiece model, or without a special piece.
    """

    start_token = "<bos>"
    end_token = "<eos>"
    pad_token = "<pad>"

    def __init__(
        self,
        proto: str | bytes | Path,
        sequence_length: int | None = None,
        dtype: str = "int32",
        add_bos: bool = False,
        add_eos: bool = False,
    ) -> None:
        if dtype != "string" and dtype not in _INTEGER_TYPES:
            raise ValueError(
                f"dtype must be 'string' or one of {', '.join(_INTEGER_TYPES)}, got {dtype!r}."
            )
        self.proto = _read_proto(proto)
        self.sequence_length = sequence_length
        self.dtype = dtype
        self.add_bos = add_bos
        self.add_eos = add_eos
        self._vocabulary = Tokenizer(self.proto, stops_at_end_of_turn=False)
        self.start_token_id = self._vocabulary.bos_id
        self.end_token_id = self._vocabulary.eos_id
        self.pad_token_id = self._vocabulary.pad_id

    @classmethod
    def from_preset(cls, preset: str, **arguments: Any) -> "GemmaTokenizer":
        """The tokenizer of a preset, which is downloaded whole if it is not here.

        Args:
            preset: As for `GemmaBackbone.from_preset`.
            **arguments: Of the constructor.

        Raises:
            PresetFileMissing: The preset has no tokenizer.
            PresetError: There is no such preset, or it cannot be had or read.
        """
        proto = open_source(preset, load_weights=True).tokenizer_proto()
        if proto is None:
            raise PresetFileMissing(f"The preset {preset!r:.200} has no tokenizer.")
        return cls(proto, **arguments)

    def __call__(self, inputs: Any) -> Any:
        """`tokenize`."""
        return self.tokenize(inputs)

    def tokenize(self, inputs: str | Sequence[str]) -> Any:
        """A string as a 1-D array; several as a list of lists, or [B, sequence_length] if set."""
        if isinstance(inputs, str):
            row = self._row(inputs)
            return np.asarray(row) if self.dtype == "string" else np.asarray(row, self.dtype)
        rows = [self._row(text) for text in inputs]
        if self.sequence_length is None:
            return rows
        return np.asarray(rows) if self.dtype == "string" else np.asarray(rows, self.dtype)

    def detokenize(self, inputs: Any) -> str | list[str]:
        """Ids of one row, or of several, as text; control pieces vanish.

        Raises:
            ValueError: An id is not in the vocabulary.
        """
        rows = inputs.tolist() if hasattr(inputs, "tolist") else inputs
        if isinstance(rows, int):
            return self._text([rows])
        # Rows may differ in length, so an array of them is no way to find out.
        if rows and all(isinstance(row, Sequence) or np.ndim(row) == 1 for row in rows):
            return [self._text(row) for row in rows]
        return self._text(rows)

    def token_to_id(self, token: str) -> int:
        """The id of a piece; that of ``<unk>`` for what is none."""
        return self._vocabulary.piece_id(token)

    def id_to_token(self, id: int) -> str:
        """The piece with an id.

        Raises:
            ValueError: No piece has it.
        """
        self._check([id])
        return self._vocabulary.piece(id)

    def piece_bytes(self, id: int) -> bytes:
        """The bytes that a token adds to what `detokenize` returns."""
        if id == self._vocabulary.unk_id:
            return self._vocabulary.decode([id]).encode()
        return self._vocabulary.piece_bytes(id)

    def vocabulary_size(self) -> int:
        return self._vocabulary.vocabulary_size

    def get_vocabulary(self) -> list[str]:
        """Every piece, in the order of the ids."""
        return [self._vocabulary.piece(id_) for id_ in range(self.vocabulary_size())]

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments but for ``proto``, which is stored as an asset."""
        return {
            "name": "gemma_tokenizer",
            "trainable": True,
            "dtype": self.dtype,
            "config_file": "tokenizer.json",
            "proto": None,
            "sequence_length": self.sequence_length,
            "add_bos": self.add_bos,
            "add_eos": self.add_eos,
        }

    def _row(self, text: str) -> list[Any]:
        ids = self._vocabulary.encode(text)
        if self.add_bos:
            ids = [self.start_token_id, *ids]
        if self.add_eos:
            ids = [*ids, self.end_token_id]
        if self.sequence_length is not None:
            ids = ids[: self.sequence_length]
            ids += [self.pad_token_id] * (self.sequence_length - len(ids))
        if self.dtype == "string":
            return [self._vocabulary.piece(id_) for id_ in ids]
        return ids

    def _text(self, ids: Sequence[Any]) -> str:
        plain = [int(id_) for id_ in ids]
        self._check(plain)
        return self._vocabulary.decode(plain)

    def _check(self, ids: Sequence[int]) -> None:
        size = self.vocabulary_size()
        for id_ in ids:
            if not 0 <= id_ < size:
                raise ValueError(f"Token id {id_} is not in [0, {size}).")


def _read_proto(proto: str | bytes | Path) -> bytes:
    if isinstance(proto, bytes):
        return proto
    if isinstance(proto, str) and len(proto) > _LONGEST_PATH:
        try:
            return base64.b64decode(proto, validate=True)
        except binascii.Error as error:
            raise PresetFileInvalid(
                "proto is longer than a path and not base64. Pass a path or the model's bytes."
            ) from error
    path = Path(proto)
    if not path.is_file():
        raise PresetFileMissing(f"There is no tokenizer file {str(path)!r:.200}.")
    return path.read_bytes()
