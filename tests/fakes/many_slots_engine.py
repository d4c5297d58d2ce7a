"""The arithmetic engine with far more slots than a service may have, to load the API process."""

from dataclasses import replace

from model.progress import Progress
from model.slots import EngineOptions
from tests.fakes import arithmetic_engine
from tests.fakes.arithmetic_engine import ArithmeticEngine

NUM_SLOTS = 1024


def load(options: EngineOptions, progress: Progress) -> ArithmeticEngine:
    return arithmetic_engine.load(replace(options, num_slots=NUM_SLOTS), progress)
