"""The canonical adapter file: one file for an adapter, and nothing else is read."""

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from model.adapter_file import form_shapes, read_adapter, write_adapter
from model.errors import AdapterUnfit, PresetError, PresetFileInvalid
from model.gemma.keras_lora import TARGETS
from model.lora_adapter import LoraAdapter, LoraForm
from tests import goldens

CONFIG = goldens.backbone("gemma3_tiny").config
FORMS = [
    LoraForm("keras", 3, 3.0, ("query", "value")),
    LoraForm("peft", 2, 5.0, tuple(sorted(TARGETS))),
]


def drawn(form, seed=0):
    draw = np.random.default_rng(seed)
    shapes = form_shapes(CONFIG, form)
    return LoraAdapter(
        form,
        {
            place: tuple(draw.normal(size=shape).astype(np.float32) for shape in pair)
            for place, pair in shapes.items()
        },
    )


CONTENT = write_adapter(drawn(FORMS[0]))
HEAD_BYTES = 8 + int.from_bytes(CONTENT[:8], "little")


def with_head(change):
    """The file with another header, padded to the length of the old one."""
    document = json.loads(CONTENT[8:HEAD_BYTES])
    change(document)
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + CONTENT[HEAD_BYTES:]


def with_form(**fields):
    def change(document):
        form = json.loads(document["__metadata__"]["gemma_adapter"]) | fields
        document["__metadata__"]["gemma_adapter"] = json.dumps(form)

    return with_head(change)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_is_what_was_written_to_the_last_bit(form):
    adapter = drawn(form)
    content = write_adapter(adapter)
    again = read_adapter(content, CONFIG)
    assert again.form == adapter.form
    assert again.pairs.keys() == adapter.pairs.keys()
    for place, pair in adapter.pairs.items():
        for array, found in zip(pair, again.pairs[place], strict=True):
            np.testing.assert_array_equal(found, array)
    assert write_adapter(again) == content


def test_equal_adapters_are_equal_bytes_in_whatever_order_they_come():
    adapter = drawn(FORMS[0])
    turned = LoraAdapter(
        LoraForm("keras", 3, 3.0, ("value", "query")),
        {
            place: tuple(np.asfortranarray(array) for array in adapter.pairs[place])
            for place in reversed(adapter.pairs)
        },
    )
    assert write_adapter(turned) == CONTENT
    assert write_adapter(drawn(FORMS[0], seed=1)) != CONTENT


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not safetensors"),
        (CONTENT[:-1], "truncated or has been extended"),
        (CONTENT + b"\0", "truncated or has been extended"),
        ((1 << 40).to_bytes(8, "little") + CONTENT[8:], "a header at most"),
        (with_head(lambda h: h["__metadata__"].clear()), "does not say what it is made of"),
        (with_head(lambda h: h.update(__metadata__=[])), "texts by name"),
        (with_head(lambda h: h["__metadata__"].update(format=["pt"])), "texts by name"),
        (with_head(lambda h: h["__metadata__"].update(gemma_adapter="\ud800")), "not plain JSON"),
        (with_head(lambda h: h["__metadata__"].update(more="text")), "not written as this service"),
        (with_head(lambda h: h.pop("1.query.b")), "tensor 1.query.b is missing"),
        (with_head(lambda h: h.update({"x.y": h["1.query.b"]})), "'x.y' does not belong"),
        (with_form(rank=4, alpha=4.0), r"tensor 0.query.a has shape \[4, \d+, 3\]"),
        (with_form(targets=["query"]), "does not belong"),
        (with_form(targets=["value", "query"]), "none that an adapter has"),
        (with_form(targets=[]), "none that an adapter has"),
        (with_form(targets=[["query"]]), "none that an adapter has"),
        (with_form(targets=["query", "query", "value"]), "none that an adapter has"),
        (with_form(layout="other"), "none that an adapter has"),
        (with_form(rank=0), "none that an adapter has"),
        (with_form(rank=True), "none that an adapter has"),
        (with_form(rank=1025, alpha=1025.0), "none that an adapter has"),
        (with_form(alpha=4.0), "none that an adapter has"),
        (with_form(layout="peft", alpha=0.0), "none that an adapter has"),
        (with_form(layout="peft", alpha=-1.0), "none that an adapter has"),
        (with_form(more=1), "not written as this service"),
    ],
)
def test_another_file_is_refused_by_the_name_of_what_is_wrong(content, words):
    with pytest.raises(PresetFileInvalid, match=words) as caught:
        read_adapter(content, CONFIG)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_later_version_of_the_format_is_refused_with_both_numbers():
    with pytest.raises(AdapterUnfit, match="version 2 of its format; this service reads 1"):
        read_adapter(with_form(version=2), CONFIG)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused_by_its_place(bad):
    adapter = drawn(FORMS[0])
    adapter.pairs[1, "value"][1][0, 0] = bad
    with pytest.raises(AdapterUnfit, match="Block 1, value: a weight is not a finite number"):
        read_adapter(write_adapter(adapter), CONFIG)


def test_a_file_of_another_model_is_refused():
    other = goldens.backbone("gemma1_tiny").config
    with pytest.raises(PresetFileInvalid):
        read_adapter(CONTENT, other)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_file_is_read_as_what_it_says_or_refused(data):
    content = bytearray(CONTENT)
    for _ in range(data.draw(st.integers(1, 4))):
        # The header is where a parser can stumble.
        most = HEAD_BYTES if data.draw(st.booleans()) else len(content)
        content[data.draw(st.integers(0, most - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(content[: data.draw(st.integers(0, len(content)))])
    if data.draw(st.booleans()):
        damaged = bytes(content)
    try:
        again = write_adapter(read_adapter(damaged, CONFIG))
    except PresetError:
        again = damaged
    assert again == damaged
