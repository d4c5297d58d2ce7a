"""The host's side of beam and contrastive search: arguments in, results out, slots handed on.

Programs, all of them made and tried with those of the engine:

* ``advance[rows]``: the model for 4 or 8 rows of a search, in that many slots or fewer;
* ``beam`` and ``contrastive``: what comes of it, for eight rows;
* ``keep``: the hidden states of a chunk of a prompt.

The caches are the engine's: they are handed in, and back.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.adapter_bank import AdapterBank
from model.beam_step import BeamOutputs, BeamRows, extend_beams
from model.config import GemmaConfig
from model.contrastive_step import CandidateOutputs, CandidateRows, choose_candidate, keep_chunk
from model.decode import ModelRows
from model.gemma.block import LayerTraits
from model.gemma.kv_cache import LayerCache
from model.gemma.weights import GemmaWeights
from model.intervention_rows import InterventionArrays
from model.intervention_slots import Intervention
from model.programs import ProgramSpec
from model.search_rows import SEARCH_ROWS, SearchRuleArrays, advance_padded
from model.search_slots import (
    Beam,
    BeamStep,
    CandidateStep,
    Choice,
    Extension,
    SearchRules,
)
from model.slot_memory import BLOCK_TOKENS
from model.slots import MAX_BIASES, MAX_STOP_IDS, PromptChunk, SampledToken

_ROW_BUCKETS = (4, 8)
_WARM_RULES = SearchRules(banned_ids=(0,), logit_bias=((0, 1.0),), num_logprobs=1)

# (caches, source slot, target slot, first block, end block) -> caches
CopyBlocks = Callable[[list[LayerCache], int, int, int, int], list[LayerCache]]


def search_row_buckets(num_slots: int) -> tuple[int, ...]:
    """Row counts of the programs for searches over at most ``num_slots`` slots; none for one."""
    if num_slots < 2:
        return ()
    return tuple(rows for rows in _ROW_BUCKETS if rows == 4 or num_slots > 4)


class Searches:
    """The searches of one engine.

    Args:
        config: Of the model.
        weights: Of the model.
        traits: Of its layers.
        num_slots: In which sequences are searched for.
        num_cache_slots: Of the caches.
        context_tokens: Positions of a sequence.
        programs: Of the engine, filled by it.
        copy_blocks: Gives one slot blocks of another.
        interventions: Makes the arrays that rows take.
        bank: Of the engine.
        is_native: Products are made by the native kernel.
    """

    def __init__(
        self,
        config: GemmaConfig,
        weights: GemmaWeights,
        traits: list[LayerTraits],
        *,
        num_slots: int,
        num_cache_slots: int,
        context_tokens: int,
        programs: dict[str, Callable[..., Any]],
        copy_blocks: CopyBlocks,
        interventions: InterventionArrays,
        bank: AdapterBank,
        is_native: bool,
    ) -> None:
        self.row_buckets = search_row_buckets(num_slots)
        self._config = config
        self._weights = weights
        self._traits = traits
        self._num_cache_slots = num_cache_slots
        self._num_positions = -(-context_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        self._programs = programs
        self._copy_blocks = copy_blocks
        self._interventions = interventions
        self._bank = bank
        self._is_native = is_native
        # First slot of a contrastive search -> directions of the hidden states so far.
        self._directions: dict[int, jax.Array] = {}

    def program_specs(self, caches: list[LayerCache]) -> list[ProgramSpec]:
        """What is to be compiled; nothing if there are too few slots to search in."""
        if not self.row_buckets:
            return []
        config, vocab = self._config, self._config.vocabulary_size
        specs = [self._advance_spec(caches, rows) for rows in self.row_buckets]
        logits = _shaped((SEARCH_ROWS, vocab), jnp.float32)
        hidden = _shaped((SEARCH_ROWS, config.hidden_dim), jnp.float32)
        directions = _shaped((self._num_positions, config.hidden_dim), jnp.float32)
        rules = self._rule_arrays(SearchRules())
        beams = _beam_rows(())
        candidates = self._candidate_rows((), (), 0, 0.0)
        chunk = _shaped((1, BLOCK_TOKENS, config.hidden_dim), jnp.float32)
        start = _shaped((), jnp.int32)
        return [
            *specs,
            ProgramSpec("beam", extend_beams, (logits, beams, rules)),
            ProgramSpec(
                "contrastive",
                choose_candidate,
                (caches, directions, hidden, logits, candidates, rules),
                donated=(0, 1),
            ),
            ProgramSpec(
                "keep",
                partial(keep_chunk, config),
                (self._weights, directions, chunk, start),
                donated=(1,),
            ),
        ]

    def _advance_spec(self, caches: list[LayerCache], rows: int) -> ProgramSpec:
        numbers = _shaped((rows,), jnp.int32)
        model = (self._weights, self._traits, caches)
        return ProgramSpec(
            f"advance[{rows}]",
            partial(advance_padded, self._config, is_native=self._is_native),
            (
                *(*model, numbers, numbers, numbers),
                *(self._interventions.of_rows((), rows), self._bank.arrays, numbers),
            ),
            donated=(2,),
        )

    def keep_hidden(self, slot: int) -> None:
        """From now on the hidden states of this slot's prompt are kept."""
        shape = (self._num_positions, self._config.hidden_dim)
        self._directions[slot] = jax.device_put(np.zeros(shape, np.float32))

    def drop_hidden(self, slot: int) -> None:
        """Frees what was kept, if anything."""
        self._directions.pop(slot, None)

    def note_chunks(self, chunks: Sequence[PromptChunk], x: jax.Array) -> None:
        """Keeps the hidden states of those chunks whose slots keep theirs.

        ``x`` is the residual stream after the last block, one chunk behind the other. A chunk is
        padded on the host to the longest, so that one program serves all.
        """
        offset = 0
        for chunk in chunks:
            end = offset + len(chunk.token_ids)
            if chunk.slot in self._directions:
                self._note_chunk(chunk.slot, np.asarray(x)[:, offset:end], chunk.start)
            offset = end

    def _note_chunk(self, slot: int, x: np.ndarray, start: int) -> None:
        padded = np.zeros((1, BLOCK_TOKENS, x.shape[2]), np.float32)
        padded[:, : x.shape[1]] = x
        self._directions[slot] = self._programs["keep"](
            self._weights, self._directions[slot], padded, np.int32(start)
        )

    def warm_up(self, caches: list[LayerCache]) -> list[LayerCache]:
        """Runs every program once, as `model.engine.GemmaEngine` does with the others."""
        if not self.row_buckets:
            return caches
        for bucket in self.row_buckets:
            filler = [0] * bucket
            caches = self.advance(caches, filler, filler, [self._num_cache_slots] * bucket).caches
        caches, _ = self.step_beams(caches, BeamStep((0,), (Beam(0, 0, 0.0),), 0, 0, _WARM_RULES))
        self.keep_hidden(0)
        self._note_chunk(0, np.zeros((1, 1, self._config.hidden_dim), np.float32), 0)
        step = CandidateStep((0,), (0,), (1.0,), 0, 0.5, _WARM_RULES)
        caches, _ = self.step_candidates(caches, step)
        self.drop_hidden(0)
        return caches

    def step_beams(
        self, caches: list[LayerCache], step: BeamStep
    ) -> tuple[list[LayerCache], list[Extension]]:
        """See `model.slots.Engine.step_beams`."""
        live = [None if beam.is_done else beam for beam in step.beams]
        rows = self.advance(
            caches,
            [0 if beam is None else beam.token_id for beam in live],
            [0 if beam is None else step.position for beam in live],
            [self._num_cache_slots if beam is None else beam.slot for beam in live],
            step.rules.interventions,
            step.adapter,
        )
        found: BeamOutputs = jax.device_get(
            self._programs["beam"](
                rows.logits, _beam_rows(step.beams), self._rule_arrays(step.rules)
            )
        )
        if not found.is_finite:
            return rows.caches, []
        slots, copies = _hand_on(step, found.sources[: len(step.slots)].tolist())
        caches = rows.caches
        first, end = step.num_shared_tokens // BLOCK_TOKENS, step.position // BLOCK_TOKENS + 1
        for source, target in copies:
            caches = self._copy_blocks(caches, source, target, first, end)
        return caches, [_extension(step, found, index, slot) for index, slot in enumerate(slots)]

    def step_candidates(
        self, caches: list[LayerCache], step: CandidateStep
    ) -> tuple[list[LayerCache], Choice | None]:
        """See `model.slots.Engine.step_candidates`."""
        slot = step.slots[0]
        positions = [step.position] * len(step.slots)
        rows = self.advance(
            *(caches, step.token_ids, positions, step.slots),
            *(step.rules.interventions, step.adapter),
        )
        caches, self._directions[slot], outputs = self._programs["contrastive"](
            rows.caches,
            self._directions[slot],
            rows.hidden,
            rows.logits,
            self._candidate_rows(step.slots, step.probabilities, step.position, step.alpha),
            self._rule_arrays(step.rules),
        )
        found: CandidateOutputs = jax.device_get(outputs)
        if not found.is_finite:
            return caches, None
        count = len(step.slots)
        num_logprobs = step.rules.num_logprobs
        top = _pairs(found.top_ids, found.top_logprobs, num_logprobs)
        candidates = tuple(
            SampledToken(token_id, None if num_logprobs is None else logprob, top)
            for token_id, logprob in zip(
                found.token_ids[:count].tolist(), found.own_logprobs[:count].tolist(), strict=True
            )
        )
        return caches, Choice(
            int(found.place), candidates, tuple(found.probabilities[:count].tolist())
        )

    def advance(
        self,
        caches: list[LayerCache],
        token_ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        interventions: tuple[Intervention, ...] = (),
        adapter: int = 0,
    ) -> ModelRows:
        """The model for 1 to 8 rows of one search; results for eight."""
        bucket = next(size for size in self.row_buckets if size >= len(slots))
        rows: ModelRows = self._programs[f"advance[{bucket}]"](
            self._weights,
            self._traits,
            caches,
            _column(token_ids, bucket, np.int32, 0),
            _column(positions, bucket, np.int32, 0),
            _column(slots, bucket, np.int32, self._num_cache_slots),
            self._interventions.of_rows(interventions, bucket),
            self._bank.arrays,
            _column([adapter] * len(slots), bucket, np.int32, 0),
        )
        return rows

    def _candidate_rows(
        self,
        slots: Sequence[int],
        probabilities: Sequence[float],
        position: int,
        alpha: float,
    ) -> CandidateRows:
        return CandidateRows(
            slots=_column(slots, SEARCH_ROWS, np.int32, self._num_cache_slots),
            probabilities=_column(probabilities, SEARCH_ROWS, np.float32, 0),
            position=jnp.asarray(np.int32(position)),
            alpha=jnp.asarray(np.float32(alpha)),
        )

    def _rule_arrays(self, rules: SearchRules) -> SearchRuleArrays:
        vocab = self._config.vocabulary_size
        ids = [token_id for token_id, _ in rules.logit_bias]
        return SearchRuleArrays(
            banned_ids=_column(rules.banned_ids, MAX_STOP_IDS, np.int32, vocab),
            bias_ids=_column(ids, MAX_BIASES, np.int32, vocab),
            biases=_column([bias for _, bias in rules.logit_bias], MAX_BIASES, np.float32, 0),
            wants_logprobs=jnp.asarray(np.bool_(rules.num_logprobs is not None)),
        )


def _beam_rows(beams: Sequence[Beam]) -> BeamRows:
    return BeamRows(
        logprobs=_column([beam.logprob for beam in beams], SEARCH_ROWS, np.float32, 0),
        is_live=_column([not beam.is_done for beam in beams], SEARCH_ROWS, np.bool_, 0),
        is_done=_column([beam.is_done for beam in beams], SEARCH_ROWS, np.bool_, 0),
    )


def _hand_on(step: BeamStep, sources: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """A slot for each beam, and which slot is copied to which before the next step.

    The first continuation of a beam keeps its slot, the others get slots that no beam goes on in.
    So nothing is overwritten that is still to be copied.
    """
    slots: dict[int, int] = {}
    kept: dict[int, int] = {}
    for index, source in enumerate(sources):
        beam = step.beams[source]
        if not beam.is_done and source not in kept:
            kept[source] = slots[index] = beam.slot
    free = [slot for slot in step.slots if slot not in kept.values()]
    copies = []
    for index, source in enumerate(sources):
        if index in slots:
            continue
        slots[index] = free.pop(0)
        if not step.beams[source].is_done:
            copies.append((kept[source], slots[index]))
    return [slots[index] for index in range(len(sources))], copies


def _extension(step: BeamStep, found: BeamOutputs, index: int, slot: int) -> Extension:
    source = int(found.sources[index])
    before = step.beams[source]
    if before.is_done:
        return Extension(source, Beam(slot, before.token_id, before.logprob, is_done=True), None)
    num_logprobs = step.rules.num_logprobs
    token = SampledToken(
        int(found.token_ids[index]),
        None if num_logprobs is None else float(found.own_logprobs[index]),
        _pairs(found.top_ids[index], found.top_logprobs[index], num_logprobs),
    )
    return Extension(source, Beam(slot, token.token_id, float(found.logprobs[index])), token)


def _pairs(ids: Any, logprobs: Any, count: int | None) -> tuple[tuple[int, float], ...]:
    """Host arrays as pairs, best first."""
    if count is None:
        return ()
    return tuple(zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True))


def _column(values: Sequence[float | int], size: int, dtype: Any, filler: float | int) -> jax.Array:
    return jnp.asarray(np.array([*values, *[filler] * (size - len(values))], dtype))


def _shaped(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
