"""The table of published presets, against the counts that were published with them."""

import re

import pytest

from model.config import Family
from model.errors import PresetNotFound
from model.presets.table import BUILTIN_PRESETS, builtin, memory_bytes
from model.weight_names import num_parameters

# Name, last part of the handle, parameters: from the presets' pages, not from the table.
PUBLISHED = """
gemma_2b_en                   gemma/keras/gemma_2b_en/3                            2506172416
gemma_instruct_2b_en          gemma/keras/gemma_instruct_2b_en/3                   2506172416
gemma_1.1_instruct_2b_en      gemma/keras/gemma_1.1_instruct_2b_en/4               2506172416
code_gemma_1.1_2b_en          codegemma/keras/code_gemma_1.1_2b_en/2               2506172416
code_gemma_2b_en              codegemma/keras/code_gemma_2b_en/2                   2506172416
gemma_7b_en                   gemma/keras/gemma_7b_en/4                            8537680896
gemma_instruct_7b_en          gemma/keras/gemma_instruct_7b_en/4                   8537680896
gemma_1.1_instruct_7b_en      gemma/keras/gemma_1.1_instruct_7b_en/5               8537680896
code_gemma_7b_en              codegemma/keras/code_gemma_7b_en/3                   8537680896
code_gemma_instruct_7b_en     codegemma/keras/code_gemma_instruct_7b_en/3          8537680896
code_gemma_1.1_instruct_7b_en codegemma/keras/code_gemma_1.1_instruct_7b_en/3      8537680896
gemma2_2b_en                  gemma2/keras/gemma2_2b_en/2                          2614341888
gemma2_instruct_2b_en         gemma2/keras/gemma2_instruct_2b_en/2                 2614341888
gemma2_9b_en                  gemma2/keras/gemma2_9b_en/4                          9241705984
gemma2_instruct_9b_en         gemma2/keras/gemma2_instruct_9b_en/4                 9241705984
gemma2_27b_en                 gemma2/keras/gemma2_27b_en/3                         27227128320
gemma2_instruct_27b_en        gemma2/keras/gemma2_instruct_27b_en/3                27227128320
shieldgemma_2b_en             shieldgemma/keras/shieldgemma_2b_en/2                2614341888
shieldgemma_9b_en             shieldgemma/keras/shieldgemma_9b_en/2                9241705984
shieldgemma_27b_en            shieldgemma/keras/shieldgemma_27b_en/2               27227128320
vault_gemma_1b_en             vaultgemma/keras/vault_gemma_1b_en/2                 1038741120
c2s_scale_gemma_2_2b_en       cell2sentence/keras/c2s_scale_gemma_2_2b_en/1        2614341888
c2s_scale_gemma_2_27b_en      cell2sentence/keras/c2s_scale_gemma_2_27b_en/1       27227128320
gemma3_270m                   gemma3/keras/gemma3_270m/3                           268098176
gemma3_instruct_270m          gemma3/keras/gemma3_instruct_270m/4                  268098176
gemma3_1b                     gemma3/keras/gemma3_1b/3                             999885952
gemma3_instruct_1b            gemma3/keras/gemma3_instruct_1b/3                    999885952
gemma3_4b_text                gemma3/keras/gemma3_4b_text/2                        3880099328
gemma3_instruct_4b_text       gemma3/keras/gemma3_instruct_4b_text/3               3880099328
gemma3_12b_text               gemma3/keras/gemma3_12b_text/3                       11765788416
gemma3_instruct_12b_text      gemma3/keras/gemma3_instruct_12b_text/3              11765788416
gemma3_27b_text               gemma3/keras/gemma3_27b_text/4                       27009002240
gemma3_instruct_27b_text      gemma3/keras/gemma3_instruct_27b_text/3              27009002240
"""
ROWS = [line.split() for line in PUBLISHED.strip().splitlines()]


def test_the_table_has_every_published_name_and_no_other():
    assert len(ROWS) == 23 + 10
    assert set(BUILTIN_PRESETS) == {name for name, _, _ in ROWS}


@pytest.mark.parametrize(("name", "address", "count"), ROWS)
def test_the_shapes_add_up_to_the_published_count(name, address, count):
    preset = builtin(name)
    assert preset.name == name
    assert num_parameters(preset.config) == preset.num_parameters == int(count)
    owner = "google" if name.startswith("shieldgemma") else "keras"
    assert preset.handle == f"kaggle://{owner}/{address}"
    assert preset.is_instruct == ("instruct" in name)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("code_gemma_2b_en", Family.GEMMA),
        ("vault_gemma_1b_en", Family.GEMMA),
        ("c2s_scale_gemma_2_2b_en", Family.GEMMA2),
        ("shieldgemma_9b_en", Family.GEMMA2),
        ("gemma3_270m", Family.GEMMA3),
    ],
)
def test_the_family_is_that_of_the_architecture(name, family):
    assert builtin(name).family is family


def test_what_no_count_can_show_is_as_published():
    gemma2 = builtin("gemma2_27b_en").config
    assert (gemma2.sliding_window_tokens, gemma2.global_layer_period) == (4_096, 2)
    assert (gemma2.attention_soft_cap, gemma2.final_soft_cap) == (50.0, 30.0)
    small, large = builtin("gemma3_1b").config, builtin("gemma3_4b_text").config
    assert (small.sliding_window_tokens, small.global_rope_scale) == (512, 1.0)
    assert (large.sliding_window_tokens, large.global_rope_scale) == (1_024, 8.0)
    assert (small.context_tokens, large.context_tokens) == (32_768, 131_072)
    assert builtin("vault_gemma_1b_en").config.context_tokens == 1_024
    assert not any(map(builtin("vault_gemma_1b_en").config.is_local, range(26)))


@pytest.mark.parametrize(("dtype", "item_bytes"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_memory_is_that_of_the_weights(dtype, item_bytes):
    preset = builtin("gemma3_270m")
    assert memory_bytes(preset.config, dtype) == item_bytes * 268_098_176


@pytest.mark.parametrize("name", ["gemma3_9t", "", "nothing\nlike it"])
def test_an_unknown_name_lists_similar_ones_in_one_line(name):
    with pytest.raises(PresetNotFound) as caught:
        builtin(name)
    assert "gemma3_1b" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_handles_differ_and_end_in_a_version():
    handles = [preset.handle for preset in BUILTIN_PRESETS.values()]
    assert len(set(handles)) == len(handles)
    assert all(re.fullmatch(r"kaggle://[\w.-]+/\w+/keras/[\w.]+/\d+", handle) for handle in handles)
