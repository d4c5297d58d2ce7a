"""Makes the int8 goldens of gemma1_tiny with keras-hub: a preset, its kernels and its logits.

Runs in keras-hub's environment, without our packages: ``python tests/gold/make_int8_golden.py``
writes ``preset_int8/`` and ``int8.npz`` into ``tests/goldens/gemma1_tiny``:

* ``kernel/<layer>``: the integers divided by their scales, by the functions of Keras itself;
* ``logits``: what the int8 model says to ``fwd.token_ids``; it rounds activations, too;
* ``float_logits``: what a float32 model with the same kernels says.
"""

import os
import shutil
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import keras
import keras_hub
import numpy as np

GOLDEN = Path(__file__).parents[1] / "goldens" / "gemma1_tiny"


def kernel(layer: keras.Layer) -> np.ndarray:
    """The kernel of a quantised layer as floats."""
    if hasattr(layer, "embeddings_scale"):
        scales = keras.ops.expand_dims(layer.embeddings_scale, -1)
        return np.asarray(keras.ops.divide(layer._embeddings, scales))
    scales = layer._adjust_scale_for_dequant(layer.kernel_scale)
    return np.asarray(keras.ops.divide(layer._kernel, scales))


def main() -> None:
    model = keras_hub.models.GemmaCausalLM.from_preset(str(GOLDEN / "preset"), dtype="float32")
    # Not the task: keras-hub 0.32 stops at the tokenizer, which cannot be quantised.
    model.backbone.quantize("int8")
    shutil.rmtree(GOLDEN / "preset_int8", ignore_errors=True)
    model.save_to_preset(str(GOLDEN / "preset_int8"))

    given = np.load(GOLDEN / "cases.npz")
    inputs = {"token_ids": given["fwd.token_ids"], "padding_mask": given["fwd.padding_mask"]}
    arrays = {"logits": np.asarray(model(inputs))}
    floats = keras_hub.models.GemmaCausalLM.from_preset(str(GOLDEN / "preset"), dtype="float32")
    layers = {layer.path: layer for layer in floats.backbone._flatten_layers()}
    for layer in model.backbone._flatten_layers():
        if getattr(layer, "quantization_mode", None) == "int8":
            values = kernel(layer)
            arrays[f"kernel/{layer.path}"] = values
            layers[layer.path].weights[0].assign(values)
    arrays["float_logits"] = np.asarray(floats(inputs))
    np.savez_compressed(GOLDEN / "int8.npz", **arrays)
    apart = np.abs(arrays["logits"] - arrays["float_logits"])
    sys.stdout.write(f"logits differ by {apart.mean():.3f} on average, {apart.max():.3f} at most\n")


if __name__ == "__main__":
    main()
