"""Keras layers that hold the weights, under Keras' names and in run-time shapes.

A layer's call applies the function of `model.gemma` that the engine calls too, to the arrays that
its variables hold; so a Keras user has layers to train, freeze and inspect, and there is one
mathematics. Dtypes follow Keras: under a mixed policy variables are float32 and layers compute with
copies in half precision, but for the tied table, which a model's own call multiplies in float32
(spec 1.8).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax.numpy as jnp
import keras
from jaxtyping import Array, Float, Int

from model.config import GemmaConfig
from model.gemma.attention import soft_cap
from model.gemma.block import block, traits_of_layer
from model.gemma.forward import scale_embeddings
from model.gemma.keras_lora import LoraShapes, merged_kernel
from model.gemma.norms import rms_norm
from model.gemma.projection import projection
from model.gemma.weights import BlockWeights
from model.weight_names import WeightSpec

Constructor = TypeVar("Constructor", bound=Callable[..., None])
MakeInitializer = Callable[[str], Any]


def no_type_check(constructor: Constructor) -> Constructor:
    """Leaves a Keras constructor as it is: jaxtyping's import hook goes by this decorator's name.

    Keras inspects a constructor's first argument, which the wrapper of the hook would hide.
    `typing.no_type_check` would do, but takes the signature away from mypy as well.
    """
    return constructor


@contextlib.contextmanager
def _scopes_around(weight_name: str) -> Iterator[None]:
    """The scopes above the layer of a weight: Keras makes the path of a variable of open scopes."""
    with contextlib.ExitStack() as scopes:
        for scope in weight_name.split("/")[:-2]:
            scopes.enter_context(keras.name_scope(scope))
        yield


class Weight(keras.layers.Layer):
    """One variable under a layer name of its own, as Keras' Dense and RMSNormalization have it.

    A kernel may get LoRA: two more variables, float32 whatever the policy, whose product is added.
    """

    @no_type_check
    def __init__(self, spec: WeightSpec, initializer: Any, *, dtype: Any, **options: Any) -> None:
        layer_name, _, variable = spec.name.rpartition("/")
        super().__init__(name=layer_name.rpartition("/")[2], dtype=dtype, **options)
        self.weight_name = spec.name
        self.variable = self.add_weight(shape=spec.shape, initializer=initializer, name=variable)
        self.lora_target: str | None = None
        self.built = True

    @property
    def value(self) -> Array:
        """The array that acts, in the compute dtype."""
        return self.merged.astype(self.compute_dtype)

    @property
    def merged(self) -> Array:
        """The variable's array, and what LoRA adds to it."""
        value: Array = self.variable.value
        if self.lora_target is None:
            return value
        a, b = self.lora_kernel_a.value, self.lora_kernel_b.value
        return merged_kernel(self.lora_target, value, a, b)

    def enable_lora(self, target: str, shapes: LoraShapes) -> None:
        """Freezes the kernel and adds A (He uniform) and B (zeros), both trainable."""
        self._tracker.unlock()
        with _scopes_around(self.weight_name):
            self.lora_kernel_a = self.add_weight(
                shape=shapes.a, initializer="he_uniform", dtype="float32", name="lora_kernel_a"
            )
            self.lora_kernel_b = self.add_weight(
                shape=shapes.b, initializer="zeros", dtype="float32", name="lora_kernel_b"
            )
        self._tracker.lock()
        self.trainable = True
        self.variable.trainable = False
        self.lora_target = target

    def save_own_variables(self, store: Any) -> None:
        """Stores the kernel with its LoRA merged in, as Keras does (spec 1.11)."""
        store["0"] = self.merged

    def load_own_variables(self, store: Any) -> None:
        """Assigns the kernel; an enabled LoRA begins anew, as nothing."""
        self.variable.assign(store["0"])
        if self.lora_target is not None:
            self.lora_kernel_b.assign(jnp.zeros_like(self.lora_kernel_b.value))


class TokenEmbedding(Weight):
    """Rows of the table for ids, unscaled; or, in reverse, logits for hidden states."""

    @no_type_check
    def __init__(
        self, spec: WeightSpec, initializer: Any, *, final_soft_cap: float | None, dtype: Any
    ) -> None:
        super().__init__(spec, initializer, dtype=dtype, autocast=False)
        self.final_soft_cap = final_soft_cap

    def call(self, inputs: Array, reverse: bool = False) -> Array:
        if not reverse:
            return self.variable.value[inputs].astype(self.compute_dtype)
        table = self.variable.value
        return soft_cap(projection(inputs.astype(table.dtype), table), self.final_soft_cap)


class ScaleEmbeddings(keras.Operation):
    """Times sqrt(D): a step of the graph without weights, and so without a layer."""

    def call(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        return scale_embeddings(x)

    def compute_output_spec(self, x: Any) -> Any:
        return keras.KerasTensor(x.shape, x.dtype)


class DecoderBlock(keras.layers.Layer):
    """One block: the residual stream and the padding mask in, the residual stream out.

    Args:
        config: Of the model.
        layer: Which block.
        specs: Field of `BlockWeights` -> its weight.
        initializer: Name of a weight -> what gives its first value.
        dtype: Keras dtype policy.
    """

    @no_type_check
    def __init__(
        self,
        config: GemmaConfig,
        layer: int,
        specs: dict[str, WeightSpec],
        initializer: MakeInitializer,
        *,
        dtype: Any,
    ) -> None:
        super().__init__(name=f"decoder_block_{layer}", dtype=dtype)
        self.config = config
        self.layer = layer
        for field, spec in specs.items():
            with _scopes_around(spec.name):
                setattr(self, field, Weight(spec, initializer(spec.name), dtype=dtype))
        self.fields = tuple(specs)
        self.built = True

    @property
    def block_weights(self) -> BlockWeights:
        """The arrays that act now; tracers inside a Keras training step."""
        return BlockWeights._make(
            getattr(self, field).value if field in self.fields else None
            for field in BlockWeights._fields
        )

    def call(
        self, x: Float[Array, "batch seq width"], padding_mask: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq width"]:
        batch, seq = padding_mask.shape
        positions = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32), (batch, seq))
        traits = traits_of_layer(self.config, self.layer)
        mask = padding_mask.astype(bool)
        y, _ = block(self.config, self.block_weights, traits, x, positions, padding_mask=mask)
        return y

    def compute_output_spec(self, x: Any, padding_mask: Any) -> Any:
        return keras.KerasTensor(x.shape, self.compute_dtype)


class FinalNorm(Weight):
    """RMS normalisation before the head."""

    @no_type_check
    def __init__(self, spec: WeightSpec, initializer: Any, *, epsilon: float, dtype: Any) -> None:
        super().__init__(spec, initializer, dtype=dtype)
        self.epsilon = epsilon

    def call(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        return rms_norm(x, self.value, epsilon=self.epsilon)
