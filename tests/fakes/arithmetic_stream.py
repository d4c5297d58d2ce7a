"""The residual stream of the arithmetic engine: one layer, one number wide.

At layer −1 it is the token itself, at layer 0 the sum of all numbers up to the place. So what is
changed at −1 counts for everything behind it, and what is changed at 0 only there.
"""

import math
import struct
from collections.abc import Iterable, Sequence

from model.intervention_slots import Capture, Captured, Intervention, Touch


class Changed(int):
    """A token that counts for another number than its own."""

    number: float


def numbers(tokens: Iterable[int]) -> list[float]:
    return [token.number if isinstance(token, Changed) else token for token in tokens]


def embedded(token: int, interventions: Iterable[Intervention]) -> int:
    """A token as it stands in a slot."""
    number = _change(token, interventions, -1)
    if number == token:
        return token
    changed = Changed(token)
    changed.number = number
    return changed


def stream(tokens: Sequence[int], interventions: Iterable[Intervention]) -> int:
    """At layer 0, of the last of some tokens."""
    return int(_change(sum(numbers(tokens)), interventions, 0))


def touching(touches: Iterable[Touch], place: int) -> list[Intervention]:
    return [touch.intervention for touch in touches if place in touch.places]


def captured(capture: Capture, streams: Sequence[float]) -> Captured:
    letter = "e" if capture.is_half else "f"
    packed = struct.pack(f"<{len(streams)}{letter}", *streams)
    return Captured(packed, all(map(math.isfinite, streams)))


def _change(x: float, interventions: Iterable[Intervention], layer: int) -> float:
    for each in interventions:
        if layer in each.layers:
            [v] = struct.unpack("<f", each.vector) if each.vector else (0.0,)
            # In one dimension nothing is left of what is projected out.
            results = {"add": x + each.scale * v, "scale": each.scale * x, "set": v}
            x = results.get(each.operation, 0.0)
    return x
