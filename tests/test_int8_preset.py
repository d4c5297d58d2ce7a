"""Keras presets that were quantised to int8, against what keras-hub makes of them.

``preset_int8`` and ``int8.npz`` of gemma1_tiny come from ``tests/gold/make_int8_golden.py``. Keras
divides the integers by their scales, and so do we, bit for bit but for the last one. It also rounds
the activations to integers at every product, which we do not: our logits are those of its float32
model with the same kernels.
"""

import json
import shutil
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.errors import PresetFileInvalid, UnsupportedPreset
from model.gemma.forward import forward
from model.gemma.weights import assemble
from model.presets.keras_config import read_config
from model.presets.keras_directory import KerasPreset
from model.presets.resolve import open_preset
from model.weight_names import weight_specs
from tests import goldens

GEMMA1 = goldens.directory("gemma1_tiny")
INT8 = GEMMA1 / "preset_int8"
FLOATS = GEMMA1 / "preset"
WEIGHTS = "model.weights.h5"

BLOCK = "layers/gemma_decoder_block_1"
QUERY = f"{BLOCK}/attention/query_dense/vars/0"
QUERY_SCALES = f"{BLOCK}/attention/query_dense/vars/1"
EMBEDDINGS = "layers/reversible_embedding/vars/0"
INT8_POLICY = {
    "class_name": "QuantizedDTypePolicy",
    "config": {"mode": "int8", "source_name": None},
}


def golden():
    with np.load(GEMMA1 / "int8.npz") as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture
def preset(tmp_path):
    return Path(shutil.copytree(INT8, tmp_path / "preset"))


def edit_map(preset, **changes):
    """Changes, or with None removes, policies of the map in config.json."""
    path = preset / "config.json"
    document = json.loads(path.read_text())
    policies = document["config"]["dtype"]["config"]["policy_map"]
    policies |= changes
    document["config"]["dtype"]["config"]["policy_map"] = {
        layer: policy for layer, policy in policies.items() if policy is not None
    }
    path.write_text(json.dumps(document))
    return preset


def replace(preset, name, array):
    with h5py.File(preset / WEIGHTS, "r+") as file:
        if name in file:
            del file[name]
        if array is not None:
            file[name] = array
    return preset


@pytest.fixture(scope="module")
def logits():
    """Ours, for the forward case of the golden set."""
    preset, given = KerasPreset.open(INT8), goldens.arrays("gemma1_tiny")
    arrays = {name: jnp.asarray(array) for name, array in preset.arrays()}
    result = jax.jit(forward, static_argnums=0)(
        preset.config,
        assemble(preset.config, arrays),
        jnp.asarray(given["fwd.token_ids"], jnp.int32),
        jnp.asarray(given["fwd.padding_mask"]).astype(bool),
    )
    return np.asarray(result.logits)


# --- what is read --------------------------------------------------------------------------------


def test_every_kernel_is_what_keras_divides_it_to():
    stored, arrays = golden(), dict(KerasPreset.open(INT8).arrays())
    layers = [name.removeprefix("kernel/") for name in stored if name.startswith("kernel/")]
    assert len(layers) == 15
    for layer in layers:
        kernel = stored[f"kernel/{layer}"]
        if layer == "token_embedding":
            expected, name = kernel, "token_embedding/embeddings"
        elif layer.endswith("attention_output"):
            expected, name = np.einsum("nhd->dnh", kernel).reshape(32, -1), f"{layer}/kernel"
        elif kernel.ndim == 3:
            expected, name = np.einsum("ndh->nhd", kernel).reshape(-1, 32), f"{layer}/kernel"
        else:
            expected, name = kernel.T, f"{layer}/kernel"
        # One unit in the last place: XLA's division is not always correctly rounded.
        np.testing.assert_allclose(arrays[name], expected, rtol=1.2e-7, atol=0, err_msg=layer)


def test_every_number_is_the_one_that_was_quantised_but_for_half_a_step():
    floats = dict(KerasPreset.open(FLOATS).arrays())
    for name, array in KerasPreset.open(INT8).arrays():
        if array.ndim == 1:
            np.testing.assert_array_equal(array, floats[name])
            continue
        # One scale for each output, where 127 steps reach its largest weight. Rows of all kernels
        # are outputs, and those of the embeddings are tokens; the outputs of a projection back
        # from the heads have one scale over all heads, and it is a row here, too.
        step = np.abs(floats[name]).max(axis=1, keepdims=True) / 127
        assert (np.abs(array - floats[name]) <= 0.501 * step).all(), name


def test_logits_are_those_of_a_float_model_of_keras_hub_with_these_kernels(logits):
    np.testing.assert_allclose(logits, golden()["float_logits"], atol=2e-4, rtol=0)


def test_rounded_activations_move_keras_hubs_logits_as_little_as_rounded_weights_do(logits):
    """Measured, over logits that scatter by 4.3: 0.106 on average; rounded weights move 0.108."""
    seen = goldens.arrays("gemma1_tiny")["fwd.padding_mask"].astype(bool)
    ours, theirs = logits[seen], golden()["logits"][seen]
    assert 0.01 < np.abs(ours - theirs).mean() < 0.15
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.95


def test_an_int8_preset_is_opened_and_converted_as_any_other(tmp_path):
    expected = dict(KerasPreset.open(INT8).arrays())
    for name, array in open_preset(str(INT8), tmp_path).arrays():
        np.testing.assert_array_equal(array, expected[name])


def test_layers_that_are_not_in_the_map_are_floats(preset):
    with h5py.File(FLOATS / WEIGHTS) as file:
        query = file[QUERY][...]
    replace(replace(preset, QUERY, query), QUERY_SCALES, None)
    edit_map(preset, **{"decoder_block_1/attention/query": None})
    changed, before, floats = (
        dict(KerasPreset.open(directory).arrays()) for directory in (preset, INT8, FLOATS)
    )
    query_name = "decoder_block_1/attention/query/kernel"
    np.testing.assert_array_equal(changed.pop(query_name), floats[query_name])
    for name, array in changed.items():
        np.testing.assert_array_equal(array, before[name])


def test_a_float_policy_in_the_map_is_what_its_absence_is(preset):
    before = KerasPreset.open(preset).int8_weights
    floats = {"class_name": "DTypePolicy", "config": {"name": None}}
    edit_map(preset, **{"decoder_block_0/pre_ffw_norm": floats})
    assert KerasPreset.open(preset).int8_weights == before


def test_scales_in_bfloat16_are_divided_by_in_float32(preset):
    """As a bfloat16 model saves them."""
    with h5py.File(preset / WEIGHTS, "r+") as file:
        del file[QUERY_SCALES]
        # 0x4000 is 2.0 in bfloat16: the upper half of its float32.
        scales = np.full((1, 1, 4, 16), 0x4000, "<u2").view("V2")
        file[QUERY_SCALES] = scales
        file[QUERY_SCALES].attrs["dtype"] = "bfloat16"
        integers = file[QUERY][...]
    array = dict(KerasPreset.open(preset).arrays())["decoder_block_1/attention/query/kernel"]
    np.testing.assert_array_equal(array[16 * 3 + 5], integers[3, :, 5] / 2)


def test_shards_hold_what_the_single_file_holds(preset):
    expected = dict(KerasPreset.open(preset).arrays())
    with (
        h5py.File(preset / WEIGHTS, "r") as whole,
        h5py.File(preset / "model_00000.weights.h5", "w") as first,
        h5py.File(preset / "model_00001.weights.h5", "w") as second,
    ):
        # The scales of the embeddings are in another shard than their integers.
        for name in ["layers/reversible_embedding/vars/0", "layers/gemma_decoder_block"]:
            whole.copy(name, first.require_group(str(Path(name).parent)))
        for name in ["layers/reversible_embedding/vars/1", BLOCK, "layers/rms_normalization"]:
            whole.copy(name, second.require_group(str(Path(name).parent)))
    (preset / WEIGHTS).unlink()
    names = ["model_00000.weights.h5", "model_00001.weights.h5"]
    index = {"weight_map": {"/layers/reversible_embedding/vars": names}}
    (preset / "model.weights.json").write_text(json.dumps(index))
    found = dict(KerasPreset.open(preset).arrays())
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


def test_every_key_head_of_gemma3_has_scales_of_its_own(tmp_path):
    """Two key/value heads: integers 6 divided by 2 in one and by 3 in the other."""
    preset = Path(shutil.copytree(goldens.preset_directory("gemma3_tiny"), tmp_path / "gemma3"))
    path = preset / "config.json"
    document = json.loads(path.read_text())
    document["config"]["dtype"] = {
        "class_name": "DTypePolicyMap",
        "config": {"default_policy": None, "policy_map": {}},
    }
    path.write_text(json.dumps(document))
    edit_map(preset, **{"decoder_block_0/attention/key": INT8_POLICY})
    key = "layers/gemma3_decoder_block/attention/key_dense/vars"
    scales = np.full((1, 1, 2, 16), 2, "f4")
    scales[0, 0, 1] = 3
    replace(preset, f"{key}/0", np.full((2, 32, 16), 6, "i1"))
    replace(preset, f"{key}/1", scales)
    array = dict(KerasPreset.open(preset).arrays())["decoder_block_0/attention/key/kernel"]
    np.testing.assert_array_equal(array, np.repeat([[3.0] * 32, [2.0] * 32], 16, axis=0))


# --- weights that are refused --------------------------------------------------------------------


def with_value(value):
    scales = np.full((1, 1, 4, 16), 50, "f4")
    scales[0, 0, 2, 7] = value
    return scales


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        (QUERY_SCALES, None, f"{QUERY_SCALES} is missing"),
        (QUERY_SCALES, np.ones((1, 1, 16, 4), "f4"), r"has shape .*implies \(1, 1, 4, 16\)"),
        (QUERY_SCALES, np.ones((4, 16), "f4"), r"has shape .*implies \(1, 1, 4, 16\)"),
        (QUERY_SCALES, np.ones((1, 1, 4, 16), "i1"), "has int8, .* implies floats"),
        (QUERY_SCALES, with_value(0), "a scale that is not a positive"),
        (QUERY_SCALES, with_value(-1), "a scale that is not a positive"),
        (QUERY_SCALES, with_value(1e-40), "a scale that is not a positive"),
        (QUERY_SCALES, with_value(np.nan), "a scale that is not a positive"),
        (QUERY_SCALES, with_value(np.inf), "a scale that is not a positive"),
        (QUERY, np.ones((4, 32, 16), "f4"), "has floats, .* implies int8"),
        (QUERY, np.ones((4, 32, 8), "i1"), r"has shape \(4, 32, 8\).*implies \(4, 32, 16\)"),
        (QUERY, np.ones((4, 32, 16), "u1"), "has type uint8"),
        (QUERY, np.ones((4, 32, 16), "i2"), "has type int16"),
        (EMBEDDINGS, np.ones((512, 32), "f4"), "has floats, .* implies int8"),
        # As Keras packs int4, with a zero point beside the scales.
        (QUERY, np.ones((32, 32), "i1"), r"has shape \(32, 32\)"),
        (f"{QUERY[:-1]}2", np.ones((1, 64), "i1"), "does not belong"),
        (f"{BLOCK}/pre_ffw_norm/vars/1", np.ones((1,), "f4"), "does not belong"),
        (f"{BLOCK}/pre_ffw_norm/vars/0", np.ones((32,), "i1"), "has int8, .* implies floats"),
    ],
)
def test_integers_that_do_not_fit_the_config_are_refused_by_name(preset, name, array, words):
    replace(preset, name, array)
    with pytest.raises(PresetFileInvalid, match=words) as caught:
        list(KerasPreset.open(preset).arrays())
    assert "model.weights.h5" in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_integers_under_a_float_policy_are_refused(preset):
    """Nothing would say that they have to be divided."""
    shutil.copy(FLOATS / "config.json", preset / "config.json")
    with pytest.raises(PresetFileInvalid, match="does not belong to the model"):
        next(KerasPreset.open(preset).arrays())


def test_a_scale_array_that_declares_an_exabyte_is_refused_unread(preset):
    with h5py.File(preset / WEIGHTS, "r+") as file:
        del file[QUERY_SCALES]
        file.create_dataset(QUERY_SCALES, (1 << 30, 1 << 30), "f4")
    with pytest.raises(PresetFileInvalid, match="declares data that are not stored"):
        next(KerasPreset.open(preset).arrays())


# --- policies that are refused -------------------------------------------------------------------

LAYER = "decoder_block_0/ffw_linear"


@pytest.mark.parametrize(
    ("layer", "policy", "words"),
    [
        (LAYER, {"class_name": "Int4DTypePolicy", "config": {"mode": "int4/128"}}, "'int4/128'"),
        (LAYER, {"class_name": "QuantizedDTypePolicy", "config": {"mode": "int4"}}, "'int4'"),
        (
            LAYER,
            {"class_name": "QuantizedFloat8DTypePolicy", "config": {"mode": "float8"}},
            "'float8'",
        ),
        (LAYER, {"class_name": "GPTQDTypePolicy", "config": {"mode": "gptq/4/128"}}, "'gptq/4"),
        (LAYER, {"class_name": "AWQDTypePolicy", "config": {"mode": "awq/4/128"}}, "'awq/4/128'"),
        (LAYER, "int8", "'int8' for the layer"),
        (LAYER, ["int8"], "for the layer"),
        (
            LAYER,
            {
                "class_name": "QuantizedDTypePolicy",
                "config": {"mode": "int8", "source_name": "int4"},
            },
            "for the layer",
        ),
        ("decoder_block_2/ffw_linear", INT8_POLICY, "no layer of this model"),
        ("decoder_block_0/pre_ffw_norm", INT8_POLICY, "no layer of this model"),
        ("decoder_block_.*", INT8_POLICY, "no layer of this model"),
    ],
)
def test_another_quantisation_is_refused_with_the_layer(preset, layer, policy, words):
    edit_map(preset, **{layer: policy})
    with pytest.raises(UnsupportedPreset, match=words) as caught:
        KerasPreset.open(preset)
    assert layer in str(caught.value)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_remedy_for_other_quantisations_is_named(preset):
    edit_map(preset, **{LAYER: {"class_name": "Int4DTypePolicy", "config": {"mode": "int4/128"}}})
    with pytest.raises(UnsupportedPreset, match="Save the preset with a float dtype such as bf"):
        KerasPreset.open(preset)


@pytest.mark.parametrize(
    ("inner", "error", "words"),
    [
        (None, PresetFileInvalid, "without a policy_map"),
        ({"policy_map": []}, PresetFileInvalid, "without a policy_map"),
        ({"policy_map": {}, "default_policy": INT8_POLICY}, UnsupportedPreset, "default_policy"),
        ({"policy_map": {}, "default_policy": "int8"}, UnsupportedPreset, "default_policy 'int8'"),
    ],
)
def test_a_map_that_is_none_is_refused(preset, inner, error, words):
    path = preset / "config.json"
    document = json.loads(path.read_text())
    document["config"]["dtype"]["config"] = inner
    path.write_text(json.dumps(document))
    with pytest.raises(error, match=words):
        read_config(path)


def test_only_matrices_can_be_quantised():
    int8 = KerasPreset.open(INT8).int8_weights
    specs = list(weight_specs(read_config(INT8 / "config.json")))
    assert int8 == {spec.name for spec in specs if len(spec.shape) == 2}
