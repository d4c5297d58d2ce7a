"""Adapters in the bank of the real engine: what they add, and that nobody beside them notices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.adapter_bank import Adapter, of_keras, of_peft, random_adapter
from model.adapter_exchange.files import export_directory, export_file
from model.adapter_exchange.layouts import in_layout
from model.adapter_shapes import bank_bytes, pair_shapes
from model.engine import load
from model.errors import AdapterUnfit
from model.gemma.forward import forward
from model.gemma.keras_lora import TARGETS, lora_shapes, merged_kernel
from model.lora_adapter import LoraForm
from model.progress import no_progress
from model.score_slots import AskedPlace, ScoreChunk
from model.search_slots import Beam, BeamStep, CandidateStep, SearchRules
from model.slots import (
    AdapterForm,
    DecodeRow,
    EngineOptions,
    PromptChunk,
    RowRules,
    Sampling,
)
from service.adapters import open_adapters
from tests import goldens
from tests.adapters import drawn_adapter

PATHS = pytest.mark.parametrize("kernels", ["auto", "xla"])
NAME = "gemma3_tiny"
compiled_forward = jax.jit(forward, static_argnums=0)


def config_of(name):
    return goldens.backbone(name).config


def random_tokens(num_tokens, seed=0):
    return np.random.default_rng(seed).integers(12, 512, num_tokens).tolist()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.3


def keras_arrays(config, target, rank):
    shapes = lora_shapes(config, target, rank)
    return {
        (layer, target): (normal(*shapes.a, seed=layer), normal(*shapes.b, seed=99 + layer))
        for layer in range(config.num_layers)
    }


def peft_arrays(config, target, rank):
    heads, in_width, out_per_head = pair_shapes(config)[target]
    return {
        (layer, target): (
            normal(rank, in_width, seed=layer),
            normal(heads * out_per_head, rank, seed=99 + layer),
        )
        for layer in range(config.num_layers)
    }


def merged(name, change_of):
    """The weights with ``change_of(layer, target, kernel)`` in place of each kernel."""
    weights = goldens.backbone(name).gemma_weights
    blocks = [
        block._replace(**{t: change_of(layer, t, getattr(block, t)) for t in TARGETS})
        for layer, block in enumerate(weights.blocks)
    ]
    return weights._replace(blocks=tuple(blocks))


def logprobs_of(name, weights, tokens):
    logits = compiled_forward(
        config_of(name), weights, jnp.asarray([tokens]), jnp.ones((1, len(tokens)), bool)
    ).logits[0]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


def scored(engine, tokens, adapter):
    """Log-probability of every token after the first, as `/score` would find it."""
    wanted = tuple(range(len(tokens) - 1))
    reading = engine.read([ScoreChunk(1, tokens[:-1], 0, wanted, adapter=adapter)])
    while True:
        try:
            next(reading)
        except StopIteration as end:
            residuals = end.value
            break
    found, most = [], engine.info.head_places
    for first in range(0, len(residuals), most):
        places = zip(residuals[first:], tokens[first + 1 :], strict=True)
        found += engine.measure([AskedPlace(x, (token,)) for x, token in list(places)[:most]])
    return [place.logprobs[0] for place in found]


def prefill(engine, *chunks):
    for _ in engine.prefill(chunks):
        pass


def continue_rows(engine, rows, *, num_tokens=6, together=True, packed=False):
    """Tokens and log-probabilities of (slot, prompt, adapter), together or one after another."""
    batches = [rows] if together else [[row] for row in rows]
    found = {}
    for batch in batches:
        chunks = [PromptChunk(slot, ids[:-1], 0, adapter=adapter) for slot, ids, adapter in batch]
        for group in [chunks] if packed else [[chunk] for chunk in chunks]:
            prefill(engine, *group)
        decoded = []
        for slot, ids, adapter in batch:
            engine.begin(slot, ids)
            rules = RowRules(
                Sampling(1.2, 0, 0.95, slot), len(ids), len(ids) + num_tokens, num_logprobs=5
            )
            decoded.append(DecodeRow(slot, len(ids) - 1, rules, adapter))
        for (slot, _, _), tokens in zip(
            batch, engine.decode(decoded, num_tokens).tokens(), strict=True
        ):
            found[slot] = [(each.token_id, each.logprob, each.top) for each in tokens]
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", ["keras", "peft"])
def test_an_adapter_in_a_slot_answers_as_the_weights_merged_with_it(target, layout, engine_of):
    """Scores within 5e-5; alternatives of a step as near as those of the base are (test_engine)."""
    engine, config = engine_of(NAME), config_of(NAME)
    if layout == "keras":
        arrays = keras_arrays(config, target, 4)
        adapter = of_keras(4, arrays)

        def change(layer, field, kernel):
            return merged_kernel(target, kernel, *map(jnp.asarray, arrays[layer, field]))
    else:
        arrays = peft_arrays(config, target, 3)
        adapter = of_peft(config, 3, 1.5, arrays)

        def change(layer, field, kernel):
            a, b = arrays[layer, field]
            return kernel + 1.5 * (b @ a)

    engine.put_adapter(2, adapter)
    weights = merged(
        NAME, lambda layer, field, x: change(layer, field, x) if field == target else x
    )
    tokens = random_tokens(24)
    expected = logprobs_of(NAME, weights, tokens)
    own = expected[np.arange(23), tokens[1:]]
    base = logprobs_of(NAME, goldens.backbone(NAME).gemma_weights, tokens)
    assert np.abs(own - base[np.arange(23), tokens[1:]]).max() > 0.01, "it changes something"
    np.testing.assert_allclose(scored(engine, tokens, 2), own, atol=5e-5, rtol=0)
    [((_, _, top),)] = continue_rows(engine, [(0, tokens, 2)], num_tokens=1).values()
    ids = [token_id for token_id, _ in top]
    np.testing.assert_allclose(
        [logprob for _, logprob in top], expected[-1, ids], atol=2e-4, rtol=0
    )


@pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])
def test_a_file_of_keras_hub_in_a_slot_gives_the_logits_that_keras_hub_had(name, engine_of):
    engine, given = engine_of(name), goldens.arrays(name)
    path = goldens.directory(name) / "lora5.lora.h5"
    [version] = open_adapters([f"tone={path}"]).versions
    engine.put_adapter(1, engine.read_adapter(path, version.digest))
    for token_ids, mask, expected in zip(
        given["train.x_token_ids"],
        given["train.x_padding_mask"],
        given["train.lora.logits5"],
        strict=True,
    ):
        tokens = token_ids[mask.astype(bool)].tolist()
        logprobs = np.asarray(jax.nn.log_softmax(expected[: len(tokens)], axis=-1))
        own = logprobs[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(scored(engine, tokens, 1), own, atol=3e-4, rtol=0)


def two_adapters(engine):
    config = config_of(NAME)
    everything = random_adapter(config, 8, seed=5)
    pairs = {
        place: pair for place, pair in everything.pairs.items() if place[1] in ("query", "value")
    }
    engine.put_adapter(1, everything)
    engine.put_adapter(3, Adapter(8, pairs))


@PATHS
def test_f_r1_rows_of_adapters_and_of_the_base_answer_together_as_alone_to_the_last_bit(
    kernels, engine_of
):
    engine = engine_of(NAME, kernels)
    two_adapters(engine)
    rows = [(2, random_tokens(200, 1), 1), (0, random_tokens(3, 2), 0),
            (3, random_tokens(25, 3), 3), (1, random_tokens(25, 3), 0)]  # fmt: skip
    alone = continue_rows(engine, rows, together=False)
    assert continue_rows(engine, rows) == alone
    short = rows[1:]
    assert continue_rows(engine, short, packed=True) == {slot: alone[slot] for slot in (0, 3, 1)}
    assert alone[3] != alone[1], "one prompt, with an adapter and without"


@PATHS
def test_texts_of_adapters_are_scored_together_as_alone_to_the_last_bit(kernels, engine_of):
    engine = engine_of(NAME, kernels)
    two_adapters(engine)

    def read(*chunks):
        reading = engine.read(chunks)
        try:
            while True:
                next(reading)
        except StopIteration as end:
            return [x.tobytes() for x in end.value]

    one = ScoreChunk(1, random_tokens(21, 4), 0, (0, 10, 20), adapter=1)
    other = ScoreChunk(2, random_tokens(17, 5), 0, (3, 16), adapter=3)
    base = ScoreChunk(0, random_tokens(9, 6), 0, (8,))
    alone = [*read(one), *read(other), *read(base)]
    assert read(one, other, base) == alone
    assert read(dataclasses.replace(one, adapter=0)) != alone[:3]


def test_the_base_answers_as_an_engine_that_has_no_bank_to_the_last_bit(engine_of, cache_dir):
    options = EngineOptions(str(goldens.preset_directory(NAME)), 2, 1024, cache_dir)
    without = load(options, no_progress)
    assert without.info.adapter_slots == without.info.adapter_max_rank == 0
    with_bank = engine_of(NAME)
    two_adapters(with_bank)
    rows = [(0, random_tokens(100, 7), 0), (1, random_tokens(5, 8), 0)]
    assert continue_rows(with_bank, rows) == continue_rows(without, rows)
    beside = [*rows, (3, random_tokens(60, 9), 1)]
    among_others = continue_rows(with_bank, beside)
    del among_others[3]
    assert among_others == continue_rows(without, rows)
    with pytest.raises(ValueError, match="There is no adapter slot 1; the bank has 0"):
        prefill(without, PromptChunk(0, [5], 0, adapter=1))
    with pytest.raises(AdapterUnfit, match="raise --adapter-slots"):
        without._bank.check(random_adapter(config_of(NAME), 1, seed=0))


def test_a_slot_is_written_and_written_again_without_a_compilation(engine_of):
    engine, config, prompt = engine_of(NAME), config_of(NAME), random_tokens(30)
    found, before = [], None
    for seed in (1, 2, 1):
        engine.put_adapter(4, random_adapter(config, 2 + seed, seed))
        found.append(continue_rows(engine, [(0, prompt, 4)]))
        before = before or engine.num_compilations
    assert engine.num_compilations == before
    assert found[0] == found[2] != found[1]
    # All of it is gone with the next one, targets that this does not have included.
    engine.put_adapter(4, Adapter(1, {}))
    assert continue_rows(engine, [(0, prompt, 4)]) == continue_rows(engine, [(0, prompt, 0)])


def test_searches_use_the_adapter_of_their_request(engine_of):
    engine, prompt = engine_of(NAME), random_tokens(20)
    two_adapters(engine)
    [((_, _, top),)] = continue_rows(engine, [(0, prompt, 1)], num_tokens=1).values()
    rules = SearchRules(num_logprobs=5)
    beams = BeamStep((0, 1), (Beam(0, prompt[-1], 0.0),), 19, 19, rules, adapter=1)
    assert engine.step_beams(beams)[0].token.top == top
    engine.keep_hidden(0)
    prefill(engine, PromptChunk(0, prompt[:-1], 0, adapter=1))
    engine.copy(0, [1], 19)
    step = CandidateStep((0, 1), (prompt[-1],) * 2, (1.0, 1.0), 19, 0.5, rules, adapter=1)
    choice = engine.step_candidates(step)
    engine.drop_hidden(0)
    assert choice.candidates[0].top == top


def test_what_does_not_fit_the_bank_is_one_line(engine_of):
    bank = engine_of(NAME)._bank
    with pytest.raises(AdapterUnfit, match="rank 9 needs --adapter-max-rank 9; it is 8"):
        bank.check(random_adapter(config_of(NAME), 9, seed=0))
    bad = random_adapter(config_of(NAME), 2, seed=0)
    bad.pairs[3, "key"][0][0, 1, 2] = np.inf
    with pytest.raises(AdapterUnfit, match="Block 3, key: a weight is not a finite number"):
        bank.check(bad)


def test_a_file_that_is_not_the_version_that_was_named_is_refused(tmp_path, engine_of):
    golden = goldens.directory("gemma1_tiny") / "lora5.lora.h5"
    copy = tmp_path / "tone.lora.h5"
    copy.write_bytes(golden.read_bytes() + b"\0")
    [version] = open_adapters([f"tone={golden}"]).versions
    engine = engine_of("gemma1_tiny")
    with pytest.raises(AdapterUnfit, match="has changed since it was named"):
        engine.read_adapter(copy, "sha256:" + 64 * "0")
    assert engine.read_adapter(golden, version.digest).targets == ("query", "value")
    (tmp_path / "tone.bin").write_bytes(b"?")
    [version] = open_adapters([f"tone={tmp_path / 'tone.bin'}"]).versions
    with pytest.raises(AdapterUnfit, match=r"ends in \.lora\.h5 or \.safetensors"):
        engine.read_adapter(tmp_path / "tone.bin", version.digest)


def test_an_engine_brings_adapters_in_and_takes_them_out_as_what_they_are(tmp_path, engine_of):
    engine, config = engine_of(NAME), config_of(NAME)
    adapter = drawn_adapter(config, LoraForm("peft", 2, 3.0, ("query", "value")), scale=0.3)
    export_directory(adapter, tmp_path / "tone", config)
    [version] = open_adapters([f"tone={tmp_path / 'tone'}"]).versions
    read = engine.read_adapter(tmp_path / "tone", version.digest)
    export_file(adapter, tmp_path / "sent", "peft", config)
    content = engine.import_adapter(tmp_path / "sent", "peft")
    assert engine.adapter_form(content) == AdapterForm("peft", 2, 3.0, ("query", "value"))
    engine.export_adapter(content, tmp_path / "keras", "keras")
    back = engine.import_adapter(tmp_path / "keras", "keras")
    assert engine.adapter_form(back) == AdapterForm("keras", 8, 8.0, ("query", "value"))
    found = []
    for each in (read, engine.open_adapter(content), engine.open_adapter(back)):
        engine.put_adapter(1, each)
        found.append(scored(engine, random_tokens(12), 1))
    np.testing.assert_array_equal(found[1], found[0])
    # The same sums, of four times as many terms.
    np.testing.assert_allclose(found[2], found[0], atol=1e-5, rtol=0)
    export_file(in_layout(adapter, "keras", config), tmp_path / "wide", "peft", config)
    with pytest.raises(AdapterUnfit, match="rank 32 needs --adapter-max-rank 32; it is 8"):
        engine.import_adapter(tmp_path / "wide", "peft")


@pytest.mark.parametrize("name", goldens.TINY_PRESETS)
def test_shapes_are_those_of_the_kernels_and_targets_those_of_keras(name):
    config, weights = config_of(name), goldens.backbone(name).gemma_weights
    shapes = pair_shapes(config)
    assert tuple(shapes) == TARGETS
    for target, (heads, in_width, out_per_head) in shapes.items():
        assert getattr(weights.blocks[0], target).shape == (heads * out_per_head, in_width)


def test_bytes_of_a_bank_are_those_of_its_arrays(engine_of):
    arrays = engine_of(NAME)._bank.arrays.layers
    total = sum(array.nbytes for layer in arrays for pair in layer.values() for array in pair)
    assert total == bank_bytes(config_of(NAME), 4, 8)
