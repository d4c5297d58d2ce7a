"""Attribution on tiny presets: the same derivatives by other roads, and what they add up to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attribution_questions import (
    AttributedText,
    AttributionQuestion,
)
from model.gemma.forward import EMBEDDING_LAYER, forward
from tests import goldens
from tests.test_engine import random_tokens

PRESETS = pytest.mark.parametrize("name", goldens.TINY_PRESETS)
LAYERS = pytest.mark.parametrize("layer", [-1, 0, "last"])


def answer(engine, question):
    """The whole of it at once, and how many passes it took."""
    running = engine.attribute(question)
    num_passes = 0
    while True:
        try:
            num_passes += next(running)
        except StopIteration as done:
            return done.value, num_passes


def numbers(engine, *texts, layer=-1, num_told=None, **others):
    num_told = len(texts[0].token_ids) if num_told is None else num_told
    question = AttributionQuestion(texts, num_told, layer, **others)
    found, _ = answer(engine, question)
    assert found.is_finite
    return np.frombuffer(found.numbers, "<f4").reshape(num_told, -1).astype(np.float64)


def layer_of(name, layer):
    return goldens.backbone(name).config.num_layers - 1 if layer == "last" else layer


def by_another_road(name, text, layer):
    """Value, stream and gradient, by `jax.grad` through a whole forward pass."""
    backbone = goldens.backbone(name)
    ids = jnp.asarray([text.token_ids], jnp.int32)
    seen = {}

    def note(x, at):
        seen[at] = x
        return x

    forward(backbone.config, backbone.gemma_weights, ids, ids >= 0, intercept=note)

    def value(x):
        logits = forward(
            backbone.config,
            backbone.gemma_weights,
            ids,
            ids >= 0,
            intercept=lambda stream, at: x if at == layer else stream,
        ).logits[0]
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        return sum(logprobs[place, token_id] for place, token_id in text.asked)

    found, gradient = jax.value_and_grad(value)(seen[layer])
    return float(found), np.asarray(seen[layer][0]), np.asarray(gradient[0]), value


def a_text(num_tokens, asked, seed=0):
    return AttributedText(tuple(random_tokens(num_tokens, seed=seed)), asked)


def close(actual, expected, of_scale=1e-4):
    np.testing.assert_allclose(actual, expected, atol=of_scale * np.abs(expected).max(), rtol=0)


# Alone in the shorter pass, filling it, in the longer one; the second ends before the text does.
@PRESETS
@LAYERS
@pytest.mark.parametrize(
    ("num_tokens", "places"), [(9, (3, 8)), (40, (20,)), (128, range(60, 127)), (150, (149, 70))]
)
def test_a_gradient_is_that_of_a_whole_forward_pass(name, layer, num_tokens, places, engine_of):
    layer = layer_of(name, layer)
    text = a_text(num_tokens, tuple((place, (7 * place) % 512) for place in places))
    found = numbers(engine_of(name), text, layer=layer, reduction="none")
    _, _, expected, _ = by_another_road(name, text, layer)
    close(found, expected)


@pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])
@pytest.mark.parametrize(
    ("layer", "stored"), [(-1, "nomask.embeddings"), (-1, "embeddings"), (0, "block0")]
)
def test_the_stored_gradients_of_the_keras_page_are_met(name, layer, stored, engine_of):
    with np.load(goldens.directory(name) / "gradient.npz") as archive:
        expected = archive[stored]
    given = goldens.arrays(name)
    # Where there is a mask, only the row without padding is a text of the service.
    rows = range(4) if stored.startswith("nomask") else [0]
    assert given["fwd.padding_mask"][0].all()
    for row in rows:
        ids, targets = given["fwd.token_ids"][row].tolist(), given["score.target_ids"][row].tolist()
        text = AttributedText(tuple(ids), tuple(enumerate(targets)))
        found = numbers(engine_of(name), text, layer=layer, reduction="none", is_loss=True)
        close(found, expected[row])


@PRESETS
def test_a_gradient_is_what_a_small_change_makes(name, engine_of):
    text = a_text(12, ((5, 40), (11, 300)))
    found = numbers(engine_of(name), text, reduction="none")
    _, stream, _, value = by_another_road(name, text, EMBEDDING_LAYER)
    direction = np.sign(found)
    # A change of 0.04 altogether. The value is rounded to about 1e-5, which is 2.5e-4 of it; what
    # is beyond the derivative is 3e-3 of it at most.
    size = 0.02 / np.abs(found).sum()
    low, high = (
        float(value(jnp.asarray((stream + sign * size * direction)[None], jnp.float32)))
        for sign in (-1, 1)
    )
    assert high - low == pytest.approx(0.04, rel=5e-3)
