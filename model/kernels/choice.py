"""Who says which kernels compute, in plain Python."""

from typing import Literal

# ``auto``: native ones where they can be used. ``native``: those, or no start. ``xla``: never.
KernelChoice = Literal["auto", "native", "xla"]
