"""Which keys a query may see."""

from jaxtyping import Array, Bool, Int

# A window that hides nothing: larger than any position a cache can hold.
UNLIMITED_WINDOW_TOKENS = 2**30


def visible(
    query_positions: Int[Array, "*batch queries"],
    key_positions: Int[Array, "*batch keys"],
    window_tokens: Int[Array, ""] | int,
) -> Bool[Array, "*batch queries keys"]:
    """True where the key is not after the query and inside its sliding window.

    With a window of 2::

                     key 0  1  2  3
        query 0          x
        query 1          x  x
        query 2             x  x
        query 3                x  x
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    return (distance >= 0) & (distance < window_tokens)


def visible_unpadded(
    positions: Int[Array, "batch seq"],
    padding_mask: Bool[Array, "batch seq"],
    window_tokens: Int[Array, ""] | int,
) -> Bool[Array, "batch seq seq"]:
    """`visible` within one sequence, minus the keys that ``padding_mask`` marks False.

    Padding may stand anywhere, left, right or in the middle. It removes keys only: a padded query
    sees what stands before it, and one that sees nothing gets a zero attention vector.
    """
    return visible(positions, positions, window_tokens) & padding_mask[:, None, :]


def visible_apart(
    positions: Int[Array, "batch seq"],
    sequences: Int[Array, "batch seq"],
    window_tokens: Int[Array, ""] | int,
) -> Bool[Array, "batch seq seq"]:
    """`visible` where several sequences lie in a row, one behind the other, each by itself.

    ``sequences`` says to which of them a token belongs; the padding is one more.
    """
    is_own = sequences[:, :, None] == sequences[:, None, :]
    return visible(positions, positions, window_tokens) & is_own
