"""What every test shares: a strict JAX, the versions in the header, what is compiled, the order."""

import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports JAX: tests run on the CPU wherever they run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from model import engine
from model.engine import GemmaEngine
from model.kernels.choice import KernelChoice
from model.programs import use_compile_cache
from model.progress import no_progress
from model.slots import EngineOptions
from tests import goldens
from tests.native_kernels import InstructionSets

jax.config.update("jax_numpy_dtype_promotion", "strict")

# The files that take longest start first, so that at the end no process is left alone with one of
# them. In between is what mostly waits for processes and clocks, so that one process computes while
# the other waits. What needs the real model comes when test_company has compiled it.
FIRST_FILES = (
    "test_company",
    *("test_service_start_stop", "test_service_serving", "test_service_crashes", "test_commands"),
    "test_keras_generate",
    "test_client_service",
    *("test_service_stalls", "test_transfers", "test_copies", "test_credentials"),
    *("test_engine", "test_keras_model", "test_searches", "test_keras_training"),
    *("test_readme", "test_real_model_parity"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes beside each other take the files in the order of their tests."""
    items.sort(key=lambda item: (*FIRST_FILES, item.path.stem).index(item.path.stem))


def pytest_report_header(config: pytest.Config) -> str:
    packages = ("jax", "jaxlib", "keras", "numpy", "fastapi", "uvicorn")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"Python {platform.python_version()}, {versions}, backend {jax.default_backend()}"


@pytest.fixture(scope="session")
def shared_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted weights and compiled programs, shared by all tests of a session.

    GEMMA_TEST_CACHE_DIR keeps them between sessions; without it every run starts cold, as CI does.
    """
    if kept := os.environ.get("GEMMA_TEST_CACHE_DIR"):
        return Path(kept)
    # Workers of one run (pytest-xdist) have folders beside each other, and share this one.
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    (shared / "cache").mkdir(exist_ok=True)
    return shared / "cache"


@pytest.fixture(scope="session")
def cache_dir(shared_cache_dir: Path) -> Path:
    """`shared_cache_dir`; a file of tests that wants one of its own may define this anew."""
    return shared_cache_dir


@pytest.fixture
def instruction_sets() -> Iterator[InstructionSets]:
    """Those of the native kernels; the first choice is put back."""
    sets = InstructionSets()
    yield sets
    sets.use(sets.first_choice)


@pytest.fixture(scope="session", autouse=True)
def compile_cache(shared_cache_dir: Path) -> None:
    """What one test has compiled, another fetches, before and after an engine is loaded.

    Without this, programs of Keras models were kept only once a test had loaded an engine.
    """
    use_compile_cache(shared_cache_dir)


@pytest.fixture(scope="session")
def engine_of(cache_dir: Path) -> Callable[..., GemmaEngine]:
    """Loads the engine of a golden set once: 4 slots of 1,024 tokens, room for kept blocks, and a
    bank for 4 adapters of rank 8.
    """

    @functools.cache
    def load(name: str, kernels: KernelChoice = "auto") -> GemmaEngine:
        preset = str(goldens.preset_directory(name))
        options = EngineOptions(preset, 4, 1024, cache_dir, 2**26, kernels, 4, 8)
        return engine.load(options, no_progress)

    return load
