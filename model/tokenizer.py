"""Text to token ids and back, as the preset's SentencePiece model says."""

import sentencepiece

from model.errors import PresetFileInvalid

_PAD, _EOS, _BOS = "<pad>", "<eos>", "<bos>"
_START_OF_TURN = "<start_of_turn>"
_END_OF_TURN = "<end_of_turn>"
_WORD_BOUNDARY = "\u2581"


class Tokenizer:
    """A Gemma vocabulary. Special ids are found by name, never assumed.

    Pieces are recognised in text as the file says: user-defined ones such as ``<start_of_turn>``
    are, control ones such as ``<bos>`` are plain characters.

    Args:
        proto: Serialized SentencePiece model.
        stops_at_end_of_turn: Whether ``<end_of_turn>`` ends a completion besides ``<eos>``, as it
            does for Gemma 3.

    Raises:
        PresetFileInvalid: The model cannot be parsed, or lacks a special piece.
    """

    def __init__(self, proto: bytes, *, stops_at_end_of_turn: bool) -> None:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise PresetFileInvalid(
                "The tokenizer is not a SentencePiece model. Restore its file from the source."
            ) from error
        self._processor = processor
        self.vocabulary_size: int = processor.GetPieceSize()
        self.pad_id = self._special_id(_PAD)
        self.eos_id = self._special_id(_EOS)
        self.bos_id = self._special_id(_BOS)
        self.unk_id: int = processor.unk_id()
        self.end_of_turn_id = self._find(_END_OF_TURN)
        self._start_of_turn_id = self._find(_START_OF_TURN)
        self._silent_ids = frozenset((self.pad_id, self.eos_id, self.bos_id))
        self._stops_at_end_of_turn = stops_at_end_of_turn

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """``<eos>``, and ``<end_of_turn>`` where it ends a completion too."""
        if self._stops_at_end_of_turn and self.end_of_turn_id is not None:
            return (self.eos_id, self.end_of_turn_id)
        return (self.eos_id,)

    @property
    def turn_ids(self) -> tuple[int, int] | None:
        """What opens and what closes a turn of a chat, if the vocabulary has both."""
        if self._start_of_turn_id is None or self.end_of_turn_id is None:
            return None
        return self._start_of_turn_id, self.end_of_turn_id

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without bos."""
        ids: list[int] = self._processor.EncodeAsIds(text)
        return ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of a whole row, as SentencePiece has it: control pieces vanish."""
        text: str = self._processor.DecodeIds(token_ids)
        return text

    def piece_id(self, piece: str) -> int:
        """The id of a piece; that of ``<unk>`` for what is none."""
        token_id: int = self._processor.PieceToId(piece)
        return token_id

    def piece(self, token_id: int) -> str:
        """The token as it is written in the vocabulary."""
        piece: str = self._processor.IdToPiece(token_id)
        return piece

    def piece_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text.

        One byte for a byte piece, nothing for pad, bos and eos; every other special piece prints
        as it is written.
        """
        if token_id in self._silent_ids:
            return b""
        piece = self.piece(token_id)
        if self._processor.IsByte(token_id):
            return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
        return piece.replace(_WORD_BOUNDARY, " ").encode()

    def _find(self, piece: str) -> int | None:
        token_id = self.piece_id(piece)
        return token_id if self.piece(token_id) == piece else None

    def _special_id(self, piece: str) -> int:
        token_id = self._find(piece)
        if token_id is None:
            raise PresetFileInvalid(
                f"The tokenizer has no piece {piece}; it is not a Gemma vocabulary."
            )
        return token_id
