"""Interventions and captures of the engine: by hand, by another road, and bitwise in company."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.causal_lm import GemmaCausalLM
from model.intervention_slots import Capture, Intervention, StepIntervention, Touch
from model.interventions import MAX_VECTORS, intervene, token_interventions
from model.score_slots import AskedPlace, ScoreChunk
from model.slots import DecodeRow, PromptChunk
from tests import goldens
from tests.test_engine import random_tokens, rules_of
from tests.test_scores import logprobs_of, pieces_of, read

PRESETS = pytest.mark.parametrize("name", goldens.TINY_PRESETS)
PATHS = pytest.mark.parametrize(("name", "kernels"), goldens.PATHS)


def vector(width, seed=0, size=1.0):
    numbers = size * np.random.default_rng(seed).standard_normal(width)
    return numbers.astype("<f4")


def some_interventions(width, layers):
    """One of each operation, at different layers."""
    layers = itertools.cycle(layers)
    return (
        Intervention("add", (next(layers), next(layers)), 0.5, vector(width).tobytes()),
        Intervention("scale", (next(layers),), 0.7),
        Intervention("project_out", (next(layers),), vector=vector(width, 1).tobytes()),
        Intervention("set", (next(layers),), vector=vector(width, 2).tobytes()),
    )


def by_hand(x, intervention, places):
    """x with one intervention, in float64 and without a line of what is tested."""
    x = np.array(x, np.float64)
    v = np.frombuffer(intervention.vector, "<f4").astype(np.float64)
    match intervention.operation:
        case "add":
            x[places] += intervention.scale * v
        case "scale":
            x[places] *= intervention.scale
        case "zero":
            x[places] = 0
        case "set":
            x[places] = v
        case "project_out":
            unit = v / np.sqrt((v * v).sum())
            x[places] -= np.outer(x[places] @ unit, unit)
    return x


@pytest.mark.parametrize("operation", ["add", "scale", "zero", "set", "project_out"])
def test_an_operation_does_by_hand_what_it_does(operation):
    x = jnp.asarray(np.random.default_rng(3).standard_normal((6, 5)), np.float32)
    given = b"" if operation in ("scale", "zero") else vector(5).tobytes()
    asked = Intervention(operation, (2,), -1.5, given)
    [changes] = token_interventions([[Touch(asked, (1, 4))]], 2, 6, 5)
    found = np.asarray(jax.jit(intervene)(x, changes))
    np.testing.assert_allclose(found, by_hand(x, asked, [1, 4]), atol=1e-6)
    np.testing.assert_array_equal(found[[0, 2, 3, 5]], np.asarray(x)[[0, 2, 3, 5]])
    assert token_interventions([[Touch(asked, (1, 4))]], 1, 6, 5) == []


def test_interventions_of_one_token_act_in_their_order():
    x = jnp.ones((1, 2), np.float32)
    asked = [
        Intervention("add", (0,), 2.0, np.array([1, 0], "<f4").tobytes()),
        Intervention("scale", (0,), 10.0),
        Intervention("project_out", (0,), vector=np.array([0, 9], "<f4").tobytes()),
        Intervention("add", (0,), 1.0, np.array([0, 5], "<f4").tobytes()),
    ]
    [changes] = token_interventions([[Touch(each, (0,)) for each in asked]], 0, 1, 2)
    np.testing.assert_array_equal(intervene(x, changes), [[30, 5]])


def test_to_project_out_twice_is_to_do_it_once():
    x = jnp.asarray(50 * np.random.default_rng(3).standard_normal((4, 64)), np.float32)
    touch = Touch(Intervention("project_out", (0,), vector=vector(64).tobytes()), (0, 1, 2, 3))
    [once] = token_interventions([[touch]], 0, 4, 64)
    [twice] = token_interventions([[touch, touch]], 0, 4, 64)
    np.testing.assert_allclose(intervene(x, twice), intervene(x, once), atol=2e-5)
    unit = vector(64) / np.linalg.norm(vector(64))
    np.testing.assert_allclose(intervene(x, once) @ unit, 0, atol=2e-5)


def test_a_vector_is_projected_out_whatever_its_length():
    x = jnp.array([[3.0, 4.0]], np.float32)
    for length in (1e-38, 1.0, 3e38):
        given = np.array([length, 0], "<f4").tobytes()
        touch = Touch(Intervention("project_out", (0,), vector=given), (0,))
        [changes] = token_interventions([[touch]], 0, 1, 2)
        np.testing.assert_array_equal(intervene(x, changes), [[0, 4]])


def test_nothing_added_and_a_token_left_alone_are_the_same_bits_even_of_minus_zero():
    x = jnp.array([[-0.0, 1.0], [-0.0, 1.0]], np.float32)
    touches = [Touch(Intervention("add", (0,), 0.0, vector(2).tobytes()), (0,))]
    [changes] = token_interventions([touches], 0, 2, 2)
    assert np.asarray(intervene(x, changes)).tobytes() == np.asarray(x).tobytes()


def test_more_vectors_than_fit_one_call_are_several_calls_of_whole_requests():
    added = [np.full(3, number, "<f4") for number in range(15)]
    touches = [
        [Touch(Intervention("add", (0,), 1.0, each.tobytes()), (number,)) for each in (v, v, v)]
        for number, v in enumerate(added)
    ]
    calls = token_interventions(touches, 0, 15, 3)
    assert len(calls) == 3
    assert 2 * MAX_VECTORS < 15 * 3
    x = jnp.zeros((15, 3))
    for changes in calls:
        x = intervene(x, changes)
    np.testing.assert_array_equal(x, 3 * np.stack(added))


def test_the_gradient_goes_through_what_is_changed():
    x = jnp.ones((4, 2), np.float32)
    asked = [("scale", 3.0, b""), ("zero", 1.0, b""), ("add", 2.0, vector(2).tobytes())]
    touches = [
        Touch(Intervention(operation, (0,), scale, given), (place,))
        for place, (operation, scale, given) in enumerate(asked)
    ]
    [changes] = token_interventions([touches], 0, 4, 2)
    _, pull = jax.vjp(lambda x: intervene(x, changes), x)
    np.testing.assert_array_equal(pull(jnp.ones((4, 2)))[0], [[3, 3], [0, 0], [1, 1], [1, 1]])


def library(name, text, interventions=(), places=()):
    """Logits, and the stream at every layer after interventions, of the Keras interface."""
    streams = {}

    def intercept(x, layer):
        for each in interventions:
            if layer in each.layers:
                changed = by_hand(x[0], each, list(places)).astype(np.float32)
                x = jnp.asarray(changed)[None]
        streams[layer] = np.asarray(x[0])
        return x

    model = GemmaCausalLM(goldens.backbone(name))
    logits = model.score(np.array([text], np.int32), layer_intercept_fn=intercept)[0]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1)), streams


def touched_pieces(text, interventions, places, captures=(), slot=0):
    """Chunks of a text that want every residual, with interventions and captures in them."""
    for piece in pieces_of(slot, text):
        end = piece.start + len(piece.token_ids)
        inside = tuple(place - piece.start for place in places if piece.start <= place < end)
        yield ScoreChunk(
            *(slot, piece.token_ids, piece.start, piece.wanted),
            tuple(Touch(each, inside) for each in interventions),
            tuple(Capture(layer, tuple(range(end - piece.start))) for layer in captures),
        )


def look(engine, pieces):
    """Residuals of pieces that are read one after another, and what was captured, by layer."""
    residuals, captured = [], {}
    for piece in pieces:
        found = read(engine, piece)
        residuals += found[: len(piece.wanted)]
        for each, numbers in zip(piece.captures, found[len(piece.wanted) :], strict=True):
            stream = np.frombuffer(numbers.numbers, "<f4").reshape(len(each.places), -1)
            captured[each.layer] = [*captured.get(each.layer, ()), *stream]
    return residuals, {layer: np.stack(streams) for layer, streams in captured.items()}


@PATHS
@pytest.mark.parametrize("num_tokens", [20, 300])
def test_interventions_and_captures_are_those_of_a_forward_pass(
    name, kernels, num_tokens, engine_of
):
    engine, text = engine_of(name, kernels), random_tokens(num_tokens)
    layers = range(-1, engine.info.num_layers)
    asked = some_interventions(engine.info.hidden_dim, layers)
    places = [*range(3, num_tokens, 2)]
    residuals, captured = look(engine, touched_pieces(text, asked, places, layers))
    expected, streams = library(name, text, asked, places)
    for layer in layers:
        size = np.abs(streams[layer]).max()
        np.testing.assert_allclose(captured[layer], streams[layer], atol=2e-5 * size)
    np.testing.assert_array_equal(residuals, captured[engine.info.num_layers - 1])
    found = logprobs_of(engine, residuals[:-1], text[1:])
    place = np.arange(num_tokens - 1)
    np.testing.assert_allclose(found, expected[place, text[1:]], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])
def test_a_capture_changes_no_bit_and_is_the_stored_stream_of_keras_hub(name, engine_of):
    engine, arrays = engine_of(name), goldens.arrays(name)
    text = arrays["fwd.token_ids"][0].tolist()
    layers = range(-1, engine.info.num_layers)
    plain, _ = look(engine, touched_pieces(text, (), ()))
    found, captured = look(engine, touched_pieces(text, (), (), layers))
    assert [each.tobytes() for each in found] == [each.tobytes() for each in plain]
    for layer in layers:
        np.testing.assert_allclose(captured[layer], arrays[f"fwd.act.{layer}"][0], atol=2e-4)


def test_float16_is_the_nearest_and_beyond_it_infinite(engine_of):
    engine, text = engine_of("gemma3_tiny"), [40, 50, 60]
    width = engine.info.hidden_dim
    big = Intervention("set", (0,), vector=np.full(width, 1e5, "<f4").tobytes())
    captures = (Capture(-1, (0, 2)), Capture(-1, (0, 2), is_half=True), Capture(0, (1,), True))
    chunk = ScoreChunk(0, text, 0, (), (Touch(big, (1,)),), captures)
    single, half, beyond = read(engine, chunk)
    exact = np.frombuffer(single.numbers, "<f4")
    np.testing.assert_array_equal(np.frombuffer(half.numbers, "<f2"), exact.astype("<f2"))
    embeddings = goldens.backbone("gemma3_tiny").gemma_weights.embeddings
    np.testing.assert_array_equal(exact.reshape(2, width), embeddings[jnp.array([40, 60])])
    assert np.isinf(np.frombuffer(beyond.numbers, "<f2")).all()
    assert beyond.is_finite, "it is, in float32"


@PATHS
def test_texts_beside_changed_ones_keep_their_bits_and_so_do_the_changed_ones(
    name, kernels, engine_of
):
    engine = engine_of(name, kernels)
    width, num_layers = engine.info.hidden_dim, engine.info.num_layers
    texts = [random_tokens(n, seed=n) for n in (3, 17, 1, 30, 5)]
    asked = some_interventions(width, range(-1, num_layers))
    chunks = []
    for number, text in enumerate(texts):
        everywhere = range(len(text))
        own = asked[number:] + asked[:number] if number % 2 else ()
        [chunk] = touched_pieces(text, own, everywhere, [0, num_layers - 1])
        chunks.append(chunk)

    def bits(found):
        return [each if hasattr(each, "numbers") else each.tobytes() for each in found]

    alone = [bits(read(engine, chunk)) for chunk in chunks]
    assert bits(read(engine, *chunks)) == [each for found in alone for each in found]
    assert bits(read(engine, *chunks[::-1])) == [each for found in alone[::-1] for each in found]
    plain = [bits(read(engine, *touched_pieces(text, (), (), [0, num_layers - 1])))
             for text in texts]  # fmt: skip
    assert [a == b for a, b in zip(alone, plain, strict=True)] == [True, False, True, False, True]


@PRESETS
def test_a_zero_intervention_is_none_to_the_last_bit(name, engine_of):
    engine, text = engine_of(name), random_tokens(40)
    width, layers = engine.info.hidden_dim, tuple(range(-1, engine.info.num_layers))
    nothing = (
        Intervention("add", layers, 0.0, vector(width).tobytes()),
        Intervention("add", layers, 3.0, bytes(4 * width)),
        Intervention("scale", layers, 1.0),
    )
    plain, streams = look(engine, touched_pieces(text, (), (), layers))
    found, captured = look(engine, touched_pieces(text, nothing, range(40), layers))
    assert [each.tobytes() for each in found] == [each.tobytes() for each in plain]
    for layer in layers:
        assert captured[layer].tobytes() == streams[layer].tobytes()
    steps = tuple(StepIntervention(each, True, True) for each in nothing)
    touches = tuple(Touch(each, tuple(range(39))) for each in nothing)
    assert drawn(engine, {1: (text, touches, steps)}) == drawn(engine, {1: (text, (), ())})


def test_the_stored_logits_of_keras_hub_with_half_of_layer_one_are_met(engine_of):
    for name in ("gemma1_tiny", "gemma2_tiny"):
        arrays, engine = goldens.arrays(name), engine_of(name)
        token_ids, mask = arrays["fwd.token_ids"], arrays["fwd.padding_mask"]
        rows = [r for r in range(len(mask)) if mask[r, 0] and (np.diff(mask[r] * 1) <= 0).all()]
        assert len(rows) == 2, "a full one and one that is padded on the right"
        for row in rows:
            text = token_ids[row, : int(mask[row].sum())].tolist()
            half = Intervention("scale", (1,), 0.5)
            residuals, _ = look(engine, touched_pieces(text, (half,), range(len(text))))
            places = [AskedPlace(each, (0,), wants_logits=True) for each in residuals]
            logits = [np.frombuffer(each.logits, "<f4") for each in engine.measure(places)]
            expected = arrays["score.logits_half1"][row, : len(text)]
            np.testing.assert_allclose(logits, expected, atol=2e-4)


def test_setting_the_last_layer_gives_the_distribution_computed_by_numpy(engine_of):
    for name in goldens.TINY_PRESETS:
        engine, text = engine_of(name), random_tokens(9)
        config, weights = goldens.backbone(name).config, goldens.backbone(name).gemma_weights
        v = vector(config.hidden_dim, size=3.0)
        put = Intervention("set", (config.num_layers - 1,), vector=v.tobytes())
        residuals, _ = look(engine, touched_pieces(text, (put,), [8]))
        [score] = engine.measure([AskedPlace(residuals[-1], (0,), wants_logits=True)])
        exact = v.astype(np.float64)
        normed = exact / np.sqrt((exact**2).mean() + config.final_norm_epsilon)
        normed *= 1 + np.asarray(weights.final_norm, np.float64)
        logits = np.asarray(weights.embeddings, np.float64) @ normed
        if cap := config.final_soft_cap:
            logits = cap * np.tanh(logits / cap)
        np.testing.assert_allclose(np.frombuffer(score.logits, "<f4"), logits, atol=2e-4)
        step = StepIntervention(put, True, False)
        [[token, *_]] = drawn(engine, {2: (text, (), (step,))})
        assert token.token_id == logits.argmax()
        expected = logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert token.logprob == pytest.approx(expected, abs=2e-4)


def prefill_touched(engine, slot, prompt, touches):
    engine.begin(slot, prompt)
    for start in range(0, len(prompt) - 1, 256):
        ids = prompt[start : min(start + 256, len(prompt) - 1)]
        inside = tuple(
            Touch(t.intervention, tuple(p - start for p in t.places if 0 <= p - start < len(ids)))
            for t in touches
        )
        for _ in engine.prefill([PromptChunk(slot, ids, start, inside)]):
            pass


def drawn(engine, rows, num_tokens=6, num_steps=2):
    """Tokens of rows, slot -> prompt, touches and steps, that decode together."""
    rules = {}
    for slot, (prompt, touches, steps) in rows.items():
        prefill_touched(engine, slot, prompt, touches)
        rules[slot] = rules_of(prompt, num_tokens, num_logprobs=3, interventions=steps)
    tokens = {slot: [] for slot in rows}
    for done in range(0, num_tokens, num_steps):
        batch = [DecodeRow(s, len(rows[s][0]) - 1 + done, rules[s]) for s in rows]
        for row, found in zip(batch, engine.decode(batch, num_steps).tokens(), strict=True):
            tokens[row.slot] += found
    return list(tokens.values())


@PATHS
def test_rows_beside_steered_ones_keep_their_bits_and_so_do_the_steered_ones(
    name, kernels, engine_of
):
    engine = engine_of(name, kernels)
    asked = some_interventions(engine.info.hidden_dim, range(-1, engine.info.num_layers))
    rows = {}
    for slot, num_tokens in ((2, 30), (0, 2), (3, 270), (1, 8)):
        prompt = random_tokens(num_tokens, seed=slot)
        own = asked[slot:] + asked[:slot] if slot % 2 else ()
        steps = tuple(StepIntervention(each, slot == 1, True) for each in own)
        touches = tuple(Touch(each, tuple(range(num_tokens - 1))) for each in own)
        rows[slot] = (prompt, touches, steps)
    alone = [drawn(engine, {slot: row})[0] for slot, row in rows.items()]
    assert drawn(engine, rows) == alone
    plain = [drawn(engine, {slot: (row[0], (), ())})[0] for slot, row in rows.items()]
    # Slots 2 and 0 were left alone.
    assert [a == b for a, b in zip(alone, plain, strict=True)] == [True, True, False, False]


@PATHS
@pytest.mark.parametrize(("in_prompt", "at_end", "behind"), [(1, 1, 1), (1, 1, 0), (0, 0, 1)])
def test_steered_tokens_are_what_scores_find_step_by_step(
    name, kernels, in_prompt, at_end, behind, engine_of
):
    engine, prompt = engine_of(name, kernels), random_tokens(10)
    asked = some_interventions(engine.info.hidden_dim, range(-1, engine.info.num_layers))[:3]
    steps = tuple(StepIntervention(each, bool(at_end), bool(behind)) for each in asked)
    touches = tuple(Touch(each, tuple(range(9)) if in_prompt else ()) for each in asked)
    [tokens] = drawn(engine, {1: (prompt, touches, steps)})
    text = [*prompt]
    for token in tokens:
        places = [*range(9)] * in_prompt + [9] * at_end + [*range(10, len(text))] * behind
        residuals, _ = look(engine, touched_pieces(text, asked, places))
        [score] = engine.measure([AskedPlace(residuals[-1], (token.token_id,), num_top=3)])
        assert score.ranks == (0,)
        assert score.logprobs[0] == pytest.approx(token.logprob, abs=5e-5)
        text.append(token.token_id)


def test_nothing_compiles_for_a_capture_or_an_intervention(engine_of):
    engine = engine_of("gemma3_tiny")
    asked = some_interventions(engine.info.hidden_dim, range(-1, 7))
    before = engine.num_compilations
    for num_tokens in (1, 70, 200):
        text = random_tokens(num_tokens)
        look(engine, touched_pieces(text, asked, range(num_tokens), [-1, 3]))
        steps = tuple(StepIntervention(each, True, True) for each in asked)
        touches = tuple(Touch(each, tuple(range(num_tokens - 1))) for each in asked)
        drawn(engine, {1: (text, touches, steps)})
    assert engine.num_compilations == before
