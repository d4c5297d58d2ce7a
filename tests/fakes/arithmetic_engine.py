"""A model small enough to run in your head, behind the interface of the real engine.

Each new token is the sum of all tokens before it, modulo 1000:

    prompt [1, 2, 3]  ->  6, 12, 24, 48, ...

It depends on every earlier token, so a row mixed up with its neighbour, a chunk written to the
wrong slot or a token dropped on the way shows up as a wrong number. Texts are numbers between
spaces: "1 2 3". Token 0 is bos and adds nothing to a sum; token 999 is eos. What can be changed of
that, `tests.fakes.arithmetic_stream` says.

A temperature above 0 adds the seed to the sum, so that a draw depends on its seed. An adapter is a
file that holds a number, which is added to every sum of whoever uses it; how one is trained,
`tests.fakes.arithmetic_trainer` says.

Like the real engine it keeps nothing but what is in its slots. Environment variables make it
misbehave for a test: see `load`.
"""

import hashlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.errors import AdapterUnfit
from model.progress import Progress
from model.score_slots import ScoreChunk
from model.slots import (
    MAX_STEPS,
    DecodeRow,
    EngineInfo,
    EngineOptions,
    PromptChunk,
    SampledToken,
)
from tests.fakes.arithmetic_attributions import NUM_LAYERS, WIDTH, ArithmeticAttributions
from tests.fakes.arithmetic_scores import HEAD_PLACES, HEAD_PLACES_OF_STEP, ArithmeticScores
from tests.fakes.arithmetic_search import ArithmeticSearches
from tests.fakes.arithmetic_stream import embedded, stream, touching
from tests.fakes.arithmetic_trainer import ArithmeticAdapters, ArithmeticTrainer

VOCABULARY_SIZE = 1000
BOS_ID = 0
EOS_ID = 999
TURN_IDS = (997, 998)
CHUNK_TOKENS = 4


def next_token(tokens: Sequence[int], seed: int = 0) -> int:
    return (sum(tokens) + seed) % VOCABULARY_SIZE


class NumberCodec:
    """Numbers between spaces."""

    vocabulary_size = VOCABULARY_SIZE
    bos_id = BOS_ID
    eos_id = EOS_ID
    turn_ids = TURN_IDS
    stop_ids = (EOS_ID,)

    def encode(self, text: str) -> list[int]:
        return [int(word) % VOCABULARY_SIZE for word in text.split() if word.isdecimal()]

    def piece(self, token_id: int) -> str:
        return f" {token_id}"

    def piece_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in (BOS_ID, EOS_ID) else self.piece(token_id).encode()


class ArithmeticEngine(
    ArithmeticSearches, ArithmeticScores, ArithmeticAttributions, ArithmeticAdapters
):
    """See the module."""

    codec = NumberCodec()

    def __init__(self, options: EngineOptions) -> None:
        super().__init__()
        self._options = options
        # The tokens of each slot, and those whose "keys and values" are there.
        self._tables: list[list[int]] = [[] for _ in range(options.num_slots)]
        self._slots: list[list[int]] = [[] for _ in range(options.num_slots)]
        self._kept: dict[bytes, list[int]] = {}
        # What each adapter adds; the first is the base.
        self._adapters = [0] * (1 + options.adapter_slots)
        # Of the adapter that each slot was prefilled with.
        self._added = [0] * options.num_slots
        self.joined_tokens = int(os.environ.get("ARITHMETIC_JOINED_TOKENS", "0"))
        self._step_seconds = float(os.environ.get("ARITHMETIC_STEP_SECONDS", "0"))
        self.trainer = ArithmeticTrainer() if options.adapter_slots else None
        self.hidden_slots: set[int] = set()
        self.num_compilations = 0
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
            kernels="none",
            kernels_reason=f"numbers need none; {self._options.kernels} was asked for",
            context_tokens=self._options.context_tokens,
            num_slots=self._options.num_slots,
            vocabulary_size=VOCABULARY_SIZE,
            num_layers=NUM_LAYERS,
            hidden_dim=WIDTH,
            chunk_tokens=CHUNK_TOKENS,
            packed_tokens=CHUNK_TOKENS,
            packed_prompts=2,
            joined_tokens=self.joined_tokens,
            joined_rows=3 if self.joined_tokens else 0,
            head_places=HEAD_PLACES,
            head_places_of_step=HEAD_PLACES_OF_STEP,
            keeps_prefixes=self._options.prefix_cache_bytes > 0,
            adapter_slots=self._options.adapter_slots,
            adapter_max_rank=self._options.adapter_max_rank,
        )

    def read_adapter(self, path: Path, digest: str) -> int:
        content = path.read_bytes()
        if digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
            raise AdapterUnfit(f"{path} has changed")
        if not content.strip().isdigit():
            raise AdapterUnfit(f"{path} holds no number")
        return int(content)

    def put_adapter(self, slot: int, adapter: int) -> None:
        assert 0 < slot < len(self._adapters), "slot 0 is the base"
        self._adapters[slot] = adapter

    def _sum(self, tokens: Sequence[int], adapter: int, seed: int = 0) -> int:
        return next_token(tokens, seed + self._adapters[adapter])

    def begin(self, slot: int, token_ids: Sequence[int]) -> None:
        self._tables[slot] = list(token_ids)

    def prefill(self, chunks: Sequence[PromptChunk]) -> Iterator[None]:
        assert len(chunks) == 1 or sum(len(chunk.token_ids) for chunk in chunks) <= CHUNK_TOKENS
        for chunk in chunks:
            assert chunk.start % CHUNK_TOKENS == 0 or self.joined_tokens
            assert 0 < len(chunk.token_ids) <= CHUNK_TOKENS - chunk.start % CHUNK_TOKENS
        # As two layers that are both needed.
        for _ in range(2):
            time.sleep(self._step_seconds / 2)
            yield
        self._hold(chunks)

    def join(self, chunks: Sequence[PromptChunk], rows: Sequence[DecodeRow]) -> "Sums":
        assert 0 < sum(len(chunk.token_ids) for chunk in chunks) <= self.joined_tokens
        assert 0 < len(rows) <= self.info.joined_rows
        assert not any(chunk.touches for chunk in chunks)
        assert not any(row.rules.interventions for row in rows)
        assert not {chunk.slot for chunk in chunks} & {row.slot for row in rows}
        self._hold(chunks)
        return self.decode(rows, 1)

    def _hold(self, chunks: Sequence[PromptChunk]) -> None:
        for chunk in chunks:
            self._slots[chunk.slot][chunk.start :] = [
                embedded(token, touching(chunk.touches, place))
                for place, token in enumerate(chunk.token_ids)
            ]
            self._added[chunk.slot] = self._adapters[chunk.adapter]
            assert len(self._slots[chunk.slot]) == chunk.start + len(chunk.token_ids)
            if ONCE in chunk.token_ids:
                assert not self._has_prefilled_once, "prefilled twice"
                self._has_prefilled_once = True

    def _check_chunks(self, chunks: Sequence[ScoreChunk]) -> None:
        assert len(chunks) == 1 or sum(len(chunk.token_ids) for chunk in chunks) <= CHUNK_TOKENS
        assert len(chunks) <= self.info.packed_prompts
        for chunk in chunks:
            last = chunk.start + len(chunk.token_ids) - 1
            assert chunk.start // CHUNK_TOKENS == last // CHUNK_TOKENS, "it crosses a block"

    def copy(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        assert len(self._slots[source]) == num_tokens, "something was decoded in the source"
        assert source not in targets
        for target in targets:
            self._slots[target] = list(self._slots[source])
            self._added[target] = self._added[source]
        time.sleep(self._step_seconds)

    def keep(self, slot: int, keys: Sequence[bytes]) -> None:
        start = CHUNK_TOKENS * (len(keys) - 1)
        assert len(self._slots[slot]) == start + CHUNK_TOKENS, "not prefilled just now"
        self._kept[keys[-1]] = self._slots[slot][start:]

    def restore(self, slot: int, keys: Sequence[bytes]) -> int:
        found = list(itertools.takewhile(lambda key: key in self._kept, keys))
        assert not (found and slot in self.hidden_slots), "hidden states would be missing"
        self._slots[slot] = [token for key in found for token in self._kept[key]]
        return len(found)

    def decode(self, rows: Sequence[DecodeRow], num_steps: int) -> "Sums":
        assert 0 < len(rows) <= self._options.num_slots
        assert len({row.slot for row in rows}) == len(rows), "two rows in one slot"
        assert 0 < num_steps <= MAX_STEPS
        drawn = [self._decode_row(row, num_steps) for row in rows]
        most = max(len(tokens) for tokens in drawn)
        return Sums(drawn, time.monotonic() + most * self._step_seconds)

    def _write(self, slot: int, position: int, token_id: int) -> list[int]:
        held = self._slots[slot]
        held[position:] = [token_id]
        assert len(held) == position + 1, "a token is missing from the slot"
        _misbehave(held)
        return held

    def _is_finite(self, tokens: list[int]) -> bool:
        return NOT_FINITE not in tokens

    def _misbehave(self, tokens: Sequence[int]) -> None:
        _misbehave(tokens)

    def _decode_row(self, row: DecodeRow, num_steps: int) -> list[SampledToken]:
        drawn: list[SampledToken] = []
        was_prefilled = row.position + 1 == row.rules.num_prompt > 1
        if was_prefilled and not self._options.prefix_cache_bytes:
            added = self._adapters[row.adapter]
            assert self._added[row.slot] == added, "prefilled with another adapter"
        rules, table, held = row.rules, self._tables[row.slot], self._slots[row.slot]
        for position in range(row.position, row.position + num_steps):
            del table[position + 1 :]
            assert len(table) == position + 1, "a token was never written"
            newest = table[-1]
            has_stopped = position >= rules.num_prompt and newest in rules.stop_ids
            if has_stopped or position + 1 >= rules.end:
                break
            steps = [
                step.intervention
                for step in rules.interventions
                if step.acts_at(position, rules.num_prompt)
            ]
            held[position:] = [embedded(newest, steps)]
            assert held == table, "the slot does not hold what was said so far"
            _misbehave(held[: rules.num_prompt])
            seed = rules.sampling.seed if rules.sampling.temperature > 0 else 0
            token_id = self._sum([stream(held, steps)], row.adapter, seed)
            while position + 1 < rules.may_stop_at and token_id in rules.stop_ids:
                token_id = (token_id + 1) % VOCABULARY_SIZE
            is_finite = NOT_FINITE not in held[: rules.num_prompt]
            table.append(token_id if is_finite else BOS_ID)
            drawn.append(_sampled(token_id, rules.num_logprobs, is_finite=is_finite))
            if not is_finite:
                break
        if drawn and (table[-1] in rules.stop_ids or not drawn[-1].is_finite):
            # The next dispatch may begin before this is read; it finds the same end again.
            table += [table[-1]] * (row.position + num_steps + 1 - len(table))
            held[:] = table[:-1]
        return drawn


class Sums:
    """What was drawn; it is done when the clock says so."""

    def __init__(self, drawn: list[list[SampledToken]], done_at: float) -> None:
        self._drawn = drawn
        self._done_at = done_at

    def wait(self) -> None:
        time.sleep(max(0.0, self._done_at - time.monotonic()))

    def tokens(self) -> list[list[SampledToken]]:
        self.wait()
        return self._drawn


def _sampled(token_id: int, num_logprobs: int | None, *, is_finite: bool) -> SampledToken:
    if num_logprobs is None:
        return SampledToken(token_id, is_finite=is_finite)
    top = tuple(((token_id + i) % VOCABULARY_SIZE, -1.0 - i) for i in range(num_logprobs))
    return SampledToken(token_id, -1.0, top, is_finite)


# Prompts that hold one of these tokens make the engine fail, as a real one might. Drawing one does
# no harm: a draw depends on a seed, and those that nobody chose are random.
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

    ``ARITHMETIC_JOINED_TOKENS`` lets it join steps to so many tokens of prompts,
    ``ARITHMETIC_STEP_SECONDS`` is the duration of every step, ``ARITHMETIC_LOAD_SECONDS`` that of
    loading.
    """
    progress("load", 0, 2)
    time.sleep(float(os.environ.get("ARITHMETIC_LOAD_SECONDS", "0")))
    progress("load", 2, 2)
    return ArithmeticEngine(options)
