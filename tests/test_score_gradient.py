"""The gradient example of the Keras page, in JAX: `jax.grad` through `score`.

keras-hub's answers come from a GradientTape on its TensorFlow backend, `gradient.npz`. A gradient
may differ by 1e-4 of its largest magnitude, which is 1 to 730; measured are at most 1.7e-5 of it,
as TensorFlow sums in yet another order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.causal_lm import GemmaCausalLM
from tests import goldens

SETS = pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])
OF_SCALE = 1e-4


@pytest.fixture
def given(name):
    with np.load(goldens.directory(name) / "gradient.npz") as archive:
        return dict(archive) | goldens.arrays(name)


def close(actual, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, atol=OF_SCALE * scale, rtol=0)


def loss_from(name, given, at, padding_mask):
    """Sum and rows of the loss as a function of what enters one layer."""
    model = GemmaCausalLM(goldens.backbone(name))

    def loss_of(x):
        loss = model.score(
            given["fwd.token_ids"],
            padding_mask=padding_mask,
            scoring_mode="loss",
            layer_intercept_fn=lambda stream, layer: x if layer == at else stream,
            target_ids=given["score.target_ids"],
        )
        return loss.sum(), loss

    return jax.jit(jax.value_and_grad(loss_of, has_aux=True))


@SETS
def test_the_gradient_by_the_embeddings_is_that_of_keras_hub(name, given):
    loss_and_gradient = loss_from(name, given, -1, given["fwd.padding_mask"])
    (_, loss), gradient = loss_and_gradient(jnp.asarray(given["fwd.act.-1"]))
    close(loss, given["loss"])
    close(gradient, given["embeddings"])


@SETS
def test_the_gradient_by_the_output_of_a_block_is_that_of_keras_hub(name, given):
    loss_and_gradient = loss_from(name, given, 0, given["fwd.padding_mask"])
    (_, loss), gradient = loss_and_gradient(jnp.asarray(given["fwd.act.0"]))
    close(loss, given["loss"])
    close(gradient, given["block0"])


@SETS
def test_without_a_mask_the_gradient_is_that_of_keras_hub_too(name, given):
    loss_and_gradient = loss_from(name, given, -1, None)
    (_, loss), gradient = loss_and_gradient(jnp.asarray(given["fwd.act.-1"]))
    close(loss, given["nomask.loss"])
    close(gradient, given["nomask.embeddings"])
