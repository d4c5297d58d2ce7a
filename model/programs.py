"""The compiled programs of an engine: a closed set, made before the first request.

Programs are compiled ahead of time for exact shapes. Calling one with another shape is an error and
never a compilation, so nothing can compile while requests run. XLA's results are kept in the cache
directory, so a second start fetches them instead.
"""

import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jaxlib.version import __version__ as jaxlib_version

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
    """Counts what JAX itself reports as compiled, fetched from the compile cache or not."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_kwargs: str | int) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1


def use_compile_cache(cache_dir: Path) -> Path:
    """Keeps compiled programs in ``cache_dir``, apart for each jaxlib, backend and processor.

    A program compiled for one processor's instructions may crash on another. Returns the folder.
    """
    machine = f"{platform.machine()} {_processor_features()}"
    key = hashlib.sha256(f"{jaxlib_version} {jax.default_backend()} {machine}".encode())
    directory = cache_dir / "programs" / key.hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # The defaults skip what compiled in under a second, which is most of our programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


def _processor_features() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines = text.splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """One program to compile: a pure function and the shapes of its arguments.

    Attributes:
        name: As listed in `/info`.
        function: Of arrays only.
        arguments: Arrays or `jax.ShapeDtypeStruct`s, in pytrees.
        donated: Positions of the arguments whose memory the results take over.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()

    def lower(self) -> jax.stages.Lowered:
        """What XLA is asked to compile; ``compile`` then looks into the compile cache first."""
        return jax.jit(self.function, donate_argnums=self.donated).lower(*self.arguments)
