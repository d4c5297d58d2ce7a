"""The codec of a model without a tokenizer: token ids in, token ids out, no text."""

from dataclasses import dataclass

from model.errors import RequestInvalid


@dataclass(frozen=True, slots=True)
class IdsOnly:
    """A `model.slots.TextCodec` that knows how many ids there are and what none of them means.

    So no id is bos, none ends a completion, and every token adds the empty text.
    """

    vocabulary_size: int

    @property
    def bos_id(self) -> None:
        """Unknown."""
        return None

    @property
    def eos_id(self) -> None:
        """Unknown."""
        return None

    @property
    def turn_ids(self) -> None:
        """Unknown."""
        return None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Unknown: a completion ends at the ids of the request, or at its length."""
        return ()

    def encode(self, text: str) -> list[int]:
        """Refuses.

        Raises:
            RequestInvalid: Always.
        """
        raise RequestInvalid("This preset has no tokenizer; send token ids.")

    def piece(self, token_id: int) -> str:
        """Nothing."""
        return ""

    def piece_bytes(self, token_id: int) -> bytes:
        """Nothing."""
        return b""
