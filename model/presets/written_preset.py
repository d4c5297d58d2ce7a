"""What the writers of preset directories share: all or nothing, and nothing silently lost."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Set as AbstractSet
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.config import GemmaConfig
from model.errors import PresetError, UnsupportedPreset
from model.presets.entry_directory import install
from model.weight_names import weight_specs

NamedArray = tuple[str, NDArray[np.float32]]


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A private directory to write into, which becomes ``target`` if the block ends well.

    Raises:
        PresetError: There is something at ``target`` already, or the disk refuses.
    """
    if target.is_symlink() or target.exists():
        raise PresetError(f"{target} exists already; name a new directory.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            yield staging
            install(staging, target)
            if staging.exists():
                raise PresetError(f"{target} was made by someone else meanwhile; name another.")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise PresetError(
            f"{target} cannot be written: {error.strerror or error}. Check the space and the "
            "permissions there."
        ) from error


def refuse_if_lost(
    config: GemmaConfig,
    read_back: GemmaConfig,
    kind: str,
    *,
    may_differ: AbstractSet[str] = frozenset(),
) -> None:
    """Refuses a config of which ``kind``, as our own reader understands it, loses something.

    Args:
        config: What was written.
        read_back: What was read from it.
        kind: The format, for the message.
        may_differ: Fields that the format does not state.

    Raises:
        UnsupportedPreset: The message names every field that would be lost.
    """
    ignored = set(may_differ)
    if config.sliding_window_tokens is None:
        ignored.add("global_layer_period")
    lost = [
        f"{field.name} {getattr(config, field.name)!r:.40}"
        for field in dataclasses.fields(config)
        if field.name not in ignored
        and getattr(config, field.name) != getattr(read_back, field.name)
    ]
    if lost:
        raise UnsupportedPreset(f"{kind} cannot express {', '.join(lost)}; nothing was written.")


def in_order(config: GemmaConfig, arrays: Iterable[NamedArray]) -> Iterator[NamedArray]:
    """``arrays``, checked one by one to be those of `weight_specs` in its order."""
    for spec, (name, array) in zip(weight_specs(config), arrays, strict=True):
        assert (name, array.shape) == (spec.name, spec.shape), (
            f"{name} {array.shape} was given where {spec} belongs"
        )
        assert array.dtype == np.float32, f"{name} was given as {array.dtype}"
        yield name, array
