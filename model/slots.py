"""What an engine does, in plain Python: the interface between the worker's loop and a model.

An engine owns a fixed number of slots, each holding the cache of one sequence. A sequence of n
prompt tokens lives like this::

    prefill(slot, token_ids[0:n-1] in chunks)      writes their keys and values
    copy(slot, other slots, n-1)                   for others that continue the same prompt
    decode([..., row(token n-1), ...])             yields token n, together with other rows
    decode([..., row(token n), ...])               yields token n+1, and so on

The last prompt token is decoded, not prefilled, so every token is sampled by one program. Nothing
needs to be freed or cleared: a new sequence overwrites what it can see, and what it cannot see
changes no bit of it, not even NaN.

Only the standard library is imported here, so that a fake engine is a few lines of integers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from model.progress import Progress

MAX_LOGPROBS = 20
MAX_BANNED_IDS = 24
MAX_BIASES = 300


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a worker is asked to load.

    Attributes:
        preset: Built-in name or path.
        num_slots: Sequences that decode at once.
        context_tokens: Positions per slot, prompt and completion together.
        cache_dir: Converted weights and compiled programs.
    """

    preset: str
    num_slots: int
    context_tokens: int
    cache_dir: Path


@dataclass(frozen=True, slots=True)
class SelfTest:
    """A self-test that passed: equal bits alone and in company; see `model.self_test`.

    Attributes:
        row_counts: Of the decode programs that were compared.
        chunk_tokens: Lengths of the prefill programs that were.
        num_comparisons: Rows of steps and positions of prompts, each to the last bit.
    """

    row_counts: tuple[int, ...]
    chunk_tokens: tuple[int, ...]
    num_comparisons: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was loaded, for `/info`.

    ``is_instruct`` is None where nothing says so; ``programs`` are the compiled programs by name;
    without ``has_tokenizer`` there are token ids and no text. ``self_test`` is None for an engine
    that needs none.
    """

    preset: str
    preset_digest: str
    family: str
    is_instruct: bool | None
    num_parameters: int
    dtype: str
    backend: str
    device: str
    kernels: tuple[str, ...]
    context_tokens: int
    num_slots: int
    vocabulary_size: int
    num_layers: int
    hidden_dim: int
    chunk_tokens: int
    buckets: dict[str, list[int]] = field(default_factory=dict)
    programs: tuple[str, ...] = ()
    has_tokenizer: bool = True
    self_test: SelfTest | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence draws; see `model.samplers.draw` and `model.samplers.penalties`.

    ``logit_bias`` holds at most `MAX_BIASES` pairs of id and bias.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change what is drawn."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One row of a decode step.

    Attributes:
        slot: Whose cache holds the tokens before this one.
        token_id: The newest token; its successor is asked for.
        position: Of ``token_id`` in its sequence.
        sampling: How the successor is drawn.
        banned_ids: At most `MAX_BANNED_IDS` ids that must not be drawn at this step.
        num_logprobs: None, or how many alternatives (0 to `MAX_LOGPROBS`) come with the token.
        prompt: Of the sequence, and
        generated: what followed it, ``token_id`` last; only for a row with penalties.
    """

    slot: int
    token_id: int
    position: int
    sampling: Sampling
    banned_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None
    prompt: Sequence[int] = ()
    generated: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What a decode step yields for one row.

    Attributes:
        token_id: The drawn token.
        logprob: Of the token under the model's own distribution; None if not asked for.
        top: The likeliest (id, logprob) pairs, best first.
        is_finite: False if the logits held NaN or infinity; nothing else is valid then.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    is_finite: bool = True


@runtime_checkable
class TextCodec(Protocol):
    """Text to ids and ids to bytes. Without a tokenizer, `model.ids_only`."""

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None:
        """The id before a text; None without a tokenizer, and then there is no text."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a completion unless the request says otherwise."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without bos."""

    def piece(self, token_id: int) -> str:
        """The token as it is written in the vocabulary."""

    def piece_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text; none for pad, bos and eos."""


@runtime_checkable
class Engine(Protocol):
    """A loaded model. One thread calls it."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def codec(self) -> TextCodec: ...

    @property
    def num_compilations(self) -> int:
        """Programs compiled, or fetched from the compile cache, since the process started."""

    def prefill(self, slot: int, token_ids: Sequence[int], start: int) -> None:
        """Writes one chunk; ``start`` is a multiple of ``info.chunk_tokens``."""

    def copy(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        """Gives ``targets`` the ``num_tokens`` tokens that ``source`` was prefilled with.

        Nothing may have been decoded in ``source`` since: a ring would hold that instead.
        """

    def decode(self, rows: Sequence[DecodeRow]) -> list[SampledToken]:
        """One step for 1 to ``info.num_slots`` rows, in any order of slots."""


EngineLoader = Callable[[EngineOptions, Progress], Engine]
