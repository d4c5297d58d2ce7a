"""The self-test finds one unit in the last place of one row, and is not run twice for nothing."""

import asyncio
import json
import os
import subprocess
from dataclasses import astuple, replace

import jax.numpy as jnp
import numpy as np
import pytest

from model.engine import load
from model.engine_programs import row_buckets
from model.errors import SelfTestFailed
from model.kernels.library import load_kernels
from model.progress import no_progress
from model.score_head import head_places
from model.score_self_test import compare_scores
from model.self_test import compare_bits
from model.self_test_record import claim_of, keep_result, kept_result
from model.slots import EngineInfo, EngineOptions, SampledToken, SelfTest
from service.api import ops
from service.api.state import ServiceState
from service.export_openapi import NoWorker
from service.observability import Metrics
from service.settings import Settings
from service.worker.translate import server_info
from service.worker_client import WorkerClient
from tests import goldens
from tests.service_process import REPOSITORY, command

CHUNKS = (64, 128, 256)
# Behind the copy: four beams and a candidate against steps, then three and four rows of a search.
# With adapters: seven positions by each chunk program and of three prompts in one chunk, and four
# rows in two orders.
PASSED = SelfTest((2, 4), CHUNKS, 130 + 32 + 9 + 5 + 7 + 7 * (3 + 3) + 2 * 4)
# Of three rows the losses of 15, 10 and 7 tokens, and of each the A and B of seven projections.
NUM_TRAINED = 15 + 10 + 7 + 3 * 2 * 7
KERNELS = "avx2 of-these-sources.so"


class Tape:
    """An engine of sums: a position holds the sum of the tokens up to it, and so does its answer.

    It does not search.
    What disturbs it sees how many rows or tokens run together, the place among them and the value.
    """

    def __init__(self, num_slots=8, context_tokens=1024, row_counts=(2, 4, 8), joined_tokens=0):
        self.info = EngineInfo(
            preset="x", preset_digest="x", family="x", is_instruct=None, num_parameters=0,
            dtype="x", backend="paper", device="tape", kernels="", context_tokens=context_tokens,
            num_slots=num_slots, vocabulary_size=1000, num_layers=1, hidden_dim=1,
            chunk_tokens=256, packed_tokens=64, packed_prompts=8,
            joined_tokens=joined_tokens, joined_rows=5 if joined_tokens else 0,
            buckets={"decode_rows": [*row_counts], "prefill_tokens": [*CHUNKS]},
        )  # fmt: skip
        self.sums = np.full((num_slots, context_tokens), np.nan, np.float32)
        self.tokens = np.zeros((num_slots, context_tokens), np.int64)
        self.steps = []
        self.chunks = []
        self.disturb_step = self.disturb_chunk = self.disturb_answer = lambda count, place, x: x
        self.disturb_joined = lambda x: x

    def begin(self, slot, token_ids):
        self.tokens[slot, : len(token_ids)] = token_ids

    def prefill(self, chunks):
        num_tokens, place = sum(len(chunk.token_ids) for chunk in chunks), 0
        assert num_tokens <= (256 if len(chunks) == 1 else 64)
        self.chunks.append([(chunk.slot, chunk.start, len(chunk.token_ids)) for chunk in chunks])
        for slot, token_ids, start, *_ in map(astuple, chunks):
            assert start % 256 == 0
            before = self.sums[slot, start - 1] if start else np.float32(0)
            for offset, token_id in enumerate(token_ids):
                before = before + np.float32(token_id)
                self.sums[slot, start + offset] = self.disturb_chunk(num_tokens, place, before)
                place += 1
            yield

    def decode(self, rows, num_steps):
        assert num_steps == 1
        self.steps.append([row.slot for row in rows])
        drawn = [[self._decode_row(len(rows), place, row)] for place, row in enumerate(rows)]
        return Done(drawn)

    def join(self, chunks, rows):
        [chunk] = chunks
        assert 0 < len(chunk.token_ids) <= self.info.joined_tokens
        assert len(rows) <= self.info.joined_rows
        assert chunk.slot not in {row.slot for row in rows}
        before = self.sums[chunk.slot, chunk.start - 1] if chunk.start else np.float32(0)
        for offset, token_id in enumerate(chunk.token_ids):
            before = before + np.float32(token_id)
            self.sums[chunk.slot, chunk.start + offset] = self.disturb_joined(before)
        done = self.decode(rows, 1)
        self.steps.pop()
        return done

    def _decode_row(self, count, place, row):
        before = self.sums[row.slot, row.position - 1] if row.position else np.float32(0)
        token_id = int(self.tokens[row.slot, row.position])
        held = self.disturb_step(count, place, before + np.float32(token_id))
        self.sums[row.slot, row.position] = held
        logprob = self.disturb_answer(count, place, -held)
        return SampledToken(token_id, float(logprob), ((7, float(logprob)), (8, -1.0)))

    def copy(self, source, targets, num_tokens):
        for target in targets:
            self.sums[target, :num_tokens] = self.sums[source, :num_tokens]

    def no_search(self, *_arguments):
        raise AssertionError("it has no programs for searches")

    keep_hidden = drop_hidden = step_beams = step_candidates = search_rows = no_search
    put_random_adapter = no_search

    def keys_and_values(self, slot, position):
        return self.sums[slot, position].reshape(1, 1, 1)


class Done:
    """A dispatch whose tokens are known already."""

    def __init__(self, drawn):
        self.drawn = drawn

    def wait(self):
        pass

    def tokens(self):
        return self.drawn


def up(value):
    return np.nextafter(value, np.float32(np.inf), dtype=np.float32)


def only_where(condition):
    """One unit in the last place, where the condition on count and place holds."""
    return lambda count, place, value: up(value) if condition(count, place) else value


# --- what is compared -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_slots", "row_counts", "context_tokens", "num_comparisons"),
    [
        # Of 33, 97 and 193 tokens every second, fourth and seventh; 17 of a second block.
        (1, (2,), 1024, 17 + 25 + 28 + 17),
        # Two prompts in one chunk, 21 tokens and 22 of 43; a copy of 320 tokens, every tenth; steps
        # of two, three ... eight rows.
        (2, (2,), 1024, 87 + 43 + 32 + 2),
        (3, (2, 4), 1024, 130 + 32 + 2 + 3),
        (8, (2, 4, 8), 1024, 130 + 32 + 35),
        (64, (2, 4, 8), 1024, 130 + 32 + 35),
        (8, (2, 4, 8), 256, 113 + 32 + 35),
        # Room for 20 tokens behind the first block, then for 16 in all.
        (8, (2, 4, 8), 276, 113 + 11 + 31 + 35),
        (8, (2, 4, 8), 16, 9 + 16 + 16 + 16 + 35),
    ],
)
def test_an_engine_that_adds_in_one_order_passes(
    num_slots, row_counts, context_tokens, num_comparisons
):
    tape = Tape(num_slots, context_tokens, row_counts)
    assert compare_bits(tape) == SelfTest(row_counts, CHUNKS, num_comparisons)


def test_every_number_of_rows_runs_and_every_place_of_each_program_is_taken():
    tape = Tape()
    compare_bits(tape)
    alone, together = tape.steps[:8], tape.steps[8:]
    assert alone == [[slot] for slot in range(8)]
    assert [len(step) for step in together] == [2, 3, 4, 5, 6, 7, 8]
    at_place = [{step[place] for step in together if len(step) > place} for place in range(8)]
    assert [len(slots) for slots in at_place] == [7, 7, 6, 5, 4, 3, 2, 1]


def test_every_chunk_program_runs_and_slot_0_holds_the_longest_prompt():
    tape = Tape(num_slots=3)
    compare_bits(tape)
    assert tape.chunks == [
        [(1, 0, 64)], [(2, 0, 33)], [(2, 0, 21), (1, 0, 43)],
        [(2, 0, 128)], [(0, 0, 97)], [(0, 0, 256)], [(1, 0, 193)],
        [(0, 256, 33)], [(0, 256, 64)],
    ]  # fmt: skip


# --- what is found ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "remedy"),
    [(2, "No number of slots"), (3, "--slots 2,"), (4, "--slots 2,"), (5, "--slots 4,")],
)
@pytest.mark.parametrize("what", ["disturb_answer", "disturb_step"])
def test_one_unit_in_the_last_place_of_one_row_fails_and_says_how_to_serve(what, count, remedy):
    tape = Tape()
    setattr(tape, what, only_where(lambda rows, place: rows == count and place == 1))
    message = rf"other bits among {count} \(at place 1, .*paper, tape.*depend on what else runs"
    with pytest.raises(SelfTestFailed, match=message) as failed:
        compare_bits(tape)
    assert remedy in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_difference_at_the_last_place_of_a_full_batch_is_found():
    tape = Tape()
    tape.disturb_answer = only_where(lambda rows, place: (rows, place) == (8, 7))
    with pytest.raises(SelfTestFailed, match=r"among 8 \(at place 7"):
        compare_bits(tape)


def test_a_minus_before_a_zero_is_a_difference():
    tape = Tape()
    tape.disturb_answer = lambda rows, place, value: np.float32(-0.0 if rows == 2 else 0.0)
    with pytest.raises(SelfTestFailed, match="among 2"):
        compare_bits(tape)


def test_one_unit_in_the_last_place_of_a_prompt_behind_another_one_fails():
    tape = Tape()
    # 21 tokens of one prompt, then those of the other.
    tape.disturb_chunk = only_where(lambda tokens, place: (tokens, place) == (64, 21 + 2))
    prefill = tape.prefill

    def only_two(chunks):
        disturb, plain = tape.disturb_chunk, lambda count, place, x: x
        tape.disturb_chunk = disturb if len(chunks) == 2 else plain
        yield from prefill(chunks)
        tape.disturb_chunk = disturb

    tape.prefill = only_two
    with pytest.raises(SelfTestFailed, match=r"Position 2 .* among 21 and 43 tokens than among 64"):
        compare_bits(tape)


@pytest.mark.parametrize(("padded", "full"), [(33, 64), (97, 128), (193, 256)])
@pytest.mark.parametrize("which", [0, 1])
def test_one_unit_in_the_last_place_of_one_position_of_a_chunk_fails(padded, full, which):
    tape = Tape()
    uneven = (padded, full)[which]
    tape.disturb_chunk = only_where(lambda tokens, place: (tokens, place) == (uneven, 0))
    message = f"Position 0 .* among {padded} tokens than among {full} on"
    with pytest.raises(SelfTestFailed, match=message):
        compare_bits(tape)


def test_rows_and_a_prompt_that_are_joined_are_compared_with_each_alone():
    apart, joined = Tape(), Tape(joined_tokens=52)
    num_apart = compare_bits(apart).num_comparisons
    # 100 tokens of a prompt in parts of 25, five rows beside each but the last, which has one.
    assert compare_bits(joined).num_comparisons == num_apart + 100 + 3 * 5 + 1


def test_one_unit_in_the_last_place_of_a_prompt_beside_rows_fails():
    tape = Tape(joined_tokens=52)
    tape.disturb_joined = up
    with pytest.raises(SelfTestFailed, match="A prompt gets other bits beside rows than alone"):
        compare_bits(tape)


def test_one_unit_in_the_last_place_of_a_row_beside_a_prompt_fails():
    tape = Tape(joined_tokens=52)
    join = tape.join

    def uneven(chunks, rows):
        done = join(chunks, rows)
        tape.sums[rows[0].slot, rows[0].position] += 1
        return done

    tape.join = uneven
    with pytest.raises(SelfTestFailed, match="A row gets other bits beside a prompt than alone"):
        compare_bits(tape)


def test_a_copy_that_misses_a_position_is_found():
    tape = Tape()
    copy = tape.copy

    def copy_all_but_one(source, targets, num_tokens):
        copy(source, targets, num_tokens)
        tape.sums[1, 250] = 0

    tape.copy = copy_all_but_one
    with pytest.raises(SelfTestFailed, match=r"Position 250 .* in a copy on"):
        compare_bits(tape)


def test_a_difference_behind_the_first_block_is_found():
    tape = Tape()
    prefill = tape.prefill

    def prefill_unevenly(chunks):
        yield from prefill(chunks)
        slot, token_ids, start, *_ = astuple(chunks[0])
        if start and len(token_ids) == 64:
            tape.sums[slot, start + 4] = up(tape.sums[slot, start + 4])

    tape.prefill = prefill_unevenly
    with pytest.raises(SelfTestFailed, match="Position 260 "):
        compare_bits(tape)


# --- on compiled programs ---------------------------------------------------------------------


def num_scores(kernels):
    """A continuation of 11 tokens in three companies, and a full batch of the head."""
    return 3 * 11 + head_places(is_native=load_kernels(kernels).is_native)


def passed(kernels="auto"):
    """By an engine of four slots: with native kernels a lone row runs as one, and two rows without
    interventions are joined to a prompt of 100 tokens in four parts, to the last of them one.
    """
    is_native = load_kernels(kernels).is_native
    num_joined = 100 + 3 * 2 + 1 if is_native else 0
    return replace(
        PASSED,
        row_counts=row_buckets(4, is_native=is_native),
        num_comparisons=PASSED.num_comparisons + num_joined,
    )


@pytest.mark.parametrize(("name", "kernels"), goldens.PATHS)
def test_the_programs_of_every_family_pass_and_info_says_so(name, kernels, engine_of):
    engine = engine_of(name, kernels)
    rows = passed(kernels)
    assert compare_bits(engine) == rows
    num_scored = num_scores(kernels)
    assert compare_scores(engine) == num_scored
    num_compared = rows.num_comparisons + num_scored + NUM_TRAINED
    assert engine.info.self_test == replace(rows, num_comparisons=num_compared)


@pytest.mark.skipif("GEMMA_NIGHTLY" not in os.environ, reason="a campaign of make nightly")
def test_native_kernels_pass_among_one_to_thirty_two_rows(cache_dir):
    if not load_kernels().is_native:
        pytest.skip(f"kernels here: {load_kernels()}")
    preset = str(goldens.preset_directory("gemma3_tiny"))
    engine = load(EngineOptions(preset, 32, 256, cache_dir, kernels="native"), no_progress)
    assert engine.info.self_test.row_counts == (1, 2, 4, 8, 16, 32)
    assert engine.info.self_test.num_comparisons > PASSED.num_comparisons


def test_one_unit_in_one_row_of_a_compiled_step_is_found(engine_of, monkeypatch):
    engine = engine_of("gemma3_tiny")
    program = engine._programs["decode[4]"]

    def uneven(*arguments):
        states, outputs = program(*arguments)
        logprobs = np.array(outputs.logprobs)
        logprobs[0, 2] = up(logprobs[0, 2])
        return states, outputs._replace(logprobs=logprobs)

    monkeypatch.setitem(engine._programs, "decode[4]", uneven)
    with pytest.raises(SelfTestFailed, match=r"among 3 \(at place 2, .*--slots 2"):
        compare_bits(engine)


def test_one_unit_in_one_row_beside_adapters_is_found(engine_of, monkeypatch):
    engine = engine_of("gemma3_tiny")
    program = engine._programs["decode[4]"]

    def uneven(*arguments):
        states, outputs = program(*arguments)
        logprobs = np.array(outputs.logprobs)
        if np.any(arguments[-1]):
            logprobs[0, 0] = up(logprobs[0, 0])
        return states, outputs._replace(logprobs=logprobs)

    monkeypatch.setitem(engine._programs, "decode[4]", uneven)
    message = "a row beside rows of other adapters, 4 in all.*--adapter-slots 0"
    with pytest.raises(SelfTestFailed, match=message):
        compare_bits(engine)


def test_one_unit_in_one_key_of_a_compiled_chunk_is_found(engine_of, monkeypatch):
    engine = engine_of("gemma3_tiny")
    [name] = [name for name in engine._programs if name.startswith("block[128,1024")]
    program = engine._programs[name]

    def uneven(*arguments):
        x, cache = program(*arguments)
        keys = np.array(cache.keys)
        # The padded chunk goes into slot 3 and the full one into slot 2: only one is disturbed.
        keys[3, 0, 8, 0] = up(keys[3, 0, 8, 0])
        return x, cache._replace(keys=jnp.asarray(keys))

    monkeypatch.setitem(engine._programs, name, uneven)
    with pytest.raises(SelfTestFailed, match=r"Position 8 .* among 97 tokens than among 128 on"):
        compare_bits(engine)


def test_one_unit_in_one_score_of_a_compiled_program_is_found(engine_of, monkeypatch):
    engine = engine_of("gemma3_tiny")
    program = engine._programs["score"]

    def uneven(*arguments):
        outputs = program(*arguments)
        logprobs = np.array(outputs.logprobs)
        logprobs[5] = up(logprobs[5])
        return outputs._replace(logprobs=logprobs)

    monkeypatch.setitem(engine._programs, "score", uneven)
    with pytest.raises(SelfTestFailed, match="token that is scored gets other bits among 48"):
        compare_scores(engine)


def test_one_unit_in_one_residual_of_a_text_in_company_is_found(engine_of, monkeypatch):
    engine = engine_of("gemma3_tiny")
    read = engine.read

    def uneven(chunks):
        residuals = yield from read(chunks)
        if len(chunks) == 4:
            residuals[10][7] = up(residuals[10][7])
        return residuals

    monkeypatch.setattr(engine, "read", uneven)
    with pytest.raises(SelfTestFailed, match=r"Token 31 of a text .* among 4 than alone"):
        compare_scores(engine)


# --- the record -------------------------------------------------------------------------------


def test_a_result_is_kept_for_its_claim_and_no_other(tmp_path):
    one, other = (
        claim_of({"decode[2]": "a"}, "x", KERNELS),
        claim_of({"decode[2]": "b"}, "x", KERNELS),
    )
    assert kept_result(tmp_path, one) is None
    keep_result(tmp_path, one, PASSED)
    assert kept_result(tmp_path, one) == PASSED
    assert kept_result(tmp_path, other) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_a_claim_is_about_programs_weights_kernels_and_threads(monkeypatch):
    claims = {
        claim_of({"a": "1", "b": "2"}, "x", KERNELS),
        claim_of({"b": "2", "a": "1"}, "x", KERNELS),
    }
    assert len(claims) == 1
    claims |= {
        claim_of({"a": "1"}, "x", KERNELS),
        claim_of({"a": "2"}, "x", KERNELS),
        claim_of({"c": "1"}, "x", KERNELS),
    }
    claims.add(claim_of({"a": "1"}, "y", KERNELS))
    claims.add(claim_of({"a": "1"}, "x", "avx2 of-others.so"))
    monkeypatch.setenv("NPROC", "61")
    claims.add(claim_of({"a": "1"}, "x", KERNELS))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    claims.add(claim_of({"a": "1"}, "x", KERNELS))
    assert len(claims) == 8


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-9],
        lambda text: "[" * 4000,
        lambda text: "[]",
        lambda text: text.replace('"claim": "', '"claim": "0'),
        lambda text: text.replace("233", "-1"),
        lambda text: text.replace("233", "true"),
        lambda text: text.replace("[2, 4]", '"2"'),
        lambda text: text.replace("chunk_tokens", "chunks"),
    ],
)
def test_a_damaged_record_is_not_trusted_and_replaced(tmp_path, damage, caplog):
    claim = claim_of({}, "x", KERNELS)
    keep_result(tmp_path, claim, PASSED)
    [path] = tmp_path.iterdir()
    path.write_text(damage(path.read_text()))
    assert kept_result(tmp_path, claim) is None
    assert "the self-test runs again" in caplog.text
    keep_result(tmp_path, claim, PASSED)
    assert kept_result(tmp_path, claim) == PASSED


def test_a_folder_that_refuses_the_record_only_costs_the_next_start(tmp_path, caplog):
    keep_result(tmp_path / "gone", "claim", PASSED)
    assert "cannot be written" in caplog.text
    assert kept_result(tmp_path / "gone", "claim") is None


def test_a_second_start_trusts_the_record_of_the_first(engine_of, cache_dir):
    engine_of("gemma3_tiny")
    marked = {}
    for path in cache_dir.glob("programs/*/self_test_*.json"):
        marked[path] = path.read_text()
        path.write_text(json.dumps(json.loads(marked[path]) | {"num_comparisons": 12_345}))
    try:
        preset = str(goldens.preset_directory("gemma3_tiny"))
        options = EngineOptions(preset, 4, 1024, cache_dir, adapter_slots=4, adapter_max_rank=8)
        again = load(options, no_progress)
    finally:
        for path, text in marked.items():
            path.write_text(text)
    assert again.info.self_test == replace(passed(), num_comparisons=12_345)


# --- in the service ---------------------------------------------------------------------------


def test_info_shows_what_was_compared_and_null_where_nothing_was(engine_of):
    engine = engine_of("gemma3_tiny", "xla")
    view = NoWorker()
    state = ServiceState(Settings(), WorkerClient(print), view, Metrics())
    view.info = server_info(engine.info)
    shown = asyncio.run(ops.info(state)).model_dump()["self_test"]
    assert shown == {
        "passed": True, "row_counts": [2, 4], "chunk_tokens": [*CHUNKS],
        "comparisons": PASSED.num_comparisons + num_scores("xla") + NUM_TRAINED,
    }  # fmt: skip
    view.info = server_info(replace(engine.info, self_test=None))
    assert asyncio.run(ops.info(state)).self_test is None


def test_a_failed_self_test_ends_the_service_with_status_65_and_one_line(tmp_path):
    words = command(tmp_path, "--engine=tests.fakes.uneven_engine:load")
    result = subprocess.run(
        words, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 65
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("{")]
    expected = "A row gets other bits among 8 than alone. Serve with --slots 4."
    assert line == f"gemma-service: {expected}"
