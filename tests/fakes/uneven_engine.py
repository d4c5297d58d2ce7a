"""An engine whose self-test fails, as one would on a processor that multiplies in another way."""

from typing import NoReturn

from model.errors import SelfTestFailed
from model.progress import Progress
from model.slots import EngineOptions


def load(_options: EngineOptions, _progress: Progress) -> NoReturn:
    raise SelfTestFailed("A row gets other bits among 8 than alone. Serve with --slots 4.")
