"""What a transfer from a hub is to those who ask for it, and what can go wrong."""

from typing import Protocol, runtime_checkable

# Of a file on a hub: its size, and its digest if the hub states one.
Description = tuple[int, str | None]


class Problem(Exception):
    """What went wrong, in words that hold neither a token nor a signed address.

    Attributes:
        kind: "refused" by the hub, "missing" there, "unreachable", "offline" by setting,
            "interrupted" amid a transfer, "disk", "credentials" that cannot be read, or "failed".
        detail: For a person: the host, the HTTP status, whatever the kind does not say.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


@runtime_checkable
class Transfer(Protocol):
    """One preset on one hub. Every method may raise `Problem`."""

    def revision(self) -> str:
        """The version or commit that the handle stands for now."""
        ...

    def describe(self, revision: str, names: list[str]) -> dict[str, Description]:
        """Of those of the files that exist."""
        ...

    def get(
        self, revision: str, name: str, path: str, num_bytes: int
    ) -> tuple[int | None, str | None]:
        """Appends to ``path`` what is missing there; size and digest as the answer states them."""
        ...
