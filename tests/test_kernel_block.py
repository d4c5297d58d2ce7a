"""The native block against the block in JAX, and against itself in other company."""

import dataclasses
import json
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.adapter_shapes import pair_shapes
from model.config import GemmaConfig
from model.gemma.block import block, layer_traits
from model.gemma.cached_attention import PackedPrompts, SlotRows
from model.gemma.kv_cache import LayerCache
from model.gemma.low_rank import BankPair, BankTerm, TokenSlots
from model.gemma.slot_tokens import SlotTokens, slots_of_prompts
from model.gemma.weights import BlockWeights
from model.kernels.block import TARGET
from model.weight_names import block_weight_shapes
from tests.native_kernels import bits, distance, needs_native_kernels
from tests.test_mathematics import BASE

pytestmark = needs_native_kernels
NUM_SLOTS = 5
CONTEXT = 512
# Architectures that differ in what a block does.
CONFIGS = {
    "gemma3": BASE,
    "gemma1": dataclasses.replace(
        BASE,
        use_query_key_norm=False,
        use_post_attention_norm=False,
        use_post_ffw_norm=False,
        attention_soft_cap=None,
        sliding_window_tokens=None,
    ),
    # Widths of no whole number of lanes, and more outputs than one piece holds.
    "odd": dataclasses.replace(
        BASE,
        num_query_heads=6,
        num_key_value_heads=3,
        hidden_dim=75,
        feed_forward_dim=131,
        head_dim=22,
        sliding_window_tokens=300,
    ),
}


@partial(jax.jit, static_argnums=0)
def native(config, weights, traits, x, positions, tokens, adapters=None):
    return block(config, weights, traits, x, positions, rows=tokens, adapters=adapters)


@partial(jax.jit, static_argnums=0)
def portable(config, weights, traits, x, positions, rows):
    return block(config, weights, traits, x, positions, rows=rows)


def weights_of(config: GemmaConfig, dtype=jnp.float32) -> BlockWeights:
    draw = np.random.default_rng(1)
    shapes = block_weight_shapes(config)

    def array(field):
        if field not in shapes:
            return None
        size = shapes[field]
        drawn = jnp.asarray(draw.normal(size=size, scale=size[-1] ** -0.5), jnp.float32)
        return drawn.astype(dtype) if len(size) == 2 else drawn

    return BlockWeights._make(map(array, BlockWeights._fields))


def random_cache(config, seed=2):
    draw = np.random.default_rng(seed)
    shape = (NUM_SLOTS, config.num_key_value_heads, CONTEXT, config.head_dim)
    return LayerCache(*(jnp.asarray(draw.normal(size=shape), jnp.float32) for _ in range(2)))


def stream(config, num_tokens, seed=3):
    draw = np.random.default_rng(seed)
    return jnp.asarray(draw.normal(size=(num_tokens, 1, config.hidden_dim)), jnp.float32)


class Step:
    """Single tokens of several slots, on either path."""

    def __init__(self, config, slots, positions, *, layer=0, dtype=jnp.float32):
        self.config = config
        self.weights, self.traits = weights_of(config, dtype), layer_traits(config)[layer]
        self.cache = random_cache(config)
        self.slots = jnp.asarray(slots, jnp.int32)
        self.positions = jnp.asarray(positions, jnp.int32)
        self.x = stream(config, len(slots))

    def native(self, rows=slice(None), num_real=None):
        slots = self.slots[rows]
        count = jnp.int32(len(slots) if num_real is None else num_real)
        tokens = SlotTokens(self.cache, slots, count)
        at = self.positions[rows][:, None]
        return native(self.config, self.weights, self.traits, self.x[rows], at, tokens)

    def portable(self):
        rows = SlotRows(self.cache, self.slots)
        at = self.positions[:, None]
        return portable(self.config, self.weights, self.traits, self.x, at, rows)


@pytest.mark.parametrize("layer", [0, 1], ids=["local", "global"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_what_the_block_in_jax_makes(name, layer):
    step = Step(CONFIGS[name], [3, 0, 4, 1], [0, 7, 511, 300], layer=layer)
    x, cache = step.native()
    expected, expected_cache = step.portable()
    assert distance(x, expected) < 2e-6
    for own, other in zip(cache, expected_cache, strict=True):
        assert distance(own, other) < 1e-6


def test_bfloat16_matrices_are_widened():
    step = Step(BASE, [3, 0], [9, 7], dtype=jnp.bfloat16)
    x, cache = step.native()
    wide = jax.tree.map(lambda weight: weight.astype(jnp.float32), step.weights)
    step.weights = wide
    again, again_cache = step.native()
    assert bits(x) == bits(again)
    assert bits(cache.keys) == bits(again_cache.keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_instruction_set_gives_the_bits_of_plain_code(instruction_sets, name):
    step = Step(CONFIGS[name], [3, 0, 4, 1, 2], [0, 7, 511, 300, 46])
    instruction_sets.use("plain")
    expected, expected_cache = step.native()
    for fast in instruction_sets.fast:
        instruction_sets.use(fast)
        x, cache = step.native()
        assert bits(x) == bits(expected)
        assert bits(cache.keys) == bits(expected_cache.keys)
        assert bits(cache.values) == bits(expected_cache.values)


def test_a_row_has_the_same_bits_alone_and_in_any_company():
    step = Step(CONFIGS["odd"], [3, 0, 4, 1, 2], [0, 7, 511, 300, 46])
    together, _ = step.native()
    for order in ([0], [4, 1], [2, 0, 1], [3, 4, 2, 1], [4, 3, 2, 1, 0]):
        x, _ = step.native(jnp.asarray(order))
        assert bits(x) == bits(together[jnp.asarray(order)])


def test_rows_of_no_slot_and_rows_beyond_the_real_ones_leave_no_trace():
    step = Step(BASE, [3, NUM_SLOTS, 0, 2], [5, 6, 7, 8])
    x, cache = step.native(num_real=3)
    alone, alone_cache = step.native(jnp.asarray([0, 2]))
    assert bits(x[jnp.asarray([0, 2])]) == bits(alone)
    assert bits(cache.keys) == bits(alone_cache.keys)
    assert bits(cache.values) == bits(alone_cache.values)
    assert not np.asarray(x[3]).any()


# --- adapters ----------------------------------------------------------------------------------

MAX_RANK = 6


class Bank:
    """Two adapters, of rank 6 and 3, of which the second lacks the gate; what is beyond is NaN."""

    def __init__(self, config):
        draw = np.random.default_rng(4)
        self.ranks = {target: [6, 3] for target in pair_shapes(config)} | {"ffw_gating": [6, 0]}
        self.pairs = {}
        for target, (heads, in_width, out) in pair_shapes(config).items():
            a = draw.normal(size=(2, heads, MAX_RANK, in_width)) * in_width**-0.5
            b = draw.normal(size=(2, heads, MAX_RANK, out)) * 0.3
            for pair, rank in enumerate(self.ranks[target]):
                a[pair, :, rank:], b[pair, :, rank:] = np.nan, np.nan
            self.pairs[target] = BankPair(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))

    def terms(self, slots):
        used = TokenSlots(jnp.asarray(slots, jnp.int32))
        return {
            target: BankTerm(pair, jnp.asarray(self.ranks[target], jnp.int32), used)
            for target, pair in self.pairs.items()
        }

    def merged(self, weights, slot):
        """The weights that do by themselves what they do with an adapter."""

        def with_pair(target):
            kernel, rank = getattr(weights, target), self.ranks[target][slot - 1]
            a, b = (np.asarray(each[slot - 1, :, :rank]) for each in self.pairs[target])
            return kernel + np.concatenate([b[h].T @ a[h] for h in range(len(a))])

        return weights._replace(**{target: with_pair(target) for target in self.pairs})


class AdaptedStep(Step):
    """Rows of two adapters and of the base."""

    def __init__(self, config, slots, positions, adapters):
        super().__init__(config, slots, positions)
        self.bank, self.adapters = Bank(config), np.array(adapters)

    def native(self, rows=slice(None), adapters=None):
        slots = self.slots[rows]
        tokens = SlotTokens(self.cache, slots, jnp.int32(len(slots)))
        terms = self.bank.terms(self.adapters[rows] if adapters is None else adapters)
        at = self.positions[rows][:, None]
        return native(self.config, self.weights, self.traits, self.x[rows], at, tokens, terms)


def adapted_step(name="odd"):
    return AdaptedStep(CONFIGS[name], [3, 0, 4, 1, 2], [0, 7, 511, 300, 46], [2, 0, 1, 2, 9])


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_does_what_merged_weights_do(name):
    step = adapted_step(name)
    x, cache = step.native()
    for row, adapter in [(0, 2), (1, 0), (2, 1), (3, 2), (4, 0)]:
        alone = Step(step.config, step.slots[row : row + 1], step.positions[row : row + 1])
        alone.x = step.x[row : row + 1]
        if adapter:
            alone.weights = step.bank.merged(step.weights, adapter)
        expected, expected_cache = alone.portable()
        assert distance(x[row : row + 1], expected) < 5e-6
        slot = int(step.slots[row])
        assert distance(cache.keys[slot], expected_cache.keys[slot]) < 5e-6


def test_rows_of_adapters_and_of_the_base_have_the_bits_that_they_have_alone(instruction_sets):
    step = adapted_step()
    for name in instruction_sets.fast:
        instruction_sets.use(name)
        together, _ = step.native()
        for row in range(5):
            alone, _ = step.native(slice(row, row + 1))
            assert bits(alone) == bits(together[row : row + 1])
    base = Step(step.config, step.slots, step.positions)
    assert bits(base.native()[0][1]) == bits(together[1])
    # A slot that the bank lacks is the base's.
    assert bits(base.native()[0][4]) == bits(together[4])


def test_every_instruction_set_gives_the_bits_of_plain_code_with_adapters(instruction_sets):
    step = adapted_step()
    instruction_sets.use("plain")
    expected, expected_cache = step.native()
    for name in instruction_sets.fast:
        instruction_sets.use(name)
        x, cache = step.native()
        assert bits(x) == bits(expected)
        assert bits(cache.keys) == bits(expected_cache.keys)


def test_what_is_not_finite_in_an_adapter_stays_with_its_rows():
    step = adapted_step()
    clean, _ = step.native()
    a, b = step.bank.pairs["ffw_linear"]
    step.bank.pairs["ffw_linear"] = BankPair(a.at[0].set(jnp.nan), b)
    x, _ = step.native()
    assert np.isnan(x[2]).all()
    others = jnp.asarray([0, 1, 3, 4])
    assert bits(x[others]) == bits(clean[others])


# --- prompts -----------------------------------------------------------------------------------


class Prompts:
    """Prompts one behind the other in a chunk; (slot, start, number of tokens) each."""

    def __init__(self, config, prompts, *, width=64, layer=0):
        self.config = config
        self.weights, self.traits = weights_of(config), layer_traits(config)[layer]
        self.cache = random_cache(config)
        slots, starts, lengths = zip(*prompts, strict=True)
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        missing = 8 - len(prompts)
        arrays = (slots, offsets, lengths, starts)
        self.places = [jnp.asarray([*each, *[0] * missing], jnp.int32) for each in arrays]
        self.count = jnp.int32(len(prompts))
        positions = np.zeros(width, np.int32)
        for (_, start, length), offset in zip(prompts, offsets, strict=True):
            positions[offset : offset + length] = start + np.arange(length)
        self.positions = jnp.asarray(positions)[None]
        self.num_tokens = int(sum(lengths))
        self.x = stream(config, width).swapaxes(0, 1)

    def native(self):
        slots, offsets, lengths, _ = self.places
        width = self.x.shape[1]
        tokens = SlotTokens(
            self.cache, *slots_of_prompts(slots, offsets, lengths, self.count, width)
        )
        x, cache = native(self.config, self.weights, self.traits, self.x, self.positions, tokens)
        return x[:, : self.num_tokens], cache

    def portable(self):
        rows = PackedPrompts(self.cache, *self.places, self.count)
        x, cache = portable(self.config, self.weights, self.traits, self.x, self.positions, rows)
        return x[:, : self.num_tokens], cache


PACKED = {
    "one": [(2, 0, 64)],
    "one inside": [(2, 100, 37)],
    "several": [(2, 0, 9), (0, 40, 1), (3, 256, 30), (1, 7, 2)],
    # Two that follow the same context, and one of another slot between two of its own.
    "one slot": [(2, 30, 9), (2, 39, 4), (2, 39, 6), (2, 39, 1), (0, 0, 3), (2, 39, 2)],
}


@pytest.mark.parametrize("layer", [0, 1], ids=["local", "global"])
@pytest.mark.parametrize("name", PACKED)
def test_prompts_are_what_the_block_in_jax_makes_of_them(name, layer):
    prompts = Prompts(CONFIGS["odd"], PACKED[name], layer=layer)
    x, cache = prompts.native()
    expected, expected_cache = prompts.portable()
    assert distance(x, expected) < 2e-6
    for own, other in zip(cache, expected_cache, strict=True):
        assert distance(own, other) < 1e-6


def test_a_prompt_has_the_bits_of_its_tokens_one_by_one():
    config = CONFIGS["odd"]
    prompts = Prompts(config, [(2, 250, 7), (1, 3, 5)])
    x, cache = prompts.native()
    slots = [2] * 7 + [1] * 5
    step = Step(config, slots, [*range(250, 257), *range(3, 8)])
    step.x = prompts.x[0, :12][:, None]
    for token in range(12):
        alone, step.cache = step.native(jnp.asarray([token]))
        assert bits(alone[0, 0]) == bits(x[0, token])
    assert bits(step.cache.keys) == bits(cache.keys)
    assert bits(step.cache.values) == bits(cache.values)


def test_the_slot_of_each_token_by_hand():
    slots, count = slots_of_prompts(
        jnp.array([7, 4, 9, 0]), jnp.array([0, 2, 3, 0]), jnp.array([2, 1, 2, 0]), jnp.int32(3), 8
    )
    assert slots[:5].tolist() == [7, 7, 4, 9, 9]
    assert int(count) == 5


# --- a program, and what is refused ---------------------------------------------------------------


def test_a_program_writes_the_cache_where_it_stands():
    step = Step(BASE, [3, 0], [9, 7])

    def advance(cache, x):
        tokens = SlotTokens(cache, step.slots, jnp.int32(2))
        at = step.positions[:, None]
        return block(BASE, step.weights, step.traits, x, at, rows=tokens)

    compiled = jax.jit(advance, donate_argnums=0).lower(step.cache, step.x).compile()
    text = compiled.as_text()
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    shape = ",".join(map(str, step.cache.keys.shape))
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", text)
    assert text.count(f"f32[{shape}]") > 4
    assert " dot(" not in text


REFUSALS = {
    "{'query': f(24, 16)}": "3 query heads cannot share 2 key heads; "
    "the kernel takes at most 32 to each.",
    "{'query': f(32, 15)}": "A block for 15 numbers got a stream of 16.",
    "{'ffw_linear': f(16, 32).astype('float16')}": "The matrices of a block must be float32 or "
    "bfloat16.",
}
REFUSED = f"""
import json, jax, jax.numpy as jnp
from tests.test_kernel_block import BASE, Step, native
def f(*shape): return jnp.ones(shape)
said = []
for others in {list(REFUSALS)}:
    step = Step(BASE, [0], [0])
    step.weights = step.weights._replace(**eval(others))
    try:
        step.native()
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_shapes_and_dtypes_that_do_not_fit_are_named_while_tracing():
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(REFUSALS.values())


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("pre_attention_norm", (17,)),
        ("post_ffw_norm", (15,)),
        ("key_norm", (4,)),
        ("key", (8, 16)),
        ("attention_output", (16, 16)),
        ("ffw_gating_2", (31, 16)),
        ("ffw_linear", (16, 33)),
    ],
)
def test_a_weight_of_another_shape_is_an_error_and_no_wrong_answer(field, shape):
    step = Step(BASE, [0], [0])
    step.weights = step.weights._replace(**{field: jnp.ones(shape)})
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"gemma_block: weight \d+ is a"):
        jax.block_until_ready(step.native())
