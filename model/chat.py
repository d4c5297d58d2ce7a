"""A chat as token ids, in Gemma's format: turns of the user and of the model between markers.

::

    <bos><start_of_turn>user
    What is new?<end_of_turn>
    <start_of_turn>model
    Nothing.<end_of_turn>

It is assembled from ids: what somebody said is encoded by itself, and a marker in it is plain
characters there. So no text can open or close a turn. What the system says stands in front of the
first turn of the user.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model.errors import RequestInvalid
from model.slots import TextCodec

Role = Literal["system", "user", "assistant"]
_NAMES = {"user": "user", "assistant": "model"}


@dataclass(frozen=True, slots=True)
class Message:
    """What one side said; white space around it does not count."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class ChatTokens:
    """A chat as ids, and which of them the model said, markers of its ends included."""

    token_ids: tuple[int, ...]
    is_of_model: tuple[bool, ...]


def chat_tokens(messages: Sequence[Message], codec: TextCodec) -> ChatTokens:
    """The ids of a whole chat, ``<bos>`` included, up to the end of its last turn.

    Raises:
        RequestInvalid: The turns do not alternate, or the vocabulary has no chats.
    """
    if codec.bos_id is None or codec.turn_ids is None:
        raise RequestInvalid("The vocabulary of this preset has no turns of a chat.")
    start, end = codec.turn_ids
    ids, of_model = [codec.bos_id], [False]
    for number, (role, content) in enumerate(_turns(messages)):
        opening = [start, *codec.encode(f"{_NAMES[role]}\n")]
        if number:
            opening = [*codec.encode("\n"), *opening]
        said = [*plain_ids(content, codec), end]
        ids += opening + said
        of_model += [False] * len(opening) + [role == "assistant"] * len(said)
    return ChatTokens(tuple(ids), tuple(of_model))


def plain_ids(text: str, codec: TextCodec) -> list[int]:
    """Ids of a text in which markers of turns are characters like others.

    Raises:
        RequestInvalid: The vocabulary makes a marker of something else too.
    """
    assert codec.turn_ids is not None, "a chat has them"
    markers = [codec.piece(token_id) for token_id in codec.turn_ids]
    # Behind the first character of each, which is a piece of its own then.
    cut = "|".join(f"(?<={re.escape(each[0])})(?={re.escape(each[1:])})" for each in markers)
    ids = [id_ for part in re.split(cut, text) for id_ in codec.encode(part)]
    if set(ids) & set(codec.turn_ids):
        raise RequestInvalid("A text that reads as a marker of a turn cannot be taken.")
    return ids


def _turns(messages: Sequence[Message]) -> list[tuple[Role, str]]:
    """Turns that alternate and begin with the user's; the system's words are in the first."""
    turns: list[tuple[Role, str]] = [(each.role, each.content.strip()) for each in messages]
    system = ""
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    if not turns:
        raise RequestInvalid("There is no turn of the user.")
    for number, (role, _) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise RequestInvalid(
                f"Turn {number} must be the {expected}'s; user and assistant take turns."
            )
    if system:
        turns[0] = ("user", f"{system}\n\n{turns[0][1]}")
    return turns
