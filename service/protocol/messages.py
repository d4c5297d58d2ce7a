"""Every command and every event that crosses the wall between the two processes.

All of them are frozen and of plain types; msgspec decodes them strictly. Commands go to the worker,
events come back. The life of a worker:

    Load -> Progress*, Ready -> (requests) | LoadFailed

The life of one request is always one of these:

    Accepted, Piece*, Finished      the usual life
    Accepted, Piece*, Failed        it died on the way
    Accepted, Scored                a request of scores
    Failed                          it was never admitted

Exactly one `Finished`, `Scored` or `Failed` ends it. If the worker dies, the API process makes the
`Failed`.

Times are seconds; a deadline is on the monotonic clock, which both processes share.
"""

from typing import Literal

import msgspec

from service.protocol.worker_counts import AdapterCounts, WorkCounts

FinishReason = Literal["stop", "length", "timeout", "cancelled"]
KernelChoice = Literal["auto", "native", "xla"]
Operation = Literal["add", "scale", "zero", "set", "project_out"]
# Listed ones count from the beginning of the text, ``<bos>`` being 0.
Positions = Literal["all", "context", "target", "last"] | tuple[int, ...]
Phase = Literal["start", "download", "convert", "load", "compile", "idle", "step"]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the class name is the tag."""


class SamplingParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the tokens of a request are drawn.

    ``temperature`` 0 is greedy; 0 is off for ``top_k``, ``min_p`` and two of the penalties, 1 for
    ``top_p`` and ``repetition_penalty``. ``logit_bias`` are pairs of id and bias.
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


class StopRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a completion ends. With a ``max_length`` the prompt counts, and not ``max_tokens``."""

    max_tokens: int
    min_tokens: int
    strings: tuple[str, ...]
    token_ids: tuple[int, ...]
    ignore_eos: bool
    max_length: int | None = None


class BeamSearch(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The likeliest continuations as a whole; choice k is the k-th best."""

    num_beams: int

    @property
    def width(self) -> int:
        """Slots that it takes."""
        return self.num_beams


class ContrastiveSearch(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Of the likeliest tokens, the one that repeats the context least."""

    num_candidates: int
    alpha: float

    @property
    def width(self) -> int:
        """Slots that it takes."""
        return self.num_candidates


class Intervention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A change of the residual stream.

    Attributes:
        operation: What is done.
        layers: Where: −1 is the embedding before scaling, i what block i leaves.
        positions: In which tokens.
        scale: Of ``add`` and ``scale``.
        vector: Of the operations that have one: float32, little-endian.
    """

    operation: Operation
    layers: tuple[int, ...]
    positions: Positions
    scale: float = 1.0
    vector: bytes = b""


class Capture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The residual stream of some tokens at some layers, as float16 or float32."""

    layers: tuple[int, ...]
    positions: Positions
    is_half: bool


# --- commands ---------------------------------------------------------------------------------


class AdapterSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version of an adapter: the digest that names it, and its file."""

    digest: str
    path: str


class Load(Message, frozen=True):
    """The first command: which engine to load, and how.

    Attributes:
        engine: ``module:function`` of an engine loader.
        preset: Built-in name or path.
        cache_dir: Converted weights and compiled programs.
        num_slots: Sequences that decode at once.
        context_tokens: Prompt and completion together.
        max_queued_requests: Requests that may wait for a slot.
        max_queued_tokens: Prompt tokens that may wait for a slot.
        prefix_cache_bytes: For blocks of prompts that later prompts may begin with; 0 keeps none.
        kernels: Whether native kernels compute where they can be used, must, or may not.
        adapter_slots: Adapters that may be used at once; none: there is no bank for them.
        adapter_max_rank: That an adapter may have.
        adapters: Versions that requests may name, read before the worker is ready.
        train_share: Share of the time that jobs get while others are served, in [0, 1].
        checkpoint_seconds: Of training that may be lost with the worker.
    """

    engine: str
    preset: str
    cache_dir: str
    num_slots: int
    context_tokens: int
    max_queued_requests: int
    max_queued_tokens: int
    prefix_cache_bytes: int = 0
    kernels: KernelChoice = "auto"
    adapter_slots: int = 0
    adapter_max_rank: int = 16
    adapters: tuple[AdapterSource, ...] = ()
    train_share: float = 0.4
    checkpoint_seconds: float = 10.0


class Generate(Message, frozen=True):
    """Admit one request of one or several prompts; output k is prompt k // n, choice k % n.

    Attributes:
        request_id: Chosen by the API process.
        tenant: Whose request it is.
        deadline: Monotonic seconds after which it must not run.
        adapter: Digest of an adapter version, or None for the base.
        prompts: Text (bos is put in front) or token ids (taken as they are).
        num_choices: Completions of each prompt.
        sampling: Output k draws with seed (seed + k) mod 2³².
        stop: When a completion ends.
        num_logprobs: None, or alternatives per token.
        echo: Whether the text of each output begins with its prompt.
        priority: Higher ones get a slot first.
        search: How tokens are searched for, in place of ``sampling``.
        interventions: In prompts and in what is generated, in order.
    """

    request_id: str
    tenant: str
    deadline: float
    adapter: str | None
    prompts: tuple[str | tuple[int, ...], ...]
    num_choices: int
    sampling: SamplingParameters
    stop: StopRules
    num_logprobs: int | None
    echo: bool = False
    priority: int = 0
    search: BeamSearch | ContrastiveSearch | None = None
    interventions: tuple[Intervention, ...] = ()


class ScoredText(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A text, bos in front of it; every token of its own is a target."""

    text: str


class ScoredContext(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A text, bos in front of it, and what may follow it: each is a target."""

    context: str
    targets: tuple[str, ...]


class ScoredIds(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Token ids, taken as they are, and one target.

    Attributes:
        token_ids: At least one.
        target_ids: What is asked about behind each token; None: the tokens that follow.
        mask: Which are. Behind each token with ``target_ids``; without, the tokens themselves.
    """

    token_ids: tuple[int, ...]
    target_ids: tuple[int, ...] | None
    mask: tuple[bool, ...] | None


class Attribute(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which log-probabilities of each input are traced back, and to what.

    Attributes:
        layer: −1 for the embeddings, or the block behind which the residual stream stands.
        target: Of each input; None for the summed loss of all of them.
        num_steps: Of integrated gradients; 0 for the gradient.
        reduction: What is told of a token: all numbers, a product with the stream, or the norm.
    """

    layer: int
    target: int | None
    num_steps: int
    reduction: Literal["none", "dot_input", "l2"]


class Score(Message, frozen=True):
    """Admit one request for log-probabilities of given tokens.

    Attributes:
        request_id: Chosen by the API process.
        tenant: Whose request it is.
        deadline: Monotonic seconds after which it must not run.
        adapter: Digest of an adapter version, or None for the base.
        inputs: What is scored, each for itself.
        tells_tokens: Whether each token is told, or only their sums.
        num_top: Alternatives of each token that is told.
        tells_logits: Whether all logits are told behind which a token of the one target stands.
        priority: Higher ones are read first.
        interventions: In every text, in order.
        captures: Of every text, after these.
        attribution: What log-probabilities are traced back to, if they are to be.
        compared: Further versions, as ``adapter`` names the first; all differ. The same is asked of
            each, and how far what it expects is from what the first does.
    """

    request_id: str
    tenant: str
    deadline: float
    adapter: str | None
    inputs: tuple[ScoredText | ScoredContext | ScoredIds, ...]
    tells_tokens: bool = False
    num_top: int = 0
    tells_logits: bool = False
    priority: int = 0
    interventions: tuple[Intervention, ...] = ()
    captures: tuple[Capture, ...] = ()
    attribution: Attribute | None = None
    compared: tuple[str | None, ...] = ()

    @property
    def versions(self) -> tuple[str | None, ...]:
        """All of them, in order."""
        return (self.adapter, *self.compared)


class Cancel(Message, frozen=True):
    """Stop working on a request. Unknown or finished ids are ignored."""

    request_id: str


Command = Load | Generate | Score | Cancel


# --- events -----------------------------------------------------------------------------------


class Progress(Message, frozen=True):
    """Loading goes on: ``done`` of ``total`` bytes or counts of one phase."""

    phase: Phase
    done: float
    total: float


class SelfTest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was compared, and found equal, before the first request."""

    row_counts: tuple[int, ...]
    chunk_tokens: tuple[int, ...]
    num_comparisons: int


class ServerInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the worker has loaded, for `/info`.

    ``kernels_reason`` says why native kernels do not compute, where they could.
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
    kernels_reason: str | None
    context_tokens: int
    num_slots: int
    vocabulary_size: int
    num_layers: int
    hidden_dim: int
    buckets: dict[str, list[int]]
    programs: tuple[str, ...]
    has_tokenizer: bool
    self_test: SelfTest | None
    adapter_slots: int = 0
    adapter_max_rank: int = 0


class Ready(Message, frozen=True):
    """Everything is loaded, and ``num_compilations`` programs are compiled."""

    info: ServerInfo
    num_compilations: int


class LoadFailed(Message, frozen=True):
    """The engine cannot be loaded. ``detail`` is one line for the operator.

    ``is_permanent`` tells whether a restart would fail in the same way.
    """

    detail: str
    is_permanent: bool


class Accepted(Message, frozen=True):
    """The request holds a place; no admission error can follow.

    ``num_prompt_tokens`` has one entry per prompt, or per input of a score: the tokens of a
    context, or of a whole text.
    """

    request_id: str
    num_prompt_tokens: tuple[int, ...]


class TokenLogprob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One token with its log-probability under the model's own distribution."""

    id: int
    token: str
    bytes: tuple[int, ...]
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A generated token and the likeliest alternatives, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


class Piece(Message, frozen=True):
    """New tokens of one output and the text that they made safe to send.

    ``text`` never splits a character; it may be empty while one is incomplete, and it may hold the
    characters of earlier tokens. ``logprobs`` has one entry per token, or none.
    """

    request_id: str
    output: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]


class OutputEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one output ended. ``stop_reason`` is the stop string or stop id, if one ended it."""

    finish_reason: FinishReason
    stop_reason: str | int | None
    num_tokens: int


class Timings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds from admission: to the first slot, to the first token, to the end."""

    queue_seconds: float
    first_token_seconds: float | None
    total_seconds: float


class Finished(Message, frozen=True):
    """The last event of a request that ended normally; one entry per output, in order.

    ``num_cached_tokens`` of its prompts were not prefilled, as an earlier prompt had left them.
    """

    request_id: str
    outputs: tuple[OutputEnd, ...]
    timings: Timings
    num_cached_tokens: int = 0


class TokenScore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One token of a target.

    Attributes:
        token: With its log-probability.
        position: Where it stands, or would stand, in its text.
        rank: How many tokens come before it there.
        top: The likeliest, best first.
    """

    token: TokenLogprob
    position: int
    rank: int
    top: tuple[TokenLogprob, ...]


class TargetScore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One target: the sum of its log-probabilities, and ``tokens`` if they are to be told.

    ``is_greedy`` tells whether each of its tokens is the likeliest one.
    """

    logprob: float
    is_greedy: bool
    num_tokens: int
    num_bytes: int
    tokens: tuple[TokenScore, ...]


class CapturedStream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The residual stream of one text at one layer: ``numbers``, little-endian, by position."""

    target_index: int
    layer: int
    positions: tuple[int, ...]
    is_half: bool
    numbers: bytes


class TokenAttribution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token of a text, by its place there, and what was traced back to it."""

    id: int
    token: str
    score: float


class InputAttribution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an input's log-probabilities were traced back to.

    Attributes:
        num_tokens: Leading tokens of the text that are told.
        tokens: One entry for each, unless all their numbers are told.
        tensor: All numbers, token by token, if they are: float32, little-endian.
        completeness_error: Of integrated gradients.
    """

    num_tokens: int
    tokens: tuple[TokenAttribution, ...]
    tensor: bytes
    completeness_error: float | None


class InputScore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The targets of one input, in order; ``num_prompt_tokens`` as in `Accepted`.

    ``logits``, if they are to be told, are those in front of each token of the target, one row
    behind the other: float32, little-endian. ``captures`` come target by target, in the order of
    the request, each layer by itself.
    """

    num_prompt_tokens: int
    targets: tuple[TargetScore, ...]
    logits: bytes = b""
    captures: tuple[CapturedStream, ...] = ()
    attribution: InputAttribution | None = None


class TargetDivergence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a version is from the first where the tokens of a target are expected.

    ``per_token`` has KL(first ‖ version) for each of them, in nats over the whole vocabulary.
    """

    input_index: int
    target_index: int
    version: int
    per_token: tuple[float, ...]


class Scored(Message, frozen=True):
    """The last event of a request of scores that ended normally; one entry per input, in order.

    ``compared`` has as many for each further version, which ``divergences`` compare with the first.
    """

    request_id: str
    inputs: tuple[InputScore, ...]
    timings: Timings
    compared: tuple[tuple[InputScore, ...], ...] = ()
    divergences: tuple[TargetDivergence, ...] = ()


class Failed(Message, frozen=True):
    """The last event of a request that did not.

    ``code`` is a key of the error table; ``pointer`` names the wrong part of the command as a JSON
    pointer, if one is wrong: ``/prompt/3/17``, with the number of the prompt even if it is alone.
    """

    request_id: str
    code: str
    detail: str
    pointer: str | None = None
    retry_after_seconds: int | None = None


class Heartbeat(Message, frozen=True):
    """The worker's loop, seen from another of its threads.

    Attributes:
        turn: Counts the loop's turns; a loop that hangs stops counting.
        phase: What the loop is doing.
        phase_seconds: For how long.
        num_running: Requests that hold a slot.
        num_waiting: Requests admitted and without a slot.
        num_waiting_tokens: Prompt tokens of all that wait.
        num_compilations: Programs compiled since the worker started.
        work: Tokens computed since then.
        num_scoring: Requests of scores that are being read.
        num_scores_waiting: Those admitted of which nothing has been read.
        adapters: Of the bank.
        training_seconds: That the loop trained since then.
    """

    turn: int
    phase: Phase
    phase_seconds: float
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_compilations: int
    work: WorkCounts = WorkCounts()
    num_scoring: int = 0
    num_scores_waiting: int = 0
    adapters: AdapterCounts = AdapterCounts()
    training_seconds: float = 0.0


Event = Progress | Ready | LoadFailed | Accepted | Piece | Finished | Scored | Failed | Heartbeat
RequestEvent = Accepted | Piece | Finished | Scored | Failed
EndOfRequest = Finished | Scored | Failed
