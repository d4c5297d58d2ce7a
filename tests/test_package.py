"""What is installed, and what our own code must not do: lock files, package data, banned calls."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = {name: (ROOT / name).read_text() for name in ("requirements.lock", "requirements-dev.lock")}
# A compiler for machines without one, and nothing else.
KERNELS_LOCK = (ROOT / "requirements-kernels.lock").read_text()

# The oldest versions in which what they read from strangers is safe.
FLOORS = {
    "h11": "0.16.0",  # CVE-2025-43859
    "h5py": "3.16.0",  # CVE-2026-26200, in HDF5
    "keras": "3.15.1",  # guards of its HDF5 reader, closed Lambda layers
    "sentencepiece": "0.2.3",  # CVE-2026-1260
    "starlette": "1.3.1",  # CVE-2026-48710, CVE-2026-54283
}
# Of packages that only tests use: in the development lock, and not in the other one.
DEVELOPMENT_FLOORS = {"safetensors": "0.8.0"}
# They parse what strangers send, or load code; nothing here needs them. (kagglehub and
# huggingface-hub are needed for downloads; an import contract confines them to a process of their
# own.)
ABSENT = (
    *("cloudpickle", "dill", "jinja2", "joblib", "keras-hub", "python-multipart", "tensorflow"),
    *("torch", "transformers"),
)
# Released together with the package that is named, as one.
PARTS = {"jaxlib": "jax", "pydantic-core": "pydantic"}


# --- lock files -------------------------------------------------------------------------------


def read_lock(text: str) -> dict[str, set[str]]:
    """Pins by name, each with its marker and hashes on one line."""
    pins: dict[str, set[str]] = {}
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        if line.strip() and not line.startswith("#"):
            name = re.split(r"[^A-Za-z0-9._-]", line)[0]
            pins.setdefault(name, set()).add(line.strip())
    return pins


def versions(text: str) -> dict[str, set[Version]]:
    """Versions by name; several where a marker decides."""
    return {
        name: {Version(pin) for line in lines for pin in re.findall(r"==(\S+)", line.split(";")[0])}
        for name, lines in read_lock(text).items()
    }


def lock_findings(text: str) -> list[str]:
    """Requirements that are not exactly one version with hashes, or are below a floor."""
    found = []
    pin = re.compile(r"[a-z0-9.-]+==[0-9][^\s;]*( ; [^#]+?)?( --hash=sha256:[0-9a-f]{64})+")
    for lines in read_lock(text).values():
        found += [f"not pinned by hash: {line:.60}" for line in lines if not pin.fullmatch(line)]
    locked = versions(text)
    for name, floor in FLOORS.items():
        if any(version < Version(floor) for version in locked.get(name, ())):
            found.append(f"{name} is below {floor}")
    found += [f"{name} should not be needed" for name in ABSENT if name in locked]
    return found


def test_packages_that_only_tests_use_are_above_their_floors_and_not_in_the_product():
    product, development = (versions(LOCKS[name]) for name in LOCKS)
    for name, floor in DEVELOPMENT_FLOORS.items():
        assert all(version >= Version(floor) for version in development[name])
        assert name not in product


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_pins_everything_by_hash_above_the_floors(name):
    assert lock_findings(LOCKS[name]) == []


def test_the_lock_of_the_compiler_pins_it_alone_by_hash():
    (requirement,) = map(Requirement, PYPROJECT["dependency-groups"]["kernels"])
    locked = versions(KERNELS_LOCK)

    assert lock_findings(KERNELS_LOCK) == []
    assert locked.keys() == {requirement.name}
    assert all(requirement.specifier.contains(pin) for pin in locked[requirement.name])
    # Nothing that is always installed may bring it.
    assert not any(requirement.name in text for text in LOCKS.values())


@pytest.mark.parametrize(
    ("pattern", "replacement", "finding"),
    [
        (r"(h11==\S+) \\\n(    --hash\S+( \\)?\n)+", r"\1\n", "not pinned by hash: h11"),
        (r"h11==\S+", "h11>=0.16", "not pinned by hash: h11"),
        (r"h11==\S+", "h11 @ https://a.example/h11.whl", "not pinned by hash: h11"),
        (r"\A", "-e git+https://a.example/x\n", "not pinned by hash: -e"),
        (r"h11==\S+", "h11==0.15.0", "h11 is below 0.16.0"),
        (r"starlette==\S+", "starlette==1.3.0", "starlette is below 1.3.1"),
        (r"absl-py==\S+", "torch==2.9.0", "torch should not be needed"),
    ],
)
def test_a_bad_lock_file_is_found(pattern, replacement, finding):
    bad = re.sub(pattern, replacement, LOCKS["requirements.lock"], count=1)

    assert any(finding in line for line in lock_findings(bad))


def test_the_lock_for_development_holds_the_other_with_the_same_pins():
    product, development = (read_lock(text) for text in LOCKS.values())

    assert {name: development.get(name) for name in product} == product
    assert len(development) > len(product)


@pytest.mark.parametrize(
    ("lock", "groups"),
    [
        ("requirements.lock", ("serve", "demo")),
        ("requirements-dev.lock", ("serve", "demo", "dev")),
    ],
)
def test_a_lock_file_meets_every_requirement_of_the_project(lock, groups):
    project = PYPROJECT["project"]
    extras = [line for group in groups for line in project["optional-dependencies"][group]]
    locked = versions(LOCKS[lock])

    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        pins = locked[requirement.name.lower()]
        assert pins
        assert all(requirement.specifier.contains(pin) for pin in pins), str(requirement)


def test_every_library_that_the_code_imports_is_a_declared_dependency():
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    declared = {Requirement(line).name for line in lines}
    providers = importlib.metadata.packages_distributions()
    imported = {
        name.partition(".")[0]
        for package in ("model", "service")
        for path in (ROOT / package).rglob("*.py")
        for name in imports(path.read_text())
    } - {"model", "service", *sys.stdlib_module_names}
    found = {providers[name][0].replace("_", "-").lower() for name in imported}

    assert {"jax", "kagglehub"} < found
    assert {PARTS.get(name, name) for name in found} - declared == set()


# --- package ----------------------------------------------------------------------------------


def _packed(model: Path) -> set[Path]:
    """Package data of ``model``. setuptools takes ``**`` for files too, `Path.glob` for folders."""
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["model"]
    return {path for pattern in patterns for path in model.glob(pattern.replace("**", "**/*"))}


def test_the_tiny_preset_is_package_data():
    packed = _packed(ROOT / "model")
    data = {
        path
        for package in ("model", "service")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }

    assert {path.name for path in data} >= {"config.json", "model.weights.h5", "vocabulary.spm"}
    assert data <= packed


def test_sources_and_the_library_of_the_kernels_are_package_data(tmp_path):
    kernels = tmp_path / "kernels"
    for name in ("source/product.cc", "source/product.h", "_build/0-1.so", "_build/left/0-1.so"):
        (kernels / name).parent.mkdir(parents=True, exist_ok=True)
        (kernels / name).touch()

    names = {str(path.relative_to(kernels)) for path in _packed(tmp_path)}

    assert names == {"source/product.cc", "source/product.h", "_build/0-1.so"}


def test_every_folder_of_code_is_a_package():
    for name in ("model", "service"):
        for path in (ROOT / name).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path} would be left out of a wheel"


# --- banned -----------------------------------------------------------------------------------

_BANNED_MODULES = {
    *("cloudpickle", "dill", "joblib", "marshal", "multiprocessing", "pickle", "shelve"),
    *("_pickle", "imp", "code", "torch"),
}
_BANNED_CALLS = {"eval", "exec", "compile", "__import__"}


def imports(source: str) -> list[str]:
    """Modules that are imported by their whole name, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names]
            case ast.ImportFrom(module=str(module)):
                found.append(module)
    return found


def banned(source: str) -> list[str]:
    """Uses of what can run code that comes as data, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module)):
                modules = [module]
            case _:
                modules = []
        uses = [name for name in modules if name.partition(".")[0] in _BANNED_MODULES]
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in _BANNED_CALLS:
                uses.append(name)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr=name)) if name in (
                "system",
                "popen",
            ):
                uses.append(f"os.{name}")
            case ast.keyword(arg="shell" | "allow_pickle" as name, value=value) if not (
                isinstance(value, ast.Constant) and value.value is False
            ):
                uses.append(name)
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="np" | "numpy" | "jnp"), attr="load")
            ) if not any(word.arg == "allow_pickle" for word in node.keywords):
                uses.append("load without allow_pickle=False")
        found += [f"line {getattr(node, 'lineno', 0)}: {use}" for use in uses]
    return found


@pytest.mark.parametrize("package", ["model", "service"])
def test_no_code_comes_out_of_data(package):
    found = {
        str(path.relative_to(ROOT)): uses
        for path in (ROOT / package).rglob("*.py")
        if (uses := banned(path.read_text()))
    }

    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as read",
        "import cloudpickle.cloudpickle",
        "import os, dill",
        "import shelve",
        "import marshal",
        "from joblib import load",
        "def late():\n    import multiprocessing.shared_memory",
        "eval('1')",
        "exec(text)",
        "__import__('pickle')",
        "subprocess.run(line, shell=True)",
        "subprocess.run(line, shell=is_easy)",
        "os.system('true')",
        "np.load(path, allow_pickle=True)",
        "np.load(path)",
        "numpy.load(path, allow_pickle=trusted)",
    ],
)
def test_a_banned_use_is_found(source):
    assert banned(source)


@pytest.mark.parametrize(
    "source",
    [
        "np.load(path, allow_pickle=False)",
        "subprocess.run(words, shell=False)",
        "import pickled_vegetables",
        "engine.compile(progress)",
        "text = 'import pickle'",
    ],
)
def test_what_only_looks_banned_is_let_through(source):
    assert banned(source) == []
