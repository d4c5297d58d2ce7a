"""Samplers by name, and the dicts that Keras writes for them.

A built-in sampler has three names: ``top_k`` (its identifier), ``keras_hub>TopKSampler`` (in
configs that keras-hub wrote) and ``TopKSampler``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import keras

from model.samplers.beam import BeamSampler
from model.samplers.contrastive import ContrastiveSampler
from model.samplers.sampler import Sampler
from model.samplers.simple import GreedySampler, RandomSampler, TopKSampler, TopPSampler

IDENTIFIERS: dict[str, type[Sampler]] = {
    "beam": BeamSampler,
    "contrastive": ContrastiveSampler,
    "greedy": GreedySampler,
    "random": RandomSampler,
    "top_k": TopKSampler,
    "top_p": TopPSampler,
}
_PACKAGE = "keras_hub"


def get(identifier: Any) -> Sampler | Callable[..., Any] | None:
    """The sampler that ``identifier`` means.

    Args:
        identifier: A name gives a sampler with default arguments, a dict the one that it
            describes; None, a sampler or any other callable is returned as it is.

    Raises:
        ValueError: There is no sampler of that name, or it is no identifier at all.
    """
    if isinstance(identifier, Mapping):
        return deserialize(identifier)
    if isinstance(identifier, str):
        return _class_of(identifier, {})()
    if identifier is None or callable(identifier):
        return identifier
    raise ValueError(
        "A sampler is a name, a dict with class_name and config, a Sampler or another callable; "
        f"got {identifier!r}."
    )


def serialize(sampler: Sampler) -> dict[str, Any]:
    """A dict of plain values from which `deserialize` makes the same sampler."""
    own_class = type(sampler)
    built_in = own_class in IDENTIFIERS.values()
    return {
        "module": own_class.__module__,
        "class_name": own_class.__name__,
        "config": sampler.get_config(),
        "registered_name": (
            f"{_PACKAGE}>{own_class.__name__}"
            if built_in
            else keras.saving.get_registered_name(own_class)
        ),
    }


def deserialize(
    config: Mapping[str, Any], custom_objects: Mapping[str, type[Sampler]] | None = None
) -> Sampler:
    """The sampler that `serialize`, or keras-hub's, described.

    Args:
        config: ``class_name`` and ``config``, and perhaps ``registered_name``.
        custom_objects: Name -> class for samplers that are neither built in nor registered with
            `keras.saving.register_keras_serializable`.

    Raises:
        ValueError: It names no known sampler, or has arguments that the sampler does not take.
    """
    name = config.get("registered_name") or config.get("class_name")
    if not isinstance(name, str):
        raise ValueError(f"A sampler's dict needs a class_name, got {dict(config)!r}.")
    sampler_class = _class_of(name, custom_objects or {})
    arguments = config.get("config") or {}
    try:
        return sampler_class.from_config(dict(arguments))
    except TypeError as error:
        raise ValueError(f"The sampler {name!r} does not take {arguments!r}: {error}") from error


def _class_of(name: str, custom_objects: Mapping[str, type[Sampler]]) -> type[Sampler]:
    built_in = {
        **IDENTIFIERS,
        **{cls.__name__: cls for cls in IDENTIFIERS.values()},
        **{f"{_PACKAGE}>{cls.__name__}": cls for cls in IDENTIFIERS.values()},
    }
    found = custom_objects.get(name) or built_in.get(name)
    if found is None:
        found = keras.saving.get_registered_object(name)
    if not (isinstance(found, type) and issubclass(found, Sampler)):
        known = ", ".join(sorted(IDENTIFIERS))
        raise ValueError(f"There is no sampler {name!r}. Known samplers: {known}.")
    return found
