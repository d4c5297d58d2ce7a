"""A bfloat16 model against what keras-hub 0.32 computed in bfloat16.

| arrays | compared with | criterion |
|---|---|---|
| bf16.hidden, bf16.logits | backbone and `score`, operation by operation | bit for bit |
| bf16.logits | `predict`, one compiled program | no further from float32 than keras-hub |
| bf16preset.logits_loaded_default | float32 arithmetic on the rounded weights | 2e-4 |

Operation by operation, every result is rounded to eight bits where keras-hub rounds it. Sums of a
few dozen products are exact enough in float32 that their order is rounded away, so nothing is left
of W · xᵀ; measured equal with AVX-512, AVX2 and SSE4.2. A compiled program keeps more than bfloat16
between fused operations, so its bits differ from keras-hub's, which are further from the truth:
the mean error against the float32 logits is 0.84 (Gemma 1) and 0.85 (Gemma 2) of keras-hub's own.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from model.causal_lm import GemmaCausalLM
from model.gemma.backbone import Backbone
from model.presets.keras_directory import KerasPreset
from tests import goldens

SETS = pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])


def loaded(directory, dtype):
    preset = KerasPreset.open(directory)
    arrays = {key: jnp.asarray(array) for key, array in preset.arrays()}
    return Backbone(preset.config, arrays, dtype=dtype)


def inputs(name):
    given = goldens.arrays(name)
    return {"token_ids": given["fwd.token_ids"], "padding_mask": given["fwd.padding_mask"]}


@SETS
def test_hidden_states_and_logits_are_those_of_keras_hub_bit_for_bit(name):
    backbone = loaded(goldens.preset_directory(name), "bfloat16")
    hidden, logits = backbone(inputs(name)), GemmaCausalLM(backbone).score(**inputs(name))
    assert hidden.dtype == logits.dtype == jnp.bfloat16
    given = goldens.arrays(name)
    np.testing.assert_array_equal(np.asarray(hidden, np.float32), given["bf16.hidden"])
    np.testing.assert_array_equal(np.asarray(logits, np.float32), given["bf16.logits"])


@SETS
def test_compiled_logits_are_no_further_from_float32_than_those_of_keras_hub(name):
    model = GemmaCausalLM(loaded(goldens.preset_directory(name), "bfloat16"))
    logits = np.asarray(model.predict(inputs(name), verbose=0), np.float32)
    given = goldens.arrays(name)
    our_error = np.abs(logits - given["fwd.logits"]).mean()
    their_error = np.abs(given["bf16.logits"] - given["fwd.logits"]).mean()
    assert 0.0 < our_error <= their_error


def test_a_preset_of_rounded_weights_computes_in_float32_as_keras_hub_does():
    model = GemmaCausalLM(loaded(goldens.directory("gemma1_tiny") / "preset_bf16", "float32"))
    expected = goldens.arrays("gemma1_tiny")["bf16preset.logits_loaded_default"]
    logits = model.score(**inputs("gemma1_tiny"))
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=0)
