"""The Keras model that owns the weights.

A functional Keras model over the layers of `model.gemma.layers`, so a Keras user has something to
summarise, train, cut and save. The mathematics is in `model.gemma.forward` and `model.gemma.block`,
which take the arrays that `Backbone.gemma_weights` collects; so the engine has plain arrays.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from jaxtyping import Array

from model import weight_names as names
from model.config import Family, GemmaConfig
from model.gemma.keras_lora import DEFAULT_TARGETS, lora_shapes
from model.gemma.layers import (
    DecoderBlock,
    FinalNorm,
    MakeInitializer,
    ScaleEmbeddings,
    TokenEmbedding,
    Weight,
    no_type_check,
)
from model.gemma.random_weights import random_initializer
from model.gemma.weights import GemmaWeights, assemble
from model.weight_names import WeightSpec


class Backbone(keras.Model):
    """Token ids in, hidden states after the final norm out.

    Takes ``{"token_ids": int [B, L], "padding_mask": bool or int [B, L]}`` and returns [B, L, D] in
    the compute dtype.

    Args:
        config: Architecture.
        arrays: Name -> array for every weight, in run-time shape. Without it the weights are
            random.
        dtype: Keras dtype policy, its name or its config; Keras' global policy if left out.
        seed: Of random weights.
        name: Of the model.
        trainable: Whether its weights are.
    """

    @no_type_check
    def __init__(
        self,
        config: GemmaConfig,
        arrays: Mapping[str, Array] | None = None,
        *,
        dtype: Any = None,
        seed: int = 0,
        name: str | None = None,
        trainable: bool = True,
    ) -> None:
        policy = keras.dtype_policies.get(dtype)
        specs = {spec.name: spec for spec in names.weight_specs(config)}
        initializer = _initializers(specs, arrays, seed)

        token_embedding = TokenEmbedding(
            specs[names.EMBEDDINGS],
            initializer(names.EMBEDDINGS),
            final_soft_cap=config.final_soft_cap,
            dtype=policy,
        )
        blocks = [
            DecoderBlock(config, layer, _specs_of(config, specs, layer), initializer, dtype=policy)
            for layer in range(config.num_layers)
        ]
        final_norm = FinalNorm(
            specs[names.FINAL_NORM],
            initializer(names.FINAL_NORM),
            epsilon=config.final_norm_epsilon,
            dtype=policy,
        )
        inputs = {
            key: keras.Input(shape=(None,), dtype="int32", name=key)
            for key in ("token_ids", "padding_mask")
        }
        x = ScaleEmbeddings(name="scale_embeddings")(token_embedding(inputs["token_ids"]))
        for decoder_block in blocks:
            x = decoder_block(x, inputs["padding_mask"])
        super().__init__(
            inputs=inputs,
            outputs=final_norm(x),
            name=name or f"{_stem(config)}_backbone",
            trainable=trainable,
        )
        self.dtype_policy = policy
        self.config = config
        self.token_embedding = token_embedding
        self.transformer_layers = blocks
        self.layer_norm = final_norm

    @property
    def holders(self) -> dict[str, Weight]:
        """Name -> layer of every weight, in the order of `weight_specs`."""
        held = {self.token_embedding.weight_name: self.token_embedding}
        for decoder_block in self.transformer_layers:
            for field in decoder_block.fields:
                weight = getattr(decoder_block, field)
                held[weight.weight_name] = weight
        held[self.layer_norm.weight_name] = self.layer_norm
        return held

    @property
    def gemma_weights(self) -> GemmaWeights:
        """The arrays that act now, in the compute dtype."""
        return assemble(self.config, {name: holder.value for name, holder in self.holders.items()})

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
        targets_of_kernels = {
            names.block_weight_name(layer, target): target
            for layer in range(self.config.num_layers)
            for target in targets
        }
        self.trainable = True
        for name, holder in self.holders.items():
            holder.trainable = False
            if target := targets_of_kernels.get(name):
                holder.enable_lora(target, shapes[target])

    @property
    def lora_layers(self) -> dict[str, Weight]:
        """Name of a kernel -> its layer, for the kernels that have LoRA."""
        return {
            name: holder for name, holder in self.holders.items() if holder.lora_target is not None
        }


def _stem(config: GemmaConfig) -> str:
    return "gemma3" if config.family is Family.GEMMA3 else "gemma"


def _specs_of(
    config: GemmaConfig, specs: Mapping[str, WeightSpec], layer: int
) -> dict[str, WeightSpec]:
    fields = names.block_weight_shapes(config)
    return {field: specs[names.block_weight_name(layer, field)] for field in fields}


def _initializers(
    specs: Mapping[str, WeightSpec], arrays: Mapping[str, Array] | None, seed: int
) -> MakeInitializer:
    """Name of a weight -> what gives its first value."""
    places = {name: index for index, name in enumerate(specs)}

    def initializer(name: str) -> Any:
        if arrays is None:
            return random_initializer(specs[name], seed, places[name])
        return _given(arrays[name])

    return initializer


def _given(array: Array) -> Any:
    """An initializer that yields ``array`` without a second copy of it."""

    def initialize(shape: tuple[int, ...], dtype: Any = None) -> Array:
        assert tuple(array.shape) == tuple(shape), f"{array.shape} is not {shape}"
        return array.astype(dtype)

    return initialize
