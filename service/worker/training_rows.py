"""Rows of a job as token ids, and which of these are learned.

::

    text                 bos text eos                    all but bos
    prompt, completion   bos prompt | completion eos     the completion, and eos
    messages             a chat (`model.chat`)           what the model said, with the ends of turns
    ids                  as they are                     all but the first, or what the mask says

A prompt and its completion are tokenised apart, as they are when the prompt is sent alone later.
"""

from model.chat import Message, chat_tokens
from model.errors import RequestInvalid
from model.slots import EngineInfo, TextCodec
from model.training import MAX_ROW_TOKENS, TrainingRow
from service.protocol.training import ChatRow, IdsRow, PromptRow, Row, TextRow

# Of a text that is encoded at once before it is known whether it is far too long.
PIECE_CHARACTERS = 64 * 1024
_NO_TOKENIZER = "This preset has no tokenizer; send token ids."


class InvalidRow(Exception):
    """A row that cannot be learned, and where in it that is: ``/completion``."""

    def __init__(self, detail: str, pointer: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer


class RowReader:
    """Reads rows of one job.

    Args:
        info: Of the engine.
        codec: Of the engine.
        max_length: Tokens that a row may have; never more than a slot holds, or a trainer takes.
    """

    def __init__(self, info: EngineInfo, codec: TextCodec, max_length: int) -> None:
        self._vocabulary_size = info.vocabulary_size
        self._codec = codec
        self._max_length = min(max_length, info.context_tokens, MAX_ROW_TOKENS)

    def read(self, row: Row) -> TrainingRow:
        """A row, ready to be learned.

        Raises:
            InvalidRow: It is empty, too long, has nothing to learn or an id that does not exist.
        """
        match row:
            case TextRow():
                read = self._text(row)
            case PromptRow():
                read = self._prompt(row)
            case ChatRow():
                read = self._chat(row)
            case IdsRow():
                read = self._ids(row)
        if len(read.token_ids) > self._max_length:
            raise self._too_long(f"has {len(read.token_ids)} tokens")
        if not any(read.is_trained):
            raise InvalidRow("The row has no token to learn.")
        return read

    def _text(self, row: TextRow) -> TrainingRow:
        bos, eos = self._ends("/text")
        ids = (bos, *self._encoded(row.text, "/text"), eos)
        return TrainingRow(ids, (False,) + (True,) * (len(ids) - 1))

    def _prompt(self, row: PromptRow) -> TrainingRow:
        bos, eos = self._ends("/prompt")
        prompt = (bos, *(self._encoded(row.prompt, "/prompt") if row.prompt else ()))
        completion = (*self._encoded(row.completion, "/completion"), eos)
        return TrainingRow(prompt + completion, (False,) * len(prompt) + (True,) * len(completion))

    def _chat(self, row: ChatRow) -> TrainingRow:
        self._ends("/messages")
        for number, message in enumerate(row.messages):
            # Only to bound the work; the text is encoded as it stands in the chat.
            if len(message.content) > PIECE_CHARACTERS:
                self._encoded(message.content, f"/messages/{number}/content")
        messages = [Message(each.role, each.content) for each in row.messages]
        try:
            chat = chat_tokens(messages, self._codec)
        except RequestInvalid as error:
            raise InvalidRow(str(error), "/messages") from None
        return TrainingRow(chat.token_ids, chat.is_of_model)

    def _ids(self, row: IdsRow) -> TrainingRow:
        ids, mask = row.token_ids, row.loss_mask
        if not ids:
            raise InvalidRow("The row has no token.", "/token_ids")
        for place, token_id in enumerate(ids):
            if not 0 <= token_id < self._vocabulary_size:
                detail = f"A token id must be in [0, {self._vocabulary_size})."
                raise InvalidRow(detail, f"/token_ids/{place}")
        if mask is None:
            return TrainingRow(ids, (False,) + (True,) * (len(ids) - 1))
        if len(mask) != len(ids):
            detail = f"There are {len(mask)} numbers for {len(ids)} tokens."
            raise InvalidRow(detail, "/loss_mask")
        for place, number in enumerate(mask):
            if number not in (0, 1):
                raise InvalidRow("Must be 0 or 1.", f"/loss_mask/{place}")
        if mask[0]:
            raise InvalidRow(
                "Nothing stands before the first token, so it must be 0.", "/loss_mask/0"
            )
        return TrainingRow(ids, tuple(map(bool, mask)))

    def _ends(self, pointer: str) -> tuple[int, int]:
        """Ids in front of a text and behind it."""
        bos, eos = self._codec.bos_id, self._codec.eos_id
        if bos is None or eos is None:
            raise InvalidRow(_NO_TOKENIZER, pointer)
        return bos, eos

    def _encoded(self, text: str, pointer: str) -> list[int]:
        """Ids of a text, of which no more is looked at than is needed to see that it is too long.

        How a text is cut into tokens can depend on what follows, but never that far: one whose
        beginning has twice as many as a row may have is too long however it goes on.
        """
        if not text:
            raise InvalidRow("The text is empty.", pointer)
        length = PIECE_CHARACTERS
        while length < len(text):
            if len(self._codec.encode(text[:length])) > 2 * self._max_length:
                raise self._too_long("is far longer", pointer)
            length *= 2
        return self._codec.encode(text)

    def _too_long(self, what: str, pointer: str = "") -> InvalidRow:
        return InvalidRow(f"The row {what}; it may have {self._max_length} tokens.", pointer)
