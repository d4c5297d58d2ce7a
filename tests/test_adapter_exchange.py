"""Adapters of keras-hub and PEFT: in, out, from one layout to the other, and hostile files."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load_file, save_file

from model.adapter_bank import AdapterBank
from model.adapter_exchange.files import (
    export_directory,
    export_file,
    import_adapter,
    read_content,
    understand,
)
from model.adapter_exchange.keras_process import read_elsewhere
from model.adapter_exchange.layouts import in_layout
from model.adapter_exchange.merged import merged_arrays
from model.adapter_file import write_adapter
from model.engine_adapters import EngineAdapters
from model.errors import (
    AdapterUnfit,
    PresetError,
    PresetFileInvalid,
    PresetFileMissing,
)
from model.gemma.keras_lora import TARGETS
from model.lora_adapter import LoraForm
from model.presets.keras_directory import KerasPreset
from tests import goldens
from tests.adapters import change_of, drawn_adapter

NAME = "gemma3_tiny"
CONFIG = goldens.backbone(NAME).config
ALL = tuple(sorted(TARGETS))
KERAS = LoraForm("keras", 3, 3.0, ("query", "value"))
PEFT = LoraForm("peft", 2, 4.0, ALL)
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def assert_same(found, expected):
    assert found.form == expected.form
    assert write_adapter(found) == write_adapter(expected)


def peft_parts(form=PEFT):
    """Tensors and config as PEFT saves them."""
    adapter = drawn_adapter(CONFIG, form)
    module = {
        "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
        "attention_output": "self_attn.o_proj", "ffw_gating": "mlp.gate_proj",
        "ffw_gating_2": "mlp.up_proj", "ffw_linear": "mlp.down_proj",
    }  # fmt: skip
    tensors = {}
    for (layer, target), (a, b) in adapter.pairs.items():
        name = f"base_model.model.model.layers.{layer}.{module[target]}"
        tensors[f"{name}.lora_A.weight"] = a
        tensors[f"{name}.lora_B.weight"] = b
    fields = {
        "peft_type": "LORA", "r": form.rank, "lora_alpha": int(form.alpha), "bias": "none",
        "target_modules": sorted({module[target].split(".")[1] for target in form.targets}),
        "use_rslora": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {},
        "alpha_pattern": {}, "lora_dropout": 0.1, "init_lora_weights": True, "layers_pattern": None,
        "base_model_name_or_path": "google/gemma-3", "task_type": "CAUSAL_LM", "loftq_config": {},
    }  # fmt: skip
    return adapter, tensors, fields


def peft_directory(path, tensors, fields):
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path


def read(path):
    return understand(read_content(path, CONFIG), CONFIG)


# --- the same adapter again ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["keras", "peft"])
@pytest.mark.parametrize("targets", [("query", "value"), ALL])
def test_a_file_of_its_own_layout_holds_the_adapter_to_the_last_bit(tmp_path, layout, targets):
    alpha = 3.0 if layout == "keras" else 7.5
    adapter = drawn_adapter(CONFIG, LoraForm(layout, 3, alpha, targets))
    path = tmp_path / "passing"
    export_file(adapter, path, layout, CONFIG)
    assert_same(import_adapter(path, layout, CONFIG), adapter)
    again = tmp_path / "again"
    export_file(adapter, again, layout, CONFIG)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["again", "passing"]


def test_a_directory_that_peft_would_save_is_read_and_one_is_written(tmp_path):
    adapter, tensors, fields = peft_parts()
    assert_same(read(peft_directory(tmp_path / "theirs", tensors, fields)), adapter)
    export_directory(adapter, tmp_path / "ours", CONFIG)
    assert_same(read(tmp_path / "ours"), adapter)
    written = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array)
    ours = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    for name in ("r", "lora_alpha", "peft_type", "bias", "use_rslora"):
        assert ours[name] == fields[name]
    assert set(ours["target_modules"]) == set(fields["target_modules"])
    with pytest.raises(PresetError, match="exists already"):
        export_directory(adapter, tmp_path / "ours", CONFIG)


@pytest.mark.parametrize("encode", [json.dumps, lambda x: x if type(x) is str else json.dumps(x)])
def test_one_file_with_the_config_as_metadata_is_the_directory(tmp_path, encode):
    adapter, tensors, fields = peft_parts()
    path = tmp_path / "one.safetensors"
    save_file(tensors, path, metadata={name: encode(value) for name, value in fields.items()})
    assert_same(read(path), adapter)


def brought_files(directory, adapter):
    """An adapter in every form that may be named at the start, and what it is."""
    directory.mkdir()
    export_file(adapter, directory / "tone.lora.h5", "keras", CONFIG)
    yield directory / "tone.lora.h5", adapter
    (directory / "adapter.safetensors").write_bytes(write_adapter(adapter))
    yield directory / "adapter.safetensors", adapter
    theirs, tensors, fields = peft_parts()
    yield peft_directory(directory / "peft", tensors, fields), theirs
    told = {name: json.dumps(value) for name, value in fields.items()}
    save_file(tensors, directory / "other.safetensors", metadata=told)
    yield directory / "other.safetensors", theirs


def test_what_was_named_at_the_start_is_brought_in_in_every_form_and_not_once_it_changed(tmp_path):
    bank = AdapterBank(CONFIG, num_slots=1, max_rank=8, programs={})
    adapters = EngineAdapters(CONFIG, bank)
    for path, expected in brought_files(tmp_path / "files", drawn_adapter(CONFIG, KERAS)):
        digest = read_content(path, CONFIG).digest
        assert adapters.bring_in_named(path, digest) == write_adapter(expected)
        weights = path / "adapter_model.safetensors" if path.is_dir() else path
        weights.write_bytes(weights.read_bytes() + b"\0")
        with pytest.raises(AdapterUnfit, match="has changed since it was named"):
            adapters.bring_in_named(path, digest)


def test_the_files_of_this_service_are_read_by_the_same_call(tmp_path):
    adapter = drawn_adapter(CONFIG, KERAS)
    (tmp_path / "adapter.safetensors").write_bytes(write_adapter(adapter))
    assert_same(read(tmp_path / "adapter.safetensors"), adapter)


@pytest.mark.parametrize("prefix", ["", "model.language_model.", "language_model.model."])
def test_names_of_other_classes_of_the_same_model_are_read(tmp_path, prefix):
    adapter, tensors, fields = peft_parts()
    old = "base_model.model.model."
    other = {f"base_model.model.{prefix}{n.removeprefix(old)}": t for n, t in tensors.items()}
    assert_same(read(peft_directory(tmp_path / "other", other, fields)), adapter)


def test_half_precision_is_widened_and_rslora_is_an_alpha(tmp_path):
    adapter, tensors, fields = peft_parts(replace(PEFT, rank=4))
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    fields |= {"use_rslora": True}
    found = read(peft_directory(tmp_path / "half", halves, fields))
    # 4 / √4 is 8 / 4.
    assert found.form == replace(adapter.form, alpha=8.0)
    for place, pair in adapter.pairs.items():
        for array, wide in zip(pair, found.pairs[place], strict=True):
            np.testing.assert_array_equal(wide, array.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_targets_may_be_named_whole(tmp_path):
    _, tensors, fields = peft_parts(replace(PEFT, targets=("query",)))
    fields["target_modules"] = [f"model.layers.{i}.self_attn.q_proj" for i in range(7)]
    assert read(peft_directory(tmp_path / "x", tensors, fields)).form.targets == ("query",)


# --- from one layout to the other ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "layout", "rank"),
    [
        (KERAS, "peft", 12),  # four heads of the query
        (LoraForm("keras", 3, 3.0, ("key", "value")), "peft", 6),
        (LoraForm("keras", 3, 3.0, ("attention_output", "ffw_linear")), "peft", 3),
        (LoraForm("keras", 3, 3.0, ALL), "peft", 12),
        (PEFT, "keras", 8),
        (LoraForm("peft", 2, 4.0, ("ffw_gating", "attention_output")), "keras", 2),
        (LoraForm("peft", 2, 4.0, ("value",)), "keras", 4),
    ],
)
def test_the_other_layout_changes_every_kernel_alike_at_rank_times_heads(form, layout, rank):
    adapter = drawn_adapter(CONFIG, form)
    other = in_layout(adapter, layout, CONFIG)
    assert other.form == LoraForm(layout, rank, float(rank), form.targets)
    assert in_layout(adapter, form.layout, CONFIG) is adapter
    for place in adapter.pairs:
        # Sums of the same numbers, and of zeros, in float64: only their order may differ.
        np.testing.assert_allclose(
            change_of(CONFIG, other, place), change_of(CONFIG, adapter, place), rtol=0, atol=1e-13
        )


def test_no_number_is_rounded_on_the_way():
    adapter = drawn_adapter(CONFIG, KERAS)
    (a, b), (wide_a, wide_b) = (
        each.pairs[0, "query"] for each in (adapter, in_layout(adapter, "peft", CONFIG))
    )
    # Head 2 is rows 6 to 8 of A, and below its own rows of B there are zeros in all other columns.
    np.testing.assert_array_equal(wide_a[6:9], a[2].T)
    head = wide_b[2 * 16 : 3 * 16]
    np.testing.assert_array_equal(head[:, 6:9], b.T)
    assert not np.delete(head, range(6, 9), axis=1).any()


def test_what_has_too_large_a_rank_in_the_other_layout_is_refused_with_both_numbers(tmp_path):
    adapter = drawn_adapter(CONFIG, LoraForm("keras", 300, 300.0, ("query",)))
    with pytest.raises(AdapterUnfit, match=r"rank 300 has rank 1200; a file has at most 1024"):
        export_file(adapter, tmp_path / "x", "peft", CONFIG)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("form", [KERAS, LoraForm("keras", 3, 3.0, ALL), PEFT])
def test_merged_kernels_are_kernels_and_what_a_bank_adds(form):
    adapter = drawn_adapter(CONFIG, form, scale=0.3)
    preset = KerasPreset.open(goldens.preset_directory(NAME))
    before = dict(preset.arrays())
    after = dict(merged_arrays(preset.arrays(), adapter))
    assert list(after) == list(before)
    names = {
        "query": "attention/query", "key": "attention/key", "value": "attention/value",
        "attention_output": "attention/attention_output",
        "ffw_gating": "ffw_gating", "ffw_gating_2": "ffw_gating_2", "ffw_linear": "ffw_linear",
    }  # fmt: skip
    changed = {f"decoder_block_{i}/{names[t]}/kernel": (i, t) for i, t in adapter.pairs}
    for name, array in before.items():
        expected = array.astype(np.float64)
        if name in changed:
            expected = expected + change_of(CONFIG, adapter, changed[name])
        np.testing.assert_allclose(after[name], expected, atol=2e-6, rtol=2e-6)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"use_dora": True}, AdapterUnfit, "'use_dora' is True, which is not served"),
        ({"modules_to_save": ["lm_head"]}, AdapterUnfit, "'modules_to_save' is"),
        ({"rank_pattern": {"q_proj": 4}}, AdapterUnfit, "'rank_pattern' is"),
        ({"alpha_pattern": {"q_proj": 4}}, AdapterUnfit, "'alpha_pattern' is"),
        ({"layers_to_transform": [1]}, AdapterUnfit, "'layers_to_transform' is"),
        ({"init_lora_weights": "pissa"}, AdapterUnfit, "'init_lora_weights' is 'pissa'"),
        ({"a_later_field": 1}, AdapterUnfit, "'a_later_field' is 1"),
        ({"bias": "all"}, AdapterUnfit, "bias is 'all'; only none is served"),
        ({"peft_type": "LOHA"}, AdapterUnfit, "peft_type is 'LOHA'; only LORA is read"),
        ({"target_modules": ["embed_tokens"]}, AdapterUnfit, "target_modules has 'embed_tokens'"),
        ({"target_modules": ".*_proj"}, PresetFileInvalid, "must be a list of names"),
        ({"target_modules": ["q_proj"]}, PresetFileInvalid, "others than those of the tensors"),
        ({"r": 0}, PresetFileInvalid, r"r must be in \[1, 1024\], it is 0"),
        ({"r": 3}, PresetFileInvalid, "has shape"),
        ({"r": None}, PresetFileInvalid, "r must be in"),
        ({"r": True}, PresetFileInvalid, "r must be in"),
        ({"lora_alpha": 0}, PresetFileInvalid, r"lora_alpha must be in \(0, 65536\], it is 0"),
        ({"lora_alpha": "4"}, PresetFileInvalid, "lora_alpha must be in"),
        ({"lora_alpha": 10**400}, PresetFileInvalid, "lora_alpha must be in"),
        ({"use_rslora": 1}, PresetFileInvalid, "use_rslora must be true or false"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_its_field(tmp_path, change, error, words):
    _, tensors, fields = peft_parts()
    path = peft_directory(tmp_path / "x", tensors, fields | change)
    with pytest.raises(error, match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def replaced(name, array):
    return lambda tensors: tensors.update({name: array})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop(Q_PROJ), PresetFileInvalid, "target_modules are others"),
        (lambda t: t.pop(Q_PROJ.replace("_A", "_B")), PresetFileInvalid, "B.weight is missing"),
        (replaced("extra", np.zeros(1, np.float32)), PresetFileInvalid, "'extra' does not belong"),
        (replaced(Q_PROJ, np.zeros((2, 5), np.float32)), PresetFileInvalid, "has shape"),
        (replaced(Q_PROJ, np.zeros((2, 32))), PresetFileInvalid, "has dtype 'F64'"),
        (
            replaced(Q_PROJ, np.full((2, 32), np.nan, np.float32)),
            AdapterUnfit,
            "Block 0, query: a weight is not a finite number",
        ),
        (lambda t: [t.pop(n) for n in list(t)[:-1]], PresetFileInvalid, "no tensor has a name"),
    ],
)
def test_other_tensors_are_refused_by_their_names(tmp_path, change, error, words):
    _, tensors, fields = peft_parts()
    change(tensors)
    with pytest.raises(error, match=words):
        read(peft_directory(tmp_path / "x", tensors, fields))


def test_a_directory_that_lacks_a_file_or_leads_elsewhere_is_refused(tmp_path):
    _, tensors, fields = peft_parts()
    path = peft_directory(tmp_path / "x", tensors, fields)
    weights = path / "adapter_model.safetensors"
    weights.rename(tmp_path / "moved")
    with pytest.raises(PresetFileMissing, match=r"adapter_model\.safetensors is missing"):
        read(path)
    weights.symlink_to(tmp_path / "moved")
    with pytest.raises(PresetFileInvalid, match="symbolic link"):
        read(path)


def test_the_digest_of_a_directory_changes_with_each_of_its_files(tmp_path):
    _, tensors, fields = peft_parts()
    path = peft_directory(tmp_path / "x", tensors, fields)
    first = read_content(path, CONFIG).digest
    (path / "adapter_config.json").write_text(json.dumps(fields | {"lora_alpha": 5}))
    assert read_content(path, CONFIG).digest != first


def keras_bytes(tmp_path):
    path = tmp_path / "tone.lora.h5"
    export_file(drawn_adapter(CONFIG, KERAS), path, "keras", CONFIG)
    return path.read_bytes()


def test_a_child_reads_keras_files_and_dies_with_a_typed_error(tmp_path):
    content = keras_bytes(tmp_path)
    found = read_elsewhere(content, "tone.lora.h5")
    assert (found.rank, len(found.pairs)) == (3, 2 * CONFIG.num_layers)
    draw = np.random.default_rng(0)
    for number in range(5):
        damaged = bytearray(content[: len(content) - 500 * number])
        for place in draw.integers(0, min(len(damaged), 4096), 40):
            damaged[place] ^= 1 << draw.integers(8)
        with pytest.raises(PresetError) as caught:
            read_elsewhere(bytes(damaged), "tone.lora.h5")
        assert "tone.lora.h5" in str(caught.value)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_safetensors_are_understood_or_refused(tmp_path_factory, data):
    adapter = drawn_adapter(CONFIG, PEFT)
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    export_file(adapter, path, "peft", CONFIG)
    content = bytearray(path.read_bytes())
    head = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, head - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path.write_bytes(bytes(content))
    try:
        found = read(path).form.layout
    except PresetError:
        found = "peft"
    assert found == "peft"


def test_a_file_that_declares_more_than_it_holds_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large.lora.h5"
    with h5py.File(path, "w") as file:
        file["lora/vars/rank"] = np.int64(4)
        for name in ("a", "b"):
            # A trillion zeros, of which none is stored.
            file.create_dataset(f"lora/2/vars/lora_kernel_{name}", (1 << 40,), np.float32)
    with pytest.raises(PresetFileInvalid, match="is not stored in full"):
        import_adapter(path, "keras", CONFIG)


def test_no_archive_is_taken_for_an_adapter(tmp_path):
    source = peft_directory(tmp_path / "x", *peft_parts()[1:])
    archive = shutil.make_archive(str(tmp_path / "tone"), "zip", source)
    for layout in ("keras", "peft"):
        with pytest.raises(PresetFileInvalid):
            import_adapter(tmp_path / archive, layout, CONFIG)


def test_the_child_loads_no_jax():
    code = "import sys, model.adapter_exchange.keras_child; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
