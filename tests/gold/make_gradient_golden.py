"""Writes ``gradient.npz`` of the tiny goldens: the gradient through keras-hub's ``score``.

Runs in keras-hub's environment on its TensorFlow backend, without our packages:
``python tests/gold/make_gradient_golden.py [ROOT_OF_GOLDENS]``. The inputs are those of the golden
``score.loss``, which the loss here must equal, or nothing is written.

| array | content |
|---|---|
| `loss` [B, T] | per-token loss with `fwd.padding_mask` and `score.target_ids` |
| `embeddings` [B, T, D] | derivative of the sum of `loss` by the unscaled embeddings, layer -1 |
| `block0` [B, T, D] | derivative of the same sum by the residual stream after block 0 |
| `nomask.loss`, `nomask.embeddings` | the same with ``padding_mask=None``, as on the Keras page |
"""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import keras_hub
import numpy as np
import tensorflow as tf

NAMES = ("gemma1_tiny", "gemma2_tiny")
EMBEDDINGS, AFTER_BLOCK_0 = -1, 0
LIMIT = 2e-4  # of the loss on this backend against the golden, made on the JAX backend


def loss_and_gradients(model, token_ids, padding_mask, target_ids, layers):
    """The loss [B, T], and for each layer the derivative of its sum by what enters there."""
    watched = {}
    with tf.GradientTape(watch_accessed_variables=False) as tape:

        def watch(x, layer):
            if layer in layers:
                tape.watch(x)
                watched[layer] = x
            return x

        loss = model.score(
            token_ids,
            padding_mask=padding_mask,
            scoring_mode="loss",
            layer_intercept_fn=watch,
            target_ids=target_ids,
        )
        total = tf.reduce_sum(loss)
    gradients = tape.gradient(total, [watched[layer] for layer in layers])
    return loss.numpy(), [gradient.numpy() for gradient in gradients]


def golden(directory):
    """Every array of one ``gradient.npz``."""
    model = keras_hub.models.GemmaCausalLM.from_preset(str(directory / "preset"), dtype="float32")
    with np.load(directory / "cases.npz") as given:
        token_ids, padding_mask = given["fwd.token_ids"], given["fwd.padding_mask"]
        target_ids, expected = given["score.target_ids"], given["score.loss"]
    loss, [embeddings, block0] = loss_and_gradients(
        model, token_ids, padding_mask, target_ids, [EMBEDDINGS, AFTER_BLOCK_0]
    )
    difference = float(np.abs(loss - expected).max())
    sys.stdout.write(f"{directory.name}: loss differs from score.loss by {difference:.1e}\n")
    if difference > LIMIT:
        raise SystemExit("That is more than rounding; nothing is written.")
    nomask_loss, [nomask] = loss_and_gradients(model, token_ids, None, target_ids, [EMBEDDINGS])
    return {
        "loss": loss,
        "embeddings": embeddings,
        "block0": block0,
        "nomask.loss": nomask_loss,
        "nomask.embeddings": nomask,
    }


def main(root):
    for name in NAMES:
        arrays = golden(root / name)
        np.savez_compressed(root / name / "gradient.npz", **arrays)
        scales = ", ".join(f"{key} {np.abs(array).max():.3g}" for key, array in arrays.items())
        sys.stdout.write(f"{name}: largest magnitudes {scales}\n")


if __name__ == "__main__":
    default = Path(__file__).parents[1] / "goldens"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
