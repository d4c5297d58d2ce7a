"""How a self-test says that bits differed: on what machine, and what whoever reads it can do."""

from model.slots import EngineInfo

REPORT = "please report this line with the model and the processor."


def machine_of(info: EngineInfo) -> str:
    """What the bits depend on, as far as it is known."""
    return f"this machine ({info.backend}, {info.device})"
