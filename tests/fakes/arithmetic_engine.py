"""A model small enough to run in your head, behind the interface of the real engine.

Each new token is the sum of all tokens before it, modulo 1000:

    prompt [1, 2, 3]  ->  6, 12, 24, 48, ...

It depends on every earlier token, so a row mixed up with its neighbour, a chunk written to the
wrong slot or a token dropped on the way shows up as a wrong number. Texts are numbers between
spaces: "1 2 3". Token 0 is bos and adds nothing to a sum; token 999 is eos.

A temperature above 0 adds the seed to the sum, so that a draw depends on its seed.

Like the real engine it keeps nothing but what is in its slots. Environment variables make it
misbehave for a test: see `load`.
"""

import os
import time
from collections.abc import Sequence

from model.progress import Progress
from model.slots import DecodeRow, EngineInfo, EngineOptions, SampledToken

VOCABULARY_SIZE = 1000
BOS_ID = 0
EOS_ID = 999
CHUNK_TOKENS = 4


def next_token(tokens: Sequence[int], seed: int = 0) -> int:
    return (sum(tokens) + seed) % VOCABULARY_SIZE


class NumberCodec:
    """Numbers between spaces."""

    vocabulary_size = VOCABULARY_SIZE
    bos_id = BOS_ID
    stop_ids = (EOS_ID,)

    def encode(self, text: str) -> list[int]:
        return [int(word) % VOCABULARY_SIZE for word in text.split() if word.isdecimal()]

    def piece(self, token_id: int) -> str:
        return f" {token_id}"

    def piece_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in (BOS_ID, EOS_ID) else self.piece(token_id).encode()


class ArithmeticEngine:
    """See the module."""

    codec = NumberCodec()

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._slots: list[list[int]] = [[] for _ in range(options.num_slots)]
        self._step_seconds = float(os.environ.get("ARITHMETIC_STEP_SECONDS", "0"))
        self.num_compilations = 0
        self.num_decoded_tokens = 0
        self._has_prefilled_once = False

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            preset=self._options.preset,
            preset_digest="sha256:" + "0" * 64,
            family="arithmetic",
            is_instruct=False,
            num_parameters=0,
            dtype="int",
            backend="python",
            device="cpu",
            kernels=("python",),
            context_tokens=self._options.context_tokens,
            num_slots=self._options.num_slots,
            vocabulary_size=VOCABULARY_SIZE,
            num_layers=0,
            hidden_dim=0,
            chunk_tokens=CHUNK_TOKENS,
        )

    def prefill(self, slot: int, token_ids: Sequence[int], start: int) -> None:
        assert start % CHUNK_TOKENS == 0
        assert 0 < len(token_ids) <= CHUNK_TOKENS
        self._slots[slot][start:] = token_ids
        assert len(self._slots[slot]) == start + len(token_ids), "a chunk is missing"
        if ONCE in token_ids:
            assert not self._has_prefilled_once, "prefilled twice"
            self._has_prefilled_once = True
        time.sleep(self._step_seconds)

    def copy(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        assert len(self._slots[source]) == num_tokens, "something was decoded in the source"
        assert source not in targets
        for target in targets:
            self._slots[target] = list(self._slots[source])
        time.sleep(self._step_seconds)

    def decode(self, rows: Sequence[DecodeRow]) -> list[SampledToken]:
        assert 0 < len(rows) <= self._options.num_slots
        assert len({row.slot for row in rows}) == len(rows), "two rows in one slot"
        time.sleep(self._step_seconds)
        return [self._decode_row(row) for row in rows]

    def _decode_row(self, row: DecodeRow) -> SampledToken:
        tokens = self._slots[row.slot]
        tokens[row.position :] = [row.token_id]
        assert len(tokens) == row.position + 1, "a token is missing from the slot"
        _misbehave(tokens)
        token_id = next_token(tokens, row.sampling.seed if row.sampling.temperature > 0 else 0)
        while token_id in row.banned_ids:
            token_id = (token_id + 1) % VOCABULARY_SIZE
        if row.num_logprobs is None:
            return SampledToken(token_id, is_finite=NOT_FINITE not in tokens)
        top = tuple(((token_id + i) % VOCABULARY_SIZE, -1.0 - i) for i in range(row.num_logprobs))
        return SampledToken(token_id, -1.0, top)


# Prompts that hold one of these tokens make the engine fail, as a real one might.
NOT_FINITE = 901
RAISE = 902
EXIT = 903
HANG = 904
# Only its second prefill fails.
ONCE = 905


def _misbehave(tokens: Sequence[int]) -> None:
    if RAISE in tokens:
        raise RuntimeError("the step failed")
    if EXIT in tokens:
        os._exit(3)
    if HANG in tokens:
        time.sleep(3600)


def load(options: EngineOptions, progress: Progress) -> ArithmeticEngine:
    """Loads at once, unless the environment says otherwise.

    ``ARITHMETIC_STEP_SECONDS`` is the duration of every step, ``ARITHMETIC_LOAD_SECONDS`` that of
    loading.
    """
    progress("load", 0, 2)
    time.sleep(float(os.environ.get("ARITHMETIC_LOAD_SECONDS", "0")))
    progress("load", 2, 2)
    return ArithmeticEngine(options)
