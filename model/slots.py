"""What an engine does, in plain Python: the interface between the worker's loop and a model.

An engine owns a fixed number of slots, each holding one sequence: its tokens, and their keys and
values. A sequence of n prompt tokens lives like this::

    begin(slot, token_ids)                         writes the tokens
    restore(slot, keys of its blocks)              keys and values that an earlier prompt left
    prefill(slot, token_ids[..n-1] in chunks)      the keys and values of the others
    keep(slot, keys of its blocks)                 a full block, for later prompts
    copy(slot, other slots, n-1)                   for others that continue the same prompt
    decode([..., row at position n-1, ...])        yields token n, and those after it

The last prompt token is decoded, not prefilled, so every token is sampled by one program. A drawn
token is written into its slot by the step that draws it; so the next dispatch can start before
anyone has read the last one. Nothing needs to be freed or cleared: a new sequence overwrites what
it can see, and what it cannot see changes no bit of it, not even NaN.

Only the standard library is imported here, so that a fake engine is a few lines of integers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from model.intervention_slots import StepIntervention, Touch
from model.kernels.choice import KernelChoice
from model.progress import Progress
from model.training import Trainer

MAX_LOGPROBS = 20
MAX_STOP_IDS = 24
MAX_BIASES = 300
# Steps that one dispatch may hold.
MAX_STEPS = 8


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a worker is asked to load.

    Attributes:
        preset: Built-in name or path.
        num_slots: Sequences that decode at once.
        context_tokens: Positions per slot, prompt and completion together.
        cache_dir: Converted weights and compiled programs.
        prefix_cache_bytes: For blocks of prompts that later prompts may begin with; 0 keeps none.
        kernels: Whether native kernels compute where they can be used, must, or may not.
        adapter_slots: Adapters that may be used at once, beside the base; none: there are none.
        adapter_max_rank: That an adapter may have.
    """

    preset: str
    num_slots: int
    context_tokens: int
    cache_dir: Path
    prefix_cache_bytes: int = 0
    kernels: KernelChoice = "auto"
    adapter_slots: int = 0
    adapter_max_rank: int = 16


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

    ``kernels`` names what computes products; ``kernels_reason`` says why these are not native ones,
    where they could be.
    ``is_instruct`` is None where nothing says so; ``programs`` are the compiled programs by name;
    without ``has_tokenizer`` there are token ids and no text. Up to
    ``packed_prompts`` prompts with no more than ``packed_tokens`` left together may be prefilled
    together. ``joined_tokens`` of prompts and ``joined_rows`` may go through the blocks together;
    0: `Engine.join` may not be called. The head of scores takes ``head_places`` together, and for
    ``head_places_of_step`` no longer than a step takes. ``adapter_slots`` adapters of at most
    ``adapter_max_rank`` may be used at once, beside the base. ``keeps_prefixes`` tells whether
    `Engine.keep` keeps anything. ``self_test`` is None for an engine that needs none.
    """

    preset: str
    preset_digest: str
    family: str
    is_instruct: bool | None
    num_parameters: int
    dtype: str
    backend: str
    device: str
    kernels: str
    context_tokens: int
    num_slots: int
    vocabulary_size: int
    num_layers: int
    hidden_dim: int
    chunk_tokens: int
    packed_tokens: int = 0
    packed_prompts: int = 1
    joined_tokens: int = 0
    joined_rows: int = 0
    head_places: int = 0
    head_places_of_step: int = 0
    keeps_prefixes: bool = False
    buckets: dict[str, list[int]] = field(default_factory=dict)
    programs: tuple[str, ...] = ()
    has_tokenizer: bool = True
    self_test: SelfTest | None = None
    kernels_reason: str | None = None
    adapter_slots: int = 0
    adapter_max_rank: int = 0


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
class RowRules:
    """What one output asks of every step; the same from its first token to its last.

    Positions count the prompt.

    Attributes:
        sampling: How a token is drawn.
        num_prompt: Tokens of the prompt, at least 1.
        end: Tokens of the sequence when it is at its longest.
        stop_ids: At most `MAX_STOP_IDS` ids that end the sequence.
        may_stop_at: First position at which one of them may be drawn; before it they are not.
        num_logprobs: None, or how many alternatives (0 to `MAX_LOGPROBS`) come with a token.
        interventions: At most `model.intervention_slots.MAX_INTERVENTIONS`, in order.
    """

    sampling: Sampling
    num_prompt: int
    end: int
    stop_ids: tuple[int, ...] = ()
    may_stop_at: int = 0
    num_logprobs: int | None = None
    interventions: tuple[StepIntervention, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One row of a dispatch.

    Attributes:
        slot: Which sequence.
        position: Of the newest token; its successor is asked for. If that token was drawn and is
            one that ends the sequence, the row draws nothing more.
        rules: Of its output.
        adapter: Slot of its adapter; 0 is the base.
    """

    slot: int
    position: int
    rules: RowRules
    adapter: int = 0


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Consecutive tokens of a prompt, within ``EngineInfo.chunk_tokens`` from a multiple of it.

    Of an engine that joins no steps to prompts, ``start`` is one. ``touches`` are those of the
    request, in order. ``adapter`` is the slot of its adapter; 0 is the base.
    """

    slot: int
    token_ids: Sequence[int]
    start: int
    touches: tuple[Touch, ...] = ()
    adapter: int = 0


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


# An adapter that was read; what it is, only the engine knows.
Adapter = Any
AdapterLayout = Literal["keras", "peft"]


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """What an adapter is made of; see `model.lora_adapter.LoraForm`."""

    layout: AdapterLayout
    rank: int
    alpha: float
    targets: tuple[str, ...]


@runtime_checkable
class TextCodec(Protocol):
    """Text to ids and ids to bytes. Without a tokenizer, `model.ids_only`."""

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None:
        """The id before a text; None without a tokenizer, and then there is no text."""

    @property
    def eos_id(self) -> int | None:
        """The id behind a text; None without a tokenizer."""

    @property
    def turn_ids(self) -> tuple[int, int] | None:
        """What opens and what closes a turn of a chat; None where the vocabulary lacks them."""

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
class Dispatch(Protocol):
    """Steps that were started."""

    def wait(self) -> None:
        """Returns when they are done."""

    def tokens(self) -> list[list[SampledToken]]:
        """What each row drew, in order, once they are done: as many tokens as there were steps,
        or fewer if the row ended; none if it had ended before. Nothing follows a token that is not
        finite.
        """


@runtime_checkable
class Engine(Protocol):
    """A loaded model. One thread calls it."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def codec(self) -> TextCodec: ...

    @property
    def trainer(self) -> Trainer | None:
        """Trains adapters of this model; None without slots to serve them from."""

    @property
    def num_compilations(self) -> int:
        """Programs compiled, or fetched from the compile cache, since the process started."""

    def begin(self, slot: int, token_ids: Sequence[int]) -> None:
        """Gives a slot to a prompt."""

    def prefill(self, chunks: Sequence[PromptChunk]) -> Iterator[None]:
        """Writes keys and values: a chunk, or several of ``info.packed_tokens`` together.

        The work is done between the values that are taken; its caller may pause there and do
        anything with other slots. It may be left unfinished: then the chunks must begin anew.
        """

    def copy(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        """Gives ``targets`` the ``num_tokens`` tokens that ``source`` was prefilled with.

        Nothing may have been decoded in ``source`` since: a ring would hold that instead.
        """

    def join(self, chunks: Sequence[PromptChunk], rows: Sequence[DecodeRow]) -> Dispatch:
        """Starts one step of ``rows`` together with parts of prompts in other slots.

        It gives what `prefill` and `decode` would give, in less time than both. Takes 1 or more
        chunks of ``info.joined_tokens`` together, 1 to ``info.joined_rows`` rows, and no
        interventions.
        """

    def keep(self, slot: int, keys: Sequence[bytes]) -> None:
        """Keeps the block of ``info.chunk_tokens`` whose end was prefilled last.

        A key stands for the tokens of a block, all before them, and whatever else made them.
        ``keys`` are those of the slot's blocks up to this one.
        """

    def restore(self, slot: int, keys: Sequence[bytes]) -> int:
        """Gives a slot the leading blocks that were kept under ``keys``; returns their number."""

    def decode(self, rows: Sequence[DecodeRow], num_steps: int) -> Dispatch:
        """Starts up to ``num_steps`` steps, at most `MAX_STEPS`, and does not wait for them.

        Takes 1 to ``info.num_slots`` rows, in any order of slots.
        """

    def read_adapter(self, path: Path, digest: str) -> Adapter:
        """Opens the file of an adapter version.

        Raises:
            PresetError: It is missing, has another digest, or does not fit the model; the message
                names it.
        """

    def put_adapter(self, slot: int, adapter: Adapter) -> None:
        """Gives slot 1 to ``info.adapter_slots`` to an adapter, after what was started before."""

    def open_adapter(self, content: bytes) -> Adapter:
        """An adapter of the bytes that a trainer or `import_adapter` gave. Any thread may ask.

        Raises:
            PresetError: They are no such file, or do not fit the model or the bank.
        """

    def adapter_form(self, content: bytes) -> AdapterForm:
        """What the adapter of such bytes is made of. Any thread may ask.

        Raises:
            PresetError: They are no such file, or do not fit the model.
        """

    def import_adapter(self, path: Path, format: AdapterLayout) -> bytes:
        """The bytes of the adapter in a file of another library. Any thread may ask; it takes long.

        Raises:
            PresetError: It is no such file, or does not fit the model or the bank; the message says
                what is wrong.
        """

    def import_named_adapter(self, path: Path, digest: str) -> bytes:
        """The same of what `read_adapter` opens, whatever kind of file that is.

        Raises:
            PresetError: As `read_adapter` and `import_adapter`.
        """

    def export_adapter(self, content: bytes, path: Path, format: AdapterLayout) -> None:
        """Writes an adapter as a file for another library. Any thread may ask; it takes long.

        Raises:
            PresetError: There is no such form of it; the message says what is wrong.
            OSError: It cannot be written.
        """


EngineLoader = Callable[[EngineOptions, Progress], Engine]
