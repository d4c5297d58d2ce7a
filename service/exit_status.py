"""How a command of the command line ends: with a status, and one line if it failed.

Both processes use it; `docs/commands.md` lists the statuses.
"""

from enum import IntEnum


class ExitStatus(IntEnum):
    """BSD's sysexits where it has a name for what went wrong, otherwise what shells make of it."""

    OK = 0
    JOB_FAILED = 1
    USAGE = 64
    BAD_PRESET = 65
    UNAVAILABLE = 69
    BUG = 70
    CANNOT_CREATE = 73
    TRY_LATER = 75
    ADDRESS_IN_USE = 98
    INTERRUPTED = 130
    TERMINATED = 143


class Exit(Exception):
    """Ends the program: one line for standard error, and its status."""

    def __init__(self, status: ExitStatus, line: str) -> None:
        super().__init__(status, line)
        self.status = status
        self.line = line
