"""Tokens with their log-probabilities, as generations and scores tell them."""

from service.client.call import Answer


class TopLogprob(Answer):
    """A token that could have stood in this place.

    Attributes:
        id: Of the token.
        token: As text; it may be a part of a character.
        bytes: Its UTF-8 bytes.
        logprob: Natural logarithm, under the model's own distribution.
    """

    id: int
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A token, with the likeliest ones in its place."""

    top: list[TopLogprob]
