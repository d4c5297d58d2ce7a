"""The Keras model that owns the weights.

Layers here hold variables, in run-time shapes and under Keras' names; the mathematics is in
`model.gemma.forward`, which takes the arrays that `GemmaBackbone.gemma_weights` collects. So a
Keras user has a `keras.Model` to summarise, train and save, and the engine has plain arrays.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import keras
from jaxtyping import Array, Bool, Float, Int

from model.config import GemmaConfig
from model.gemma import weights as names
from model.gemma.forward import forward
from model.gemma.keras_lora import DEFAULT_TARGETS, LoraShapes, lora_shapes, merged_kernel
from model.gemma.weights import GemmaWeights

Constructor = TypeVar("Constructor", bound=Callable[..., None])


def no_type_check(constructor: Constructor) -> Constructor:
    """Leaves a Keras constructor as it is: jaxtyping's import hook goes by this decorator's name.

    Keras inspects a constructor's first argument, which the wrapper of the hook would hide.
    `typing.no_type_check` would do, but takes the signature away from mypy as well.
    """
    return constructor


class Weight(keras.layers.Layer):
    """One variable under a layer name of its own, as Keras' Dense and RMSNormalization have it.

    A kernel may get LoRA: two more variables, float32 whatever the policy, whose product is added.
    """

    @no_type_check
    def __init__(
        self, shape: tuple[int, ...], initializer: Any, *, variable: str, name: str, dtype: Any
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.variable = self.add_weight(shape=shape, initializer=initializer, name=variable)
        self.lora_target: str | None = None
        self.built = True

    @property
    def value(self) -> Array:
        """The array that acts: the variable's, and what LoRA adds to it."""
        value: Array = self.variable.value
        if self.lora_target is None:
            return value
        a, b = self.lora_kernel_a.value, self.lora_kernel_b.value
        return merged_kernel(self.lora_target, value, a, b)

    def enable_lora(self, target: str, shapes: LoraShapes) -> None:
        """Freezes the kernel and adds A (He uniform) and B (zeros), both trainable."""
        self._tracker.unlock()
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


class GemmaBackbone(keras.Model):
    """Token ids in, hidden states after the final norm out.

    Takes ``{"token_ids": int [B, L], "padding_mask": bool or int [B, L]}`` and returns [B, L, D] in
    the compute dtype.

    Args:
        config: Architecture.
        arrays: Name -> array for every weight, in run-time shape. Without it the weights are
            random, as a fresh keras-hub model has them (spec 1.1), but with a seed of its own for
            each.
        dtype: Keras dtype policy.
        seed: Of random weights.
    """

    @no_type_check
    def __init__(
        self,
        config: GemmaConfig,
        arrays: Mapping[str, Array] | None = None,
        *,
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(name="gemma_backbone", dtype=dtype)
        self.config = config
        self._holders: list[tuple[str, Weight]] = []
        for index, spec in enumerate(names.weight_specs(config)):
            layer_name, _, variable = spec.name.rpartition("/")
            initializer = (
                _random_initializer(spec, seed + index)
                if arrays is None
                else _given(arrays[spec.name])
            )
            holder = Weight(
                spec.shape,
                initializer,
                variable=variable,
                name=layer_name.replace("/", "__"),
                dtype=self.dtype_policy,
            )
            self._holders.append((spec.name, holder))
        # Keras finds layers in a list of them, not in pairs.
        self.holders = [holder for _, holder in self._holders]
        self.built = True

    @property
    def gemma_weights(self) -> GemmaWeights:
        """The arrays that the variables hold now; tracers inside a Keras training step."""
        return names.assemble(self.config, {name: holder.value for name, holder in self._holders})

    def enable_lora(self, rank: int, target_layer_names: Sequence[str] | None = None) -> None:
        """Trains low-rank additions to some projections of every block, and nothing else.

        Args:
            rank: R of every addition; alpha equals it, so the product is added as it is.
            target_layer_names: Of `keras_lora.TARGETS`; query and value if left out.

        Raises:
            ValueError: An unknown target, a rank below 1, or LoRA is enabled already.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}.")
        targets = DEFAULT_TARGETS if target_layer_names is None else tuple(target_layer_names)
        shapes = {target: lora_shapes(self.config, target, rank) for target in targets}
        if self.lora_layers:
            raise ValueError("LoRA is already enabled; load the base weights anew to change it.")
        names_of_kernels = {
            names.block_weight_name(layer, target): target
            for layer in range(self.config.num_layers)
            for target in targets
        }
        for name, holder in self._holders:
            holder.trainable = False
            if target := names_of_kernels.get(name):
                holder.enable_lora(target, shapes[target])

    @property
    def lora_layers(self) -> dict[str, Weight]:
        """Name of a kernel -> its layer, for the kernels that have LoRA."""
        return {name: holder for name, holder in self._holders if holder.lora_target is not None}

    def call(
        self, inputs: Mapping[str, Array], training: bool = False
    ) -> Float[Array, "batch seq width"]:
        """Hidden states after the final norm."""
        token_ids: Int[Array, "batch seq"] = jnp.asarray(inputs["token_ids"], jnp.int32)
        padding_mask: Bool[Array, "batch seq"] = jnp.asarray(inputs["padding_mask"]).astype(bool)
        return forward(self.config, self.gemma_weights, token_ids, padding_mask).hidden


def _given(array: Array) -> Any:
    """An initializer that yields ``array`` without a second copy of it."""

    def initialize(shape: tuple[int, ...], dtype: Any = None) -> Array:
        assert tuple(array.shape) == tuple(shape), f"{array.shape} is not {shape}"
        return jnp.asarray(array, dtype)

    return initialize


def _random_initializer(spec: names.WeightSpec, seed: int) -> Any:
    if len(spec.shape) == 1:
        return "zeros"
    if spec.name == names.EMBEDDINGS:
        return keras.initializers.RandomNormal(stddev=spec.shape[0] ** -0.5, seed=seed)
    fan_out, fan_in = spec.shape
    limit = (6.0 / (fan_in + fan_out)) ** 0.5
    return keras.initializers.RandomUniform(-limit, limit, seed=seed)
