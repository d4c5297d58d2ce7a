"""The rows of a fine-tune job: each in one of four forms, checked one by one.

There may be ten thousand, so they are checked by hand: the first thing wrong is told with its
pointer, and what is right becomes a row of the protocol at once.
"""

from typing import Any, cast

from service.api.schemas import MAX_VOCABULARY
from service.api.strict_model import refusal
from service.protocol.training import ChatMessage, ChatRow, IdsRow, PromptRow, Row, TextRow

MAX_ROWS = 100_000
_ROLES = ("system", "user", "assistant")
_FORMS = (
    "should have text; prompt and completion; messages; or token_ids, with or without loss_mask"
)

_IDS = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_VOCABULARY},
    "minItems": 1,
}


def _form(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


_TEXT = {"type": "string"}
_MESSAGE = _form(["role", "content"], role={"enum": list(_ROLES)}, content=_TEXT)
ROWS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_ROWS,
    "items": {
        "anyOf": [
            _form(["text"], text=_TEXT),
            _form(["prompt", "completion"], prompt=_TEXT, completion=_TEXT),
            _form(["messages"], messages={"type": "array", "items": _MESSAGE, "minItems": 1}),
            _form(
                ["token_ids"],
                token_ids=_IDS,
                loss_mask={"type": "array", "items": {"enum": [0, 1]}, "minItems": 1},
            ),
        ]
    },
}


def read_rows(value: object) -> tuple[Row, ...]:
    """The rows of a list; refuses what is none, with the pointer of the first thing wrong."""
    if not isinstance(value, list):
        raise refusal((), "should be a list of rows")
    if not value:
        raise refusal((), "should have at least one row")
    if len(value) > MAX_ROWS:
        raise refusal((), f"should have at most {MAX_ROWS} rows")
    return tuple(_row(row, index) for index, row in enumerate(value))


def _row(value: object, index: int) -> Row:
    if not isinstance(value, dict):
        raise refusal((index,), "should be a JSON object")
    keys = frozenset(value)
    if keys == {"text"}:
        return TextRow(_string(value["text"], index, "text"))
    if keys == {"prompt", "completion"}:
        prompt = _string(value["prompt"], index, "prompt")
        return PromptRow(prompt, _string(value["completion"], index, "completion"))
    if keys == {"messages"}:
        return _chat(value["messages"], index)
    if keys in ({"token_ids"}, {"token_ids", "loss_mask"}):
        return _ids(value, index)
    raise refusal((index,), _FORMS)


def _string(value: object, *location: int | str) -> str:
    if not isinstance(value, str):
        raise refusal(location, "should be a string")
    return value


def _chat(value: object, index: int) -> ChatRow:
    if not isinstance(value, list) or not value:
        raise refusal((index, "messages"), "should be a list of at least one message")
    messages = []
    for number, message in enumerate(value):
        place = (index, "messages", number)
        if not isinstance(message, dict) or frozenset(message) != {"role", "content"}:
            raise refusal(place, "should have role and content, and nothing else")
        role = _string(message["role"], *place, "role")
        if role not in _ROLES:
            raise refusal((*place, "role"), "should be system, user or assistant")
        content = _string(message["content"], *place, "content")
        messages.append(ChatMessage(cast(Any, role), content))
    return ChatRow(tuple(messages))


def _ids(value: dict[str, object], index: int) -> IdsRow:
    token_ids = _integers(value["token_ids"], MAX_VOCABULARY, index, "token_ids")
    if "loss_mask" not in value:
        return IdsRow(token_ids)
    mask = _integers(value["loss_mask"], 2, index, "loss_mask")
    if len(mask) != len(token_ids):
        raise refusal((index, "loss_mask"), f"should have {len(token_ids)} numbers, one a token")
    return IdsRow(token_ids, mask)


def _integers(value: object, limit: int, *location: int | str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise refusal(location, "should be a list of at least one integer")
    # In C for the honest case; a bool is an int to isinstance, and not to this.
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) < limit:
        return tuple(value)
    for position, number in enumerate(value):
        if type(number) is not int or not 0 <= number < limit:
            raise refusal((*location, position), f"should be an integer in [0, {limit})")
    raise AssertionError("one of them is wrong")
