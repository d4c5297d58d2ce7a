"""The engine: slots on one accelerator, prefilled in chunks and decoded together.

`load` opens a preset, puts its weights on the device, compiles the closed set of programs
(`model.engine_programs`) and tries them. See `model.slots` for the life of a sequence.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from model.adapter_bank import Adapter, AdapterBank
from model.attribution_questions import (
    MAX_ATTRIBUTION_TOKENS,
    PASS_TOKENS,
    Attribution,
    AttributionQuestion,
)
from model.attributions import Attributions
from model.chunk_stream import ChunkStream, ChunkStreams
from model.config import GemmaConfig
from model.decode import SlotStates
from model.dispatch import DeviceDispatch, DispatchPart
from model.engine_adapters import EngineAdapters
from model.engine_programs import ProgramSet, row_buckets
from model.errors import RequestInvalid, SequenceTooLong, TokenOutOfRange, UnsupportedPreset
from model.finetune.engine_trainer import engine_trainer
from model.gemma import kv_cache
from model.gemma.backbone import Backbone
from model.gemma.block import layer_traits
from model.gemma.forward import EMBEDDING_LAYER
from model.gemma.kv_cache import LayerCache
from model.intervention_rows import InterventionArrays
from model.joined_turn import JOINED_ROWS, JOINED_TOKENS, JoinedTurns
from model.kernels.library import Kernels, load_kernels
from model.logits_room import LogitsRoom
from model.opened_preset import arrays_on_device, codec_of
from model.prefill import CHUNK_BUCKETS, MAX_PACKED_PROMPTS, PACKED_TOKENS, ChunkRows, chunk_of
from model.prefix_store import PrefixStore
from model.presets.converted import ConvertedPreset
from model.presets.resolve import IS_INSTRUCT, open_preset
from model.process_memory import give_back_freed_memory, reuse_freed_memory
from model.programs import CompilationCounter, use_compile_cache
from model.progress import Progress
from model.rule_rows import RuleArrays
from model.score_head import head_places, head_places_of_step
from model.score_self_test import compare_scores
from model.score_slots import SCORE_SLOTS, AskedPlace, PlaceScore, Residual, ScoreChunk
from model.scores import Scores, wanted_residuals
from model.search_slots import BeamStep, CandidateStep, Choice, Extension
from model.searches import Searches
from model.self_test import KeysAndValues, compare_bits, read_position
from model.self_test_record import claim_of, keep_result, kept_result
from model.slot_blocks import KeptBlock
from model.slot_memory import BLOCK_TOKENS, block_bytes
from model.slots import (
    MAX_STEPS,
    AdapterForm,
    AdapterLayout,
    DecodeRow,
    EngineInfo,
    EngineOptions,
    PromptChunk,
    SelfTest,
    TextCodec,
)
from model.training_self_test import compare_training
from model.warm_up import call_slot_programs
from model.weight_names import num_parameters

_logger = logging.getLogger(__name__)


def load(options: EngineOptions, progress: Progress) -> "GemmaEngine":
    """Opens the preset, loads its weights, compiles every program and tries them.

    Raises:
        PresetError: The preset cannot be served, or not with these options; the message names the
            file, the tensor or the number.
        SelfTestFailed: Here answers would depend on their company.
        KernelsUnavailable: Native kernels were asked for, and there are none.
    """
    reuse_freed_memory()
    kernels = load_kernels(options.kernels)
    _logger.info("kernels: %s", kernels)
    programs_dir = use_compile_cache(options.cache_dir)
    counter = CompilationCounter()
    preset = open_preset(options.preset, options.cache_dir, progress=progress)
    config = preset.config
    _check_context(options, config)
    codec = codec_of(preset)
    backbone = Backbone(config, arrays_on_device(preset, progress), dtype="float32")
    engine = GemmaEngine(backbone, codec, options, preset, counter, kernels)
    engine.compile(progress, programs_dir)
    return engine


def _check_context(options: EngineOptions, config: GemmaConfig) -> None:
    if options.context_tokens > config.context_tokens:
        raise UnsupportedPreset(
            f"A context of {options.context_tokens} tokens is more than the "
            f"{config.context_tokens} that {options.preset!r:.200} was trained for. "
            "Lower --context-tokens."
        )


class GemmaEngine:
    """A loaded Gemma with its slots and programs; a `model.slots.Engine`. One thread calls it."""

    def __init__(
        self,
        backbone: Backbone,
        codec: TextCodec,
        options: EngineOptions,
        preset: ConvertedPreset,
        counter: CompilationCounter,
        kernels: Kernels,
    ) -> None:
        self.codec = codec
        self._config: GemmaConfig = backbone.config
        self._weights = backbone.gemma_weights
        self._options = options
        # Kept while the weights are: it holds the cache entry in which they lie.
        self._preset = preset
        self._counter = counter
        self._kernels = kernels
        self._programs: dict[str, Callable[..., Any]] = {}
        self._row_buckets = row_buckets(options.num_slots, is_native=kernels.is_native)
        self._traits = layer_traits(self._config)
        self._bank = AdapterBank(
            self._config,
            num_slots=options.adapter_slots,
            max_rank=options.adapter_max_rank,
            programs=self._programs,
        )
        self._adapters = EngineAdapters(self._config, self._bank)
        context = options.context_tokens
        # Those of texts that are scored stand behind those of sequences.
        self._num_all_slots = options.num_slots + SCORE_SLOTS
        self._states = SlotStates(
            jnp.zeros((self._num_all_slots, context), jnp.int32),
            kv_cache.allocate(self._config, self._num_all_slots, context, jnp.dtype("float32")),
        )
        self._prefixes = PrefixStore(options.prefix_cache_bytes, block_bytes(self._config))
        self._rules = RuleArrays(self._config.vocabulary_size)
        self._interventions = InterventionArrays(self._config.num_layers, self._config.hidden_dim)
        self._self_test: SelfTest | None = None
        self._searches = Searches(
            self._config,
            self._weights,
            self._traits,
            num_slots=options.num_slots,
            num_cache_slots=self._num_all_slots,
            context_tokens=context,
            programs=self._programs,
            copy_blocks=self._copy_blocks,
            interventions=self._interventions,
            bank=self._bank,
            is_native=kernels.is_native,
        )
        room = LogitsRoom(head_places(is_native=kernels.is_native), self._config.vocabulary_size)
        self._scores = Scores(
            self._config, self._weights, self._programs, room, is_native=kernels.is_native
        )
        self._joined: JoinedTurns | None = None
        if kernels.is_native:
            self._joined = JoinedTurns(
                *(self._config, self._weights, self._traits, self._rules, self._bank),
                num_rows=min(options.num_slots, JOINED_ROWS),
                programs=self._programs,
            )
        self._streams = ChunkStreams(self._config, self._weights, self._programs)
        self._attributions = Attributions(
            *(self._config, self._weights, self._traits, self._programs, self._streams, room),
            is_native=kernels.is_native,
        )
        self._batches, self.trainer = engine_trainer(
            self._config,
            self._weights,
            self._traits,
            self._programs,
            max_rank=options.adapter_max_rank if options.adapter_slots else 0,
            is_native=kernels.is_native,
        )

    @property
    def num_compilations(self) -> int:
        """Programs compiled, or fetched from the compile cache, since the process started."""
        return self._counter.count

    @property
    def info(self) -> EngineInfo:
        """What was loaded."""
        device = jax.devices()[0]
        return EngineInfo(
            preset=self._options.preset,
            preset_digest=self._preset.preset_digest,
            family=self._config.family,
            is_instruct=IS_INSTRUCT.get(self._options.preset),
            num_parameters=num_parameters(self._config),
            dtype="float32",
            backend=jax.default_backend(),
            device=device.device_kind,
            kernels=self._kernels.name,
            kernels_reason=self._kernels.reason or None,
            context_tokens=self._options.context_tokens,
            num_slots=self._options.num_slots,
            vocabulary_size=self._config.vocabulary_size,
            num_layers=self._config.num_layers,
            hidden_dim=self._config.hidden_dim,
            chunk_tokens=BLOCK_TOKENS,
            packed_tokens=PACKED_TOKENS,
            packed_prompts=MAX_PACKED_PROMPTS,
            joined_tokens=JOINED_TOKENS if self._joined else 0,
            joined_rows=JOINED_ROWS if self._joined else 0,
            head_places=head_places(is_native=self._kernels.is_native),
            head_places_of_step=head_places_of_step(is_native=self._kernels.is_native),
            keeps_prefixes=self._prefixes.max_blocks > 0,
            buckets={
                "decode_rows": [*self._row_buckets],
                "search_rows": [*self._searches.row_buckets],
                "prefill_tokens": [*CHUNK_BUCKETS],
                "attribution_tokens": [*PASS_TOKENS],
            },
            programs=tuple(self._programs),
            has_tokenizer=self.codec.bos_id is not None,
            self_test=self._self_test,
            adapter_slots=self._bank.num_slots,
            adapter_max_rank=self._bank.max_rank if self._bank.num_slots else 0,
        )

    def compile(self, progress: Progress, programs_dir: Path) -> None:
        """Makes every program that a request can need, and tries those that are new here."""
        programs = ProgramSet(
            self._config,
            self._weights,
            self._traits,
            self._states,
            self._rules.fillers,
            self._interventions.none,
            self._bank,
            is_native=self._kernels.is_native,
            num_slots=self._options.num_slots,
        )
        todo = [
            *programs.specs(),
            *self._searches.program_specs(self._states.caches),
            *self._scores.program_specs(),
            *self._streams.program_specs(),
            *self._bank.program_specs(),
            *self._attributions.program_specs(),
            *(() if self._batches is None else self._batches.program_specs()),
        ]
        if self._joined:
            todo += self._joined.program_specs(self._states)
        total = len(todo) + 1.0
        texts = {}
        for done, spec in enumerate(todo):
            progress("compile", float(done), total)
            lowered = spec.lower()
            texts[spec.name] = lowered.as_text()
            self._programs[spec.name] = lowered.compile()
        progress("compile", total - 1, total)
        kernels = f"{self._kernels.name} {self._kernels.library}"
        claim = claim_of(texts, self._preset.preset_digest, kernels)
        self._self_test = kept_result(programs_dir, claim)
        if self._self_test is None:
            passed = compare_bits(self)
            num_compared = passed.num_comparisons + compare_scores(self)
            if self._batches is not None:
                one_block = self._batches.of_one_block()
                num_compared += compare_training(self.info, self._config, one_block)
            self._self_test = replace(passed, num_comparisons=num_compared)
            keep_result(programs_dir, claim, self._self_test)
        self._warm_up()
        progress("compile", total, total)

    def _warm_up(self) -> None:
        """Runs every program once."""
        call_slot_programs(self)
        kept, _ = self._take(0, 0)
        self._put(0, 0, kept)
        self._set_caches(self._searches.warm_up(self._states.caches))
        self._streams.warm_up()
        self._attributions.warm_up()
        if self.trainer is not None:
            self.trainer.warm_up()
        give_back_freed_memory()

    def begin(self, slot: int, token_ids: Sequence[int]) -> None:
        """Gives a slot to a prompt."""
        self._check_tokens(token_ids)
        prompt = np.zeros(self._options.context_tokens, np.int32)
        prompt[: len(token_ids)] = token_ids
        tokens = self._programs["begin"](self._states.tokens, _number(slot), prompt)
        self._states = self._states._replace(tokens=tokens)

    def prefill(self, chunks: Sequence[PromptChunk]) -> Iterator[None]:
        """Writes keys and values, one layer between two values that are taken."""
        for chunk in chunks:
            self._check_chunk(chunk, is_alone=len(chunks) == 1)
            if chunk.start % BLOCK_TOKENS and not self._joined:
                raise SequenceTooLong(
                    f"A chunk of a prompt cannot start at {chunk.start}: it starts at a multiple "
                    f"of {BLOCK_TOKENS}."
                )
        x = yield from self._run_blocks(chunks, self._streams.of(chunks))
        self._searches.note_chunks(chunks, x)

    def read(self, chunks: Sequence[ScoreChunk]) -> Generator[None, None, list[Residual]]:
        """Reads chunks of texts; see `model.score_slots`."""
        first = self._options.num_slots
        placed = [
            PromptChunk(
                first + each.slot, each.token_ids, each.start, each.touches, adapter=each.adapter
            )
            for each in chunks
        ]
        for chunk in placed:
            self._check_chunk(chunk, is_alone=len(chunks) == 1)
        stream = self._streams.of(placed, [chunk.captures for chunk in chunks])
        x = yield from self._run_blocks(placed, stream)
        return wanted_residuals(chunks, x, stream)

    def measure(self, places: Sequence[AskedPlace]) -> list[PlaceScore]:
        """Log-probabilities behind places that were read."""
        for place in places:
            self._check_tokens(place.token_ids)
        return self._scores.measure(places)

    def attribute(self, question: AttributionQuestion) -> Generator[bool, None, Attribution]:
        """What log-probabilities depend on; see `model.attribution_questions`."""
        self._check_question(question)
        return (yield from self._attributions.attribute(question))

    def _run_blocks(
        self, chunks: Sequence[PromptChunk], stream: ChunkStream
    ) -> Generator[None, None, jax.Array]:
        """The residual stream of chunks after the last block; one layer between two values."""
        token_ids, rows = chunk_of(chunks)
        bucket = token_ids.shape[1]
        x: jax.Array = self._programs[f"embed[{bucket}]"](self._weights.embeddings, token_ids)
        x = stream.begin(token_ids, x)
        for layer in range(self._config.num_layers):
            x = self._run_block(layer, x, rows)
            x = stream.go_on(token_ids, x, layer)
            # Whoever pauses here does so by the clock.
            x.block_until_ready()
            yield
        return x

    def _run_block(self, layer: int, x: jax.Array, rows: ChunkRows) -> jax.Array:
        cache = self._states.caches[layer]
        program = self._programs[f"block[{x.shape[1]},{cache.num_positions}]"]
        after, self._states.caches[layer] = program(
            *(self._weights.blocks[layer], self._traits[layer], cache, x, rows),
            *(self._bank.layer(layer), self._bank.ranks),
        )
        stream: jax.Array = after
        return stream

    def join(self, chunks: Sequence[PromptChunk], rows: Sequence[DecodeRow]) -> DeviceDispatch:
        """Starts a step of ``rows`` together with parts of prompts; see `model.slots.Engine`."""
        assert self._joined is not None, "the info says that there is none"
        for chunk in chunks:
            self._check_chunk(chunk, is_alone=False)
        for row in rows:
            self._checked_adapter(row.adapter)
        self._states, x, parts = self._joined.take(self._states, chunks, rows)
        self._searches.note_chunks(chunks, x)
        return DeviceDispatch(parts)

    def copy(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        """Gives ``targets`` the first ``num_tokens`` positions of ``source``, in whole blocks."""
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        for target in targets:
            self._set_caches(self._copy_blocks(self._states.caches, source, target, 0, num_blocks))

    def _copy_blocks(
        self, caches: list[LayerCache], source: int, target: int, first: int, end: int
    ) -> list[LayerCache]:
        copied: list[LayerCache] = self._programs["copy"](
            caches, *map(_number, (source, target, first, end))
        )
        return copied

    def keep(self, slot: int, keys: Sequence[bytes]) -> None:
        """Keeps a block, unless it is there already; if it is not finite, nobody gets it."""
        if self._prefixes.wants(keys[-1]):
            self._prefixes.add(keys, *self._take(slot, len(keys) - 1))

    def restore(self, slot: int, keys: Sequence[bytes]) -> int:
        """Gives a slot the leading blocks that were kept under ``keys``; returns their number."""
        blocks = self._prefixes.leading(keys)
        for index, block in enumerate(blocks):
            self._put(slot, index, block)
        return len(blocks)

    def _take(self, slot: int, block: int) -> tuple[KeptBlock, Bool[Array, ""]]:
        taken: tuple[KeptBlock, Bool[Array, ""]] = self._programs["take"](
            self._states.caches, _number(slot), _number(block)
        )
        return taken

    def _put(self, slot: int, block: int, kept: KeptBlock) -> None:
        self._set_caches(
            self._programs["put"](self._states.caches, _number(slot), _number(block), kept)
        )

    def _set_caches(self, caches: list[LayerCache]) -> None:
        self._states = self._states._replace(caches=caches)

    def decode(self, rows: Sequence[DecodeRow], num_steps: int) -> DeviceDispatch:
        """Starts up to ``num_steps`` steps of all ``rows``, in one program or several."""
        if not 1 <= num_steps <= MAX_STEPS:
            raise ValueError(f"A dispatch holds 1 to {MAX_STEPS} steps, not {num_steps}.")
        buckets = self._row_buckets
        groups = [rows[first : first + buckets[-1]] for first in range(0, len(rows), buckets[-1])]
        parts = []
        for group in groups:
            bucket = next(size for size in buckets if size >= len(group))
            slots = np.full(bucket, self._num_all_slots, np.int32)
            positions, adapters = np.zeros((2, bucket), np.int32)
            for index, row in enumerate(group):
                slots[index], positions[index] = row.slot, row.position
                adapters[index] = self._checked_adapter(row.adapter)
            rules = self._rules.of([row.rules for row in group], bucket)
            wanted = [row.rules.interventions for row in group]
            self._states, outputs = self._programs[f"decode[{bucket}]"](
                self._weights,
                self._traits,
                self._states,
                slots,
                positions,
                rules,
                self._interventions.of_drawing(wanted, bucket),
                _number(num_steps),
                self._bank.arrays,
                adapters,
            )
            parts.append(DispatchPart(group, outputs))
        return DeviceDispatch(parts)

    def read_adapter(self, path: Path, digest: str) -> Adapter:
        """Opens the files of an adapter version; see `model.slots.Engine`."""
        return self._adapters.read(path, digest)

    def open_adapter(self, content: bytes) -> Adapter:
        """An adapter of the bytes of a stored version."""
        return self._adapters.open(content)

    def adapter_form(self, content: bytes) -> AdapterForm:
        """What the adapter of such bytes is made of."""
        return self._adapters.form(content)

    def import_adapter(self, path: Path, format: AdapterLayout) -> bytes:
        """The bytes of the adapter in a file of another library."""
        return self._adapters.bring_in(path, format)

    def import_named_adapter(self, path: Path, digest: str) -> bytes:
        """The bytes of the adapter in files of any kind."""
        return self._adapters.bring_in_named(path, digest)

    def export_adapter(self, content: bytes, path: Path, format: AdapterLayout) -> None:
        """Writes an adapter as a file for another library."""
        self._adapters.take_out(content, path, format)

    def put_random_adapter(self, slot: int, rank: int) -> None:
        """For the self-test; see `EngineAdapters`."""
        self._adapters.put_random(slot, rank)

    def put_adapter(self, slot: int, adapter: Adapter) -> None:
        """Gives a slot of the bank to an adapter."""
        self._adapters.put(slot, adapter)

    def keep_hidden(self, slot: int) -> None:
        """Keeps the hidden states of this slot's next prompt, for a contrastive search."""
        self._searches.keep_hidden(slot)

    def drop_hidden(self, slot: int) -> None:
        """Frees them, if there are any."""
        self._searches.drop_hidden(slot)

    def step_beams(self, step: BeamStep) -> list[Extension]:
        """The likeliest continuations of a search's beams; see `model.search_slots`."""
        self._check_tokens([beam.token_id for beam in step.beams])
        self._checked_adapter(step.adapter)
        caches, extensions = self._searches.step_beams(self._states.caches, step)
        self._set_caches(caches)
        return extensions

    def step_candidates(self, step: CandidateStep) -> Choice | None:
        """The best of a search's candidates; see `model.search_slots`."""
        self._check_tokens(step.token_ids)
        self._checked_adapter(step.adapter)
        caches, choice = self._searches.step_candidates(self._states.caches, step)
        self._set_caches(caches)
        return choice

    def search_rows(
        self, slots: Sequence[int], token_ids: Sequence[int], positions: Sequence[int]
    ) -> Float32[np.ndarray, "rows numbers"]:
        """Hidden state and logits of each row of a step of a search, for the self-test."""
        found = self._searches.advance(self._states.caches, token_ids, positions, slots)
        self._set_caches(found.caches)
        both = (np.asarray(found.hidden), np.asarray(found.logits))
        return np.concatenate(both, axis=1)[: len(slots)]

    def keys_and_values(self, slot: int, position: int) -> KeysAndValues:
        """What stands at one position of a slot, for the self-test."""
        return np.asarray(read_position(self._states.caches, _number(slot), _number(position)))

    def _check_chunk(self, chunk: PromptChunk, *, is_alone: bool) -> None:
        self._check_tokens(chunk.token_ids)
        self._checked_adapter(chunk.adapter)
        num_tokens, context = len(chunk.token_ids), self._options.context_tokens
        longest = BLOCK_TOKENS if is_alone else PACKED_TOKENS
        end = chunk.start + num_tokens
        is_in_one_block = chunk.start // BLOCK_TOKENS == (end - 1) // BLOCK_TOKENS
        if not (1 <= num_tokens <= longest and end <= context and is_in_one_block):
            raise SequenceTooLong(
                f"A chunk of {num_tokens} tokens cannot start at {chunk.start}: chunks hold 1 to "
                f"{longest} tokens, end within {context} and lie within {BLOCK_TOKENS} tokens from "
                "a multiple of it."
            )

    def _check_question(self, question: AttributionQuestion) -> None:
        for text in question.texts:
            self._check_tokens([*text.token_ids, *(token_id for _, token_id in text.asked)])
            if not 0 < text.num_read <= min(len(text.token_ids), MAX_ATTRIBUTION_TOKENS):
                raise SequenceTooLong(
                    f"{text.num_read} tokens cannot be read of a text of {len(text.token_ids)}; "
                    f"attribution takes 1 to {MAX_ATTRIBUTION_TOKENS}."
                )
        if not EMBEDDING_LAYER <= question.layer < self._config.num_layers:
            raise RequestInvalid(
                f"There is no layer {question.layer}; they are {EMBEDDING_LAYER} to "
                f"{self._config.num_layers - 1}."
            )

    def _checked_adapter(self, slot: int) -> int:
        """A slot that the bank lacks would be taken for the base."""
        if not 0 <= slot <= self._bank.num_slots:
            raise ValueError(
                f"There is no adapter slot {slot}; the bank has {self._bank.num_slots}."
            )
        return slot

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        """JAX clamps a bad index silently, so none may get there."""
        bad = [id_ for id_ in token_ids if not 0 <= id_ < self._config.vocabulary_size]
        if bad:
            raise TokenOutOfRange(
                f"Token id {bad[0]} is not in [0, {self._config.vocabulary_size})."
            )


def _number(value: int) -> np.ndarray:
    return np.array(value, np.int32)
