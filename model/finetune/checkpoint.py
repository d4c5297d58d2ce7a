"""A job between two steps as bytes: its adapter, what the optimizer keeps, and the step.

Safetensors with the arrays of the adapter's file and, for each, those of the optimizer behind it.
The order of rows is a function of the plan and the step, so nothing else is needed.
"""

from collections.abc import Mapping

import numpy as np

from model.adapter_file import read_adapter, write_adapter
from model.config import GemmaConfig
from model.errors import AdapterUnfit, PresetFileInvalid
from model.finetune.optimizers import Floats
from model.finetune.pairs import named
from model.lora_adapter import LoraAdapter
from model.presets.safetensors_header import check_tensors, header_of
from model.presets.safetensors_stream import TensorPlan, tensor_bytes

_SOURCE = "The checkpoint"
_STEP = "step"
_LENGTH = 8

Moments = Mapping[str, tuple[Floats, ...]]


def write_checkpoint(adapter: LoraAdapter, moments: Moments, step: int) -> bytes:
    """The same bytes for the same job at the same step."""
    file = write_adapter(adapter)
    plans, arrays = [], []
    for name, kept in moments.items():
        for number, array in enumerate(kept):
            plans.append(TensorPlan(f"{name}.{number}", array.shape, np.dtype(np.float32)))
            arrays.append(array)
    rest = tensor_bytes(plans, arrays, {_STEP: str(step)})
    return len(file).to_bytes(_LENGTH, "little") + file + rest


def read_checkpoint(
    content: bytes, config: GemmaConfig, num_moments: int
) -> tuple[LoraAdapter, dict[str, tuple[Floats, ...]], int]:
    """What `write_checkpoint` was given.

    Raises:
        AdapterUnfit: It is none, or of another model.
    """
    try:
        end = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
        adapter = read_adapter(content[_LENGTH:end], config)
        rest = content[end:]
        header = header_of(rest, _SOURCE)
        own = named(adapter.pairs)
        shapes = {
            f"{name}.{number}": array.shape
            for name, array in own.items()
            for number in range(num_moments)
        }
        places = check_tensors(header, shapes)
        step = header.metadata.get(_STEP, "")
        if not step.isascii() or not step.isdigit() or len(step) > 9:
            raise PresetFileInvalid(f"{_SOURCE} does not say of which step it is.")
    except PresetFileInvalid as error:
        raise AdapterUnfit(str(error)) from error

    def array(name: str) -> Floats:
        place, shape = places[name], shapes[name]
        count = place.num_bytes // 4
        return np.frombuffer(rest, "<f4", count, place.start).reshape(shape)

    moments = {
        name: tuple(array(f"{name}.{number}") for number in range(num_moments)) for name in own
    }
    return adapter, moments, int(step)
