"""What an engine takes from an open preset: its vocabulary, and its weights on the device."""

import logging

import jax

from model.config import Family
from model.ids_only import IdsOnly
from model.presets.converted import ConvertedPreset
from model.progress import Progress
from model.slots import TextCodec
from model.tokenizer import Tokenizer
from model.weight_names import num_parameters

_logger = logging.getLogger(__name__)


def codec_of(preset: ConvertedPreset) -> TextCodec:
    """Text to ids and back; ids alone if the preset has no tokenizer."""
    proto = preset.tokenizer_proto()
    if proto is None:
        _logger.warning("The preset has no tokenizer: only token ids are taken and given.")
        return IdsOnly(preset.config.vocabulary_size)
    return Tokenizer(proto, stops_at_end_of_turn=preset.config.family is Family.GEMMA3)


def arrays_on_device(preset: ConvertedPreset, progress: Progress) -> dict[str, jax.Array]:
    """Every weight on the device, one after another so that only one is held twice.

    On a CPU none is: the device reads the mapped file where it lies.
    """
    total = 4.0 * num_parameters(preset.config)
    done = 0.0
    arrays: dict[str, jax.Array] = {}
    for name, array in preset.arrays():
        arrays[name] = jax.device_put(array).block_until_ready()
        done += array.nbytes
        progress("load", done, total)
    return arrays
