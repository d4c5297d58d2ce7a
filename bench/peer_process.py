"""A peer: another implementation in a process and an environment of its own."""

import json
import os
import selectors
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCRIPTS = Path(__file__).parent / "peers"
# For loading, and for one answer, compilation included; far above what either takes.
_ANSWER_SECONDS = 600.0
_LOG_LINES = 5


class PeerFailed(Exception):
    """The peer cannot be installed or does not answer; the text says why, in one line."""


@dataclass(frozen=True, slots=True)
class Answer:
    """New tokens of each prompt, and the seconds that all of them took."""

    seconds: float
    token_ids: list[list[int]]


class PeerProcess:
    """Loads, answers questions one after another, and ends with the ``with`` block."""

    def __init__(self, python: Path, script: str, arguments: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [python, _SCRIPTS / script, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def versions(self) -> dict[str, str]:
        """Waits until the peer has loaded."""
        versions: dict[str, str] = self._read()["versions"]
        return versions

    def generate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> Answer:
        question = {"prompts": list(map(list, prompts)), "num_new_tokens": num_new_tokens}
        return Answer(**self.ask(question))

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """What the peer answers, whatever its script understands."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailed(self._last_words()) from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        # A peer writes a line at a time and only when asked, so nothing waits in a buffer.
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(_ANSWER_SECONDS):
                raise PeerFailed(f"no answer within {_ANSWER_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line]
        tail = " / ".join(lines[-_LOG_LINES:])
        return f"ended with status {self._process.returncode}: {tail}"
