"""The engine: slots on one accelerator, prefilled in chunks and decoded together.

`load` opens a preset, puts its weights on the device and compiles the closed set of programs:

* ``decode[rows]``: one whole step for 2, 4, 8 … rows (a lone row runs beside an empty one);
* ``embed[tokens]`` and ``block[tokens, positions]``: one chunk of a prompt, block by block, one
  program for all layers whose cache has the same number of positions;
* ``copy``: the blocks of one slot's prompt into another slot, all layers.

See `model.slots` for the life of a sequence.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import Family, GemmaConfig
from model.decode import DecodeInputs, decode_step
from model.errors import SequenceTooLong, TokenOutOfRange, UnsupportedPreset
from model.gemma import kv_cache
from model.gemma.backbone import Backbone
from model.gemma.block import layer_traits
from model.ids_only import IdsOnly
from model.prefill import CHUNK_BUCKETS, embed_chunk, prefill_block
from model.presets.converted import ConvertedPreset
from model.presets.resolve import IS_INSTRUCT, open_preset
from model.programs import CompilationCounter, ProgramSpec, use_compile_cache
from model.progress import Progress
from model.samplers.draw import SamplingRows
from model.samplers.penalties import PenaltyRows
from model.self_test import KeysAndValues, compare_bits, read_position
from model.self_test_record import claim_of, keep_result, kept_result
from model.slot_copy import copy_slot
from model.slot_memory import BLOCK_TOKENS
from model.slots import (
    MAX_BANNED_IDS,
    MAX_BIASES,
    DecodeRow,
    EngineInfo,
    EngineOptions,
    SampledToken,
    Sampling,
    SelfTest,
    TextCodec,
)
from model.tokenizer import Tokenizer
from model.weight_names import num_parameters

_ROW_BUCKETS = (2, 4, 8)

_logger = logging.getLogger(__name__)


def load(options: EngineOptions, progress: Progress) -> "GemmaEngine":
    """Opens the preset, loads its weights, compiles every program and tries them.

    Raises:
        PresetError: The preset cannot be served, or not with these options; the message names the
            file, the tensor or the number.
        SelfTestFailed: Here answers would depend on their company.
    """
    programs_dir = use_compile_cache(options.cache_dir)
    counter = CompilationCounter()
    preset = open_preset(options.preset, options.cache_dir, progress=progress)
    config = preset.config
    _check_context(options, config)
    codec = _codec(preset)
    backbone = Backbone(config, _device_arrays(preset, progress), dtype="float32")
    engine = GemmaEngine(backbone, codec, options, preset, counter)
    engine.compile(progress, programs_dir)
    return engine


def _codec(preset: ConvertedPreset) -> TextCodec:
    proto = preset.tokenizer_proto()
    if proto is None:
        _logger.warning("The preset has no tokenizer: only token ids are taken and given.")
        return IdsOnly(preset.config.vocabulary_size)
    return Tokenizer(proto, stops_at_end_of_turn=preset.config.family is Family.GEMMA3)


def _check_context(options: EngineOptions, config: GemmaConfig) -> None:
    if options.context_tokens > config.context_tokens:
        raise UnsupportedPreset(
            f"A context of {options.context_tokens} tokens is more than the "
            f"{config.context_tokens} that {options.preset!r:.200} was trained for. "
            "Lower --context-tokens."
        )


def _device_arrays(preset: ConvertedPreset, progress: Progress) -> dict[str, jax.Array]:
    """Every weight on the device, one after another so that only one is held twice.

    On a CPU none is: the device reads the mapped file where it lies.
    """
    total = 4.0 * num_parameters(preset.config)
    done = 0.0
    arrays: dict[str, jax.Array] = {}
    for name, array in preset.arrays():
        arrays[name] = jax.device_put(array).block_until_ready()
        done += array.nbytes
        progress("load", done, total)
    return arrays


class GemmaEngine:
    """A loaded Gemma with its cache and programs; an `model.slots.Engine`. One thread calls it."""

    def __init__(
        self,
        backbone: Backbone,
        codec: TextCodec,
        options: EngineOptions,
        preset: ConvertedPreset,
        counter: CompilationCounter,
    ) -> None:
        self.codec = codec
        self._config: GemmaConfig = backbone.config
        self._weights = backbone.gemma_weights
        self._options = options
        # Kept while the weights are: it holds the cache entry in which they lie.
        self._preset = preset
        self._counter = counter
        self._traits = layer_traits(self._config)
        self._caches = kv_cache.allocate(
            self._config, options.num_slots, options.context_tokens, jnp.dtype("float32")
        )
        self._row_buckets = row_buckets(options.num_slots)
        self._programs: dict[str, Callable[..., Any]] = {}
        self._self_test: SelfTest | None = None
        self._no_penalties: dict[int, PenaltyRows] = {}

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
            kernels=("xla",),
            context_tokens=self._options.context_tokens,
            num_slots=self._options.num_slots,
            vocabulary_size=self._config.vocabulary_size,
            num_layers=self._config.num_layers,
            hidden_dim=self._config.hidden_dim,
            chunk_tokens=BLOCK_TOKENS,
            buckets={"decode_rows": list(self._row_buckets), "prefill_tokens": [*CHUNK_BUCKETS]},
            programs=tuple(self._programs),
            has_tokenizer=self.codec.bos_id is not None,
            self_test=self._self_test,
        )

    def compile(self, progress: Progress, programs_dir: Path) -> None:
        """Makes every program that a request can need, and tries those that are new here."""
        specs = self._program_specs()
        total = len(specs) + 1.0
        texts = {}
        for done, spec in enumerate(specs):
            progress("compile", float(done), total)
            lowered = spec.lower()
            texts[spec.name] = lowered.as_text()
            self._programs[spec.name] = lowered.compile()
        progress("compile", total - 1, total)
        claim = claim_of(texts, self._preset.preset_digest)
        self._self_test = kept_result(programs_dir, claim)
        if self._self_test is None:
            # It runs every program, so there is nothing left to warm up.
            self._self_test = compare_bits(self)
            keep_result(programs_dir, claim, self._self_test)
        else:
            self._warm_up()
        progress("compile", total, total)

    def _warm_up(self) -> None:
        """Runs every program once: a first call costs tens of milliseconds that no request pays.

        What it writes into slots is never seen, as whatever a slot holds at its start.
        """
        for bucket in CHUNK_BUCKETS:
            self.prefill(0, [0] * min(bucket, self._options.context_tokens), 0)
        self.copy(0, [0], 1)
        sampling = Sampling(
            temperature=1.0,
            top_k=1,
            top_p=0.5,
            seed=0,
            min_p=0.1,
            repetition_penalty=1.1,
            logit_bias=((0, 1.0),),
        )
        for bucket in self._row_buckets:
            num_rows = min(bucket, self._options.num_slots)
            self._decode_group(
                [DecodeRow(slot, 0, 0, sampling, (0,), 1) for slot in range(num_rows)]
            )

    def prefill(self, slot: int, token_ids: Sequence[int], start: int) -> None:
        """Writes the keys and values of one chunk of a prompt into its slot."""
        self._check_tokens(token_ids)
        if start % BLOCK_TOKENS or start + len(token_ids) > self._options.context_tokens:
            raise SequenceTooLong(
                f"A chunk of {len(token_ids)} tokens cannot start at {start}: chunks start at "
                f"multiples of {BLOCK_TOKENS} and end within {self._options.context_tokens} tokens."
            )
        bucket = next(size for size in CHUNK_BUCKETS if size >= len(token_ids))
        padded = np.zeros((1, bucket), np.int32)
        padded[0, : len(token_ids)] = token_ids
        positions = np.arange(start, start + bucket, dtype=np.int32)[None]
        slots = np.array([slot], np.int32)
        x = self._programs[f"embed[{bucket}]"](self._weights.embeddings, padded)
        for layer, cache in enumerate(self._caches):
            program = self._programs[f"block[{bucket},{cache.num_positions}]"]
            x, self._caches[layer] = program(
                self._weights.blocks[layer], self._traits[layer], cache, x, positions, slots
            )

    def copy(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        """Gives ``targets`` the first ``num_tokens`` positions of ``source``, in whole blocks."""
        num_blocks = np.int32(-(-num_tokens // BLOCK_TOKENS))
        for target in targets:
            self._caches = self._programs["copy"](
                self._caches, np.int32(source), np.int32(target), num_blocks
            )

    def decode(self, rows: Sequence[DecodeRow]) -> list[SampledToken]:
        """One step for 1 to ``num_slots`` rows, in dispatches of at most eight."""
        self._check_tokens([row.token_id for row in rows])
        largest = self._row_buckets[-1]
        groups = [rows[first : first + largest] for first in range(0, len(rows), largest)]
        return [token for group in groups for token in self._decode_group(group)]

    def _decode_group(self, rows: Sequence[DecodeRow]) -> list[SampledToken]:
        bucket = next(size for size in self._row_buckets if size >= len(rows))
        inputs = self._decode_inputs(rows, bucket)
        self._caches, outputs = self._programs[f"decode[{bucket}]"](
            self._weights, self._traits, self._caches, inputs
        )
        token_ids, is_finite, logprobs, top_ids, top_logprobs = jax.device_get(outputs)
        sampled = []
        for index, row in enumerate(rows):
            if row.num_logprobs is None:
                token = SampledToken(int(token_ids[index]), is_finite=bool(is_finite[index]))
            else:
                alternatives = zip(
                    top_ids[index, : row.num_logprobs].tolist(),
                    top_logprobs[index, : row.num_logprobs].tolist(),
                    strict=True,
                )
                token = SampledToken(
                    int(token_ids[index]),
                    float(logprobs[index]),
                    tuple(alternatives),
                    bool(is_finite[index]),
                )
            sampled.append(token)
        return sampled

    def keys_and_values(self, slot: int, position: int) -> KeysAndValues:
        """What stands at one position of a slot, for the self-test."""
        return np.asarray(read_position(self._caches, np.int32(slot), np.int32(position)))

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        """JAX clamps a bad index silently, so none may get there."""
        bad = [id_ for id_ in token_ids if not 0 <= id_ < self._config.vocabulary_size]
        if bad:
            raise TokenOutOfRange(
                f"Token id {bad[0]} is not in [0, {self._config.vocabulary_size})."
            )

    def _decode_inputs(self, rows: Sequence[DecodeRow], bucket: int) -> DecodeInputs:
        vocab = self._config.vocabulary_size

        def column(values: Sequence[float | int], dtype: Any, filler: float | int) -> jax.Array:
            return jnp.asarray(np.array([*values, *[filler] * (bucket - len(rows))], dtype))

        banned = np.full((bucket, MAX_BANNED_IDS), vocab, np.int32)
        for index, row in enumerate(rows):
            banned[index, : len(row.banned_ids)] = row.banned_ids
        return DecodeInputs(
            token_ids=column([row.token_id for row in rows], np.int32, 0),
            positions=column([row.position for row in rows], np.int32, 0),
            slots=column([row.slot for row in rows], np.int32, self._options.num_slots),
            sampling=SamplingRows(
                temperature=column([row.sampling.temperature for row in rows], np.float32, 0),
                top_k=column([row.sampling.top_k for row in rows], np.int32, 0),
                top_p=column([row.sampling.top_p for row in rows], np.float32, 1),
                min_p=column([row.sampling.min_p for row in rows], np.float32, 0),
                seeds=column([row.sampling.seed for row in rows], np.uint32, 0),
            ),
            penalties=self._penalty_rows(rows, bucket),
            banned_ids=jnp.asarray(banned),
            wants_logprobs=column([row.num_logprobs is not None for row in rows], np.bool_, 0),
        )

    def _penalty_rows(self, rows: Sequence[DecodeRow], bucket: int) -> PenaltyRows:
        """The penalties of a step; one that has none reuses the arrays of the last such step."""
        if not any(row.sampling.has_penalties or row.sampling.logit_bias for row in rows):
            if bucket not in self._no_penalties:
                self._no_penalties[bucket] = self._make_penalty_rows((), bucket)
            return self._no_penalties[bucket]
        return self._make_penalty_rows(rows, bucket)

    def _make_penalty_rows(self, rows: Sequence[DecodeRow], bucket: int) -> PenaltyRows:
        vocab = self._config.vocabulary_size
        factors = np.tile(np.array([[1.0], [0.0], [0.0]], np.float32), bucket)
        history = np.full((bucket, self._options.context_tokens), vocab, np.int32)
        num_prompt = np.zeros(bucket, np.int32)
        bias_ids = np.full((bucket, MAX_BIASES), vocab, np.int32)
        biases = np.zeros((bucket, MAX_BIASES), np.float32)
        for index, row in enumerate(rows):
            sampling = row.sampling
            if sampling.has_penalties:
                factors[:, index] = (
                    sampling.repetition_penalty,
                    sampling.presence_penalty,
                    sampling.frequency_penalty,
                )
                num_prompt[index] = len(row.prompt)
                tokens = (*row.prompt, *row.generated)
                history[index, : len(tokens)] = tokens
            for place, (token_id, bias) in enumerate(sampling.logit_bias):
                bias_ids[index, place], biases[index, place] = token_id, bias
        arrays = (*factors, history, num_prompt, bias_ids, biases)
        return PenaltyRows(*map(jnp.asarray, arrays))

    def _program_specs(self) -> list[ProgramSpec]:
        specs = [
            ProgramSpec(
                f"decode[{bucket}]",
                partial(decode_step, self._config),
                (self._weights, self._traits, self._caches, self._decode_inputs((), bucket)),
                donated=(2,),
            )
            for bucket in self._row_buckets
        ]
        # Layers with the same number of positions share a program; any of them gives the shapes.
        layer_of_size = {cache.num_positions: i for i, cache in enumerate(self._caches)}
        for bucket in CHUNK_BUCKETS:
            token_ids = _shaped((1, bucket), jnp.int32)
            x = _shaped((1, bucket, self._config.hidden_dim), jnp.float32)
            embeddings = self._weights.embeddings
            specs.append(ProgramSpec(f"embed[{bucket}]", embed_chunk, (embeddings, token_ids)))
            specs.extend(self._block_spec(size, i, x) for size, i in layer_of_size.items())
        number = _shaped((), jnp.int32)
        arguments = (self._caches, number, number, number)
        specs.append(ProgramSpec("copy", copy_slot, arguments, donated=(0,)))
        return specs

    def _block_spec(self, size: int, layer: int, x: jax.ShapeDtypeStruct) -> ProgramSpec:
        bucket = x.shape[1]
        positions = _shaped((1, bucket), jnp.int32)
        slots = _shaped((1,), jnp.int32)
        weights, traits = self._weights.blocks[layer], self._traits[layer]
        return ProgramSpec(
            f"block[{bucket},{size}]",
            partial(prefill_block, self._config),
            (weights, traits, self._caches[layer], x, positions, slots),
            donated=(2, 3),
        )


def row_buckets(num_slots: int) -> tuple[int, ...]:
    """Row counts of the decode programs for ``num_slots`` slots.

    A lone row runs as two, so that it meets the same products as in company; more than eight rows
    run as several dispatches, which is faster than one of twelve or sixteen.
    """
    needed = next((rows for rows in _ROW_BUCKETS if rows >= num_slots), _ROW_BUCKETS[-1])
    return tuple(rows for rows in _ROW_BUCKETS if rows <= needed)


def _shaped(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
