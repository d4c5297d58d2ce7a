"""A look into the residual stream, and changes of it, in plain Python.

The stream x of a token has ``hidden_dim`` numbers. At layer −1 it is the embedding before scaling,
at layer i what block i leaves, before the final norm. At each layer the interventions of a request
act in their order, and then what is captured is taken::

    add            x + scale · v
    scale          scale · x
    zero           0
    set            v
    project_out    x − (x · v̂) v̂, v̂ being v of length 1

Only the standard library is imported here, as in `model.slots`.
"""

from dataclasses import dataclass
from typing import Literal

# Of one request.
MAX_INTERVENTIONS = 4
EMBEDDING_LAYER = -1

Operation = Literal["add", "scale", "zero", "set", "project_out"]


@dataclass(frozen=True, slots=True)
class Intervention:
    """A change of the stream.

    Attributes:
        operation: What is done.
        layers: Where, −1 to the last.
        scale: Of ``add`` and ``scale``.
        vector: v, if there is one: float32, little-endian, ``hidden_dim`` of them, all finite; not
            zero for ``project_out``.
    """

    operation: Operation
    layers: tuple[int, ...]
    scale: float = 1.0
    vector: bytes = b""


@dataclass(frozen=True, slots=True)
class Touch:
    """An intervention in the tokens of a chunk that stand at these places."""

    intervention: Intervention
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepIntervention:
    """An intervention while tokens are drawn.

    Attributes:
        intervention: What is done.
        at_prompt_end: To the last token of the prompt, behind which the first one is drawn.
        at_completion: To every token that was drawn.
    """

    intervention: Intervention
    at_prompt_end: bool
    at_completion: bool

    def acts_at(self, position: int, num_prompt: int) -> bool:
        """On the token at a position behind which another one is drawn."""
        return self.at_completion if position >= num_prompt else self.at_prompt_end


@dataclass(frozen=True, slots=True)
class Capture:
    """The stream at one layer, at some places of a chunk.

    Attributes:
        layer: −1 to the last.
        places: Ascending.
        is_half: Float16 is wanted, where what is too large becomes infinite; else float32.
    """

    layer: int
    places: tuple[int, ...]
    is_half: bool = False


@dataclass(frozen=True, slots=True)
class Captured:
    """What was captured: little-endian, place by place. ``is_finite`` is told of the float32."""

    numbers: bytes
    is_finite: bool
