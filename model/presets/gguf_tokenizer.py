"""The SentencePiece model that llama.cpp's converter took apart, put together again.

A GGUF file stores the pieces of the vocabulary with scores and types, but not how text is
normalised; for every Gemma that is: not at all, save that a space becomes ``▁``.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2

from model.errors import PresetFileInvalid, UnsupportedPreset
from model.presets.gguf_header import GgufHeader

_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"

# Stored as control pieces, which never match in text. Upstream's tokenizer matches them, and
# chats and infills are written with them.
_USER_DEFINED_MARKERS = {
    "<start_of_turn>",
    "<end_of_turn>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|file_separator|>",
}
# Role -> (the piece's name in every Gemma, the key with its id in other vocabularies). The name
# counts more: chat models store <end_of_turn> as their end of sequence.
_ROLES = {
    "pad": ("<pad>", "padding_token_id"),
    "eos": ("<eos>", "eos_token_id"),
    "bos": ("<bos>", "bos_token_id"),
    "unk": ("<unk>", "unknown_token_id"),
}
_MASK = "<mask>"
_BYTE_PIECES = {f"<0x{value:02X}>" for value in range(256)}


class _PieceType(IntEnum):
    """The same numbers in GGUF and in SentencePiece."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def sentencepiece_proto(header: GgufHeader) -> bytes:
    """The serialized SentencePiece BPE model; piece i is token i of the file.

    Checked here: everything that makes SentencePiece refuse a model, so that the error can name
    the file and the token.

    Raises:
        PresetFileInvalid: A key is missing or contradicts another one.
        UnsupportedPreset: The tokenizer is not of the kind that Gemmas have.
    """
    _check_kind(header)
    types = _types(header)
    pieces = _pieces(header, types)
    scores = _per_token(header, "scores", "f", len(pieces))
    if not np.isfinite(scores).all():
        raise _invalid(header, "scores", "must hold finite numbers")
    ids = _role_ids(header, pieces)
    _assign_roles(types, pieces, ids)
    _check_types(header, types, pieces)
    return _serialized(pieces, scores.tolist(), types, ids)


def _serialized(
    pieces: list[str], scores: list[float], types: list[int], ids: dict[str, int]
) -> bytes:
    # Its classes are made at import time, so mypy knows of none.
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    add = proto.pieces.add
    for piece, score, piece_type in zip(pieces, scores, types, strict=True):
        add(piece=piece, score=score, type=piece_type)
    trainer = proto.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = True
    trainer.split_digits = True
    trainer.allow_whitespace_only_pieces = True
    for role, token_id in ids.items():
        setattr(trainer, f"{role}_id", token_id)
        setattr(trainer, f"{role}_piece", pieces[token_id])
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    serialized: bytes = proto.SerializeToString()
    return serialized


def _invalid(header: GgufHeader, name: str, problem: str) -> PresetFileInvalid:
    return PresetFileInvalid(
        f"{header.path}: key '{_PREFIX}{name}' {problem}. Convert the model again."
    )


def _check_kind(header: GgufHeader) -> None:
    kind = header.metadata.get(f"{_PREFIX}model")
    if not isinstance(kind, str):
        raise _invalid(header, "model", "must be there and be a string")
    if kind != "llama":
        raise UnsupportedPreset(
            f"{header.path}: key '{_PREFIX}model' is {kind!r:.80}; a Gemma has a SentencePiece "
            "tokenizer, which GGUF calls 'llama'."
        )
    if header.metadata.get(f"{_PREFIX}add_space_prefix", False) is not False:
        raise UnsupportedPreset(
            f"{header.path}: key '{_PREFIX}add_space_prefix' is set, but a Gemma's tokenizer puts "
            "no space before the text. Convert the model again."
        )


def _per_token(
    header: GgufHeader, name: str, dtype_kinds: str, num_tokens: int | None = None
) -> NDArray[Any]:
    values = header.metadata.get(f"{_PREFIX}{name}")
    if not isinstance(values, np.ndarray) or values.dtype.kind not in dtype_kinds:
        raise _invalid(header, name, "must be there and be an array of numbers")
    if num_tokens is not None and len(values) != num_tokens:
        raise _invalid(header, name, f"has {len(values)} entries for {num_tokens} tokens")
    return values


def _types(header: GgufHeader) -> list[int]:
    types = _per_token(header, "token_type", "iu")
    known = np.isin(types, list(_PieceType))
    if not known.all():
        token_id = int(np.argmin(known))
        raise _invalid(
            header, "token_type", f"gives token {token_id} the unknown type {types[token_id]}"
        )
    numbers: list[int] = types.tolist()
    return numbers


def _pieces(header: GgufHeader, types: list[int]) -> list[str]:
    tokens = header.metadata.get(f"{_PREFIX}tokens")
    if not isinstance(tokens, tuple):
        raise _invalid(header, "tokens", "must be there and be an array of strings")
    if len(tokens) != len(types):
        raise _invalid(header, "token_type", f"has {len(types)} entries for {len(tokens)} tokens")
    # The converter writes user-defined runs of spaces as they look in text; SentencePiece matches
    # pieces after escaping.
    pieces = [
        token.replace(" ", _SPACE) if piece_type == _PieceType.USER_DEFINED else token
        for token, piece_type in zip(tokens, types, strict=True)
    ]
    if len(set(pieces)) != len(pieces) or "" in pieces:
        token_id = _first_repeated(pieces)
        raise _invalid(header, "tokens", f"has an empty or repeated token, number {token_id}")
    # SentencePiece hands user-defined pieces to a C function that stops at a NUL.
    if "\0" in "".join(pieces):
        raise _invalid(header, "tokens", "has a token with a NUL character")
    return pieces


def _first_repeated(pieces: list[str]) -> int:
    seen = {""}
    for token_id, piece in enumerate(pieces):
        if piece in seen:
            return token_id
        seen.add(piece)
    raise AssertionError("called for pieces that are unique")


def _role_ids(header: GgufHeader, pieces: list[str]) -> dict[str, int]:
    names = {name for name, _ in _ROLES.values()}
    ids_by_name = {piece: i for i, piece in enumerate(pieces) if piece in names}
    ids: dict[str, int] = {}
    for role, (name, key) in _ROLES.items():
        token_id = ids_by_name.get(name, header.metadata.get(f"{_PREFIX}{key}"))
        if not isinstance(token_id, int) or not 0 <= token_id < len(pieces):
            raise _invalid(header, key, f"must be there and below {len(pieces)}, without a {name}")
        ids[role] = int(token_id)
    if len(set(ids.values())) != len(ids):
        raise _invalid(header, "tokens", f"gives two of {', '.join(sorted(ids))} the same token")
    return ids


def _assign_roles(types: list[int], pieces: list[str], ids: dict[str, int]) -> None:
    for token_id, piece in enumerate(pieces):
        if piece in _USER_DEFINED_MARKERS:
            types[token_id] = _PieceType.USER_DEFINED
        elif piece == _MASK:
            types[token_id] = _PieceType.CONTROL
    for role, token_id in ids.items():
        types[token_id] = _PieceType.UNKNOWN if role == "unk" else _PieceType.CONTROL


def _check_types(header: GgufHeader, types: list[int], pieces: list[str]) -> None:
    if types.count(_PieceType.UNKNOWN) != 1:
        raise _invalid(header, "token_type", "gives several tokens the type 2, unknown")
    bytes_found = {
        piece
        for piece, piece_type in zip(pieces, types, strict=True)
        if piece_type == _PieceType.BYTE
    }
    if bytes_found != _BYTE_PIECES:
        wrong = min(bytes_found ^ _BYTE_PIECES)
        raise _invalid(
            header,
            "token_type",
            f"must give type 6 to <0x00> to <0xFF> only; {wrong!r:.40} differs",
        )
