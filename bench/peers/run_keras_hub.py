"""keras-hub on its JAX backend: ``run_keras_hub.py DIRECTORY``, with a preset; see `answering`."""

import os
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras_hub
import numpy as np
from answering import serve


def main(directory):
    model = keras_hub.models.CausalLM.from_preset(directory, dtype="float32", preprocessor=None)
    model.compile(sampler="greedy")

    def generate(prompts, num_new_tokens):
        # Without a preprocessor rows come padded to their full length.
        rows = np.pad(np.array(prompts, "int32"), ((0, 0), (0, num_new_tokens)))
        length = len(prompts[0])
        mask = np.broadcast_to(np.arange(rows.shape[1]) < length, rows.shape)
        # With the prompt, keras-hub 0.32 stops at the images that a text model does not have.
        answer = model.generate(
            {"token_ids": rows, "padding_mask": mask}, stop_token_ids=None, strip_prompt=True
        )
        return np.asarray(answer["token_ids"])[:, :num_new_tokens].tolist()

    serve(generate, ("keras-hub", "keras", "jax"))


if __name__ == "__main__":
    main(sys.argv[1])
