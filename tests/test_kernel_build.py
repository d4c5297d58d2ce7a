"""The build step of the kernels: which compiler, what is kept, what is said."""

import shlex
import shutil
import stat

import pytest

from model.kernels.build import Compiler, NotBuilt, build, compilers
from model.kernels.exports import instruction_set, open_library
from model.kernels.sources import DIRECTORY, library_file
from tests.kernel_copies import copy_kernels, handling_source, python, tiny_source

COMPILERS = list(compilers())
ZIGLANG = [compiler for compiler in COMPILERS if compiler.name == "ziglang"]
needs_a_compiler = pytest.mark.skipif(not COMPILERS, reason="no C++ compiler here")
needs_ziglang = pytest.mark.skipif(not ZIGLANG, reason="a package that make nightly installs")
# The last word is the file to make.
LAST = "for last; do :; done\n"


@pytest.fixture
def kernels(tmp_path):
    return copy_kernels(tmp_path, tiny_source())


@pytest.fixture
def script(tmp_path):
    """Makes a compiler out of lines of shell."""

    def make(name, lines):
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{lines}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return Compiler(name, (str(file),))

    return make


def built(kernels):
    """What lies in the folder of libraries."""
    return sorted((kernels / "_build").glob("*"))


@needs_a_compiler
def test_a_library_is_built_opened_and_called_after_its_sources(kernels):
    line = build(kernels, COMPILERS)

    assert line.startswith(f"built by {COMPILERS[0].name} in ")
    assert line.endswith(f"({library_file(kernels).name})")
    assert built(kernels) == [library_file(kernels)]
    assert instruction_set(open_library(library_file(kernels))) == "avx2"


@needs_a_compiler
def test_several_sources_make_one_library_and_may_include_a_header(kernels):
    source = kernels / "source"
    (source / "names.h").write_text('#define NAME "neon"\nextern const char* chosen;\n')
    (source / "chosen.cc").write_text('#include "names.h"\nconst char* chosen = NAME;\n')
    (source / "product.cc").write_text(
        '#include "names.h"\n' + tiny_source().replace('"avx2"', "chosen")
    )

    build(kernels, COMPILERS)

    assert instruction_set(open_library(library_file(kernels))) == "neon"


@needs_ziglang
@pytest.mark.timeout(1800)
def test_the_compiler_out_of_a_package_builds_handlers_and_brings_its_library(tmp_path):
    kernels = copy_kernels(tmp_path, handling_source())

    line = build(kernels, ZIGLANG)

    assert line.startswith("built by ziglang in ")
    library = library_file(kernels)
    assert instruction_set(open_library(library)) == "avx2"
    assert b"libstdc++" not in library.read_bytes()
    # With symbols it has 5 million bytes.
    assert library.stat().st_size < 1_000_000


@needs_ziglang
@pytest.mark.timeout(1800)
def test_libraries_of_two_compilers_choose_the_same_instruction_set(tmp_path):
    """Each compiler has its own way to ask the processor, and one of them is never answered."""
    chosen = set()
    for compiler in COMPILERS:
        kernels = copy_kernels(tmp_path / compiler.name, "")
        shutil.copytree(DIRECTORY / "source", kernels / "source", dirs_exist_ok=True)
        build(kernels, [compiler])
        chosen.add(instruction_set(open_library(library_file(kernels))))

    assert len(chosen) == 1


def test_the_name_changes_with_names_and_bytes_of_sources_and_with_nothing_else(kernels):
    source = kernels / "source"
    names = [library_file(kernels)]
    (source / "product.cc").write_text(tiny_source("avx512"))
    names.append(library_file(kernels))
    (source / "rows.h").touch()
    names.append(library_file(kernels))
    (source / "rows.h").rename(source / "lines.h")
    names.append(library_file(kernels))
    (source / "product.cc~").write_text("what an editor left")

    assert library_file(kernels) == names[-1]
    assert len(set(names)) == 4


def test_what_is_up_to_date_needs_no_compiler(kernels):
    library_file(kernels).parent.mkdir()
    library_file(kernels).touch()

    assert build(kernels, []) == f"up to date ({library_file(kernels).name})"


@needs_a_compiler
def test_a_compiler_that_fails_is_quoted_and_the_next_one_is_tried(kernels, script, capsys):
    lines = "\n".join(f"echo line {number} >&2" for number in range(30))
    line = build(kernels, [script("broken", f"{lines}\nexit 1"), *COMPILERS])

    quoted = capsys.readouterr().err.splitlines()
    assert quoted == ["kernels: broken failed:", *(f"line {number}" for number in range(10, 30))]
    assert line.startswith(f"built by {COMPILERS[0].name}")


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("exit 3", "exit status 3"),
        ("echo no such instruction; exit 1", "no such instruction"),
        (f'{LAST}echo rubbish > "$last"', "what it made cannot be used:"),
        ("exit 0", "what it made cannot be used:"),
    ],
)
def test_a_compiler_that_makes_nothing_or_rubbish_leaves_nothing(
    kernels, script, capsys, lines, complaint
):
    with pytest.raises(NotBuilt, match=r"no C\+\+ compiler works here \(tried bad\)"):
        build(kernels, [script("bad", lines)])

    assert f"kernels: bad failed:\n{complaint}" in capsys.readouterr().err
    assert built(kernels) == []


def test_a_compiler_that_is_not_there_is_named(kernels, capsys):
    with pytest.raises(NotBuilt, match="tried here"):
        build(kernels, [Compiler("here", ("/nowhere/c++",))])

    assert "/nowhere/c++: No such file" in capsys.readouterr().err


@needs_a_compiler
@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (tiny_source(more="__attribute__((constructor)) void f() { __builtin_trap(); }"), "SIG"),
        (tiny_source("mmx"), "not known: 'mmx'"),
        (tiny_source().replace("GemmaProduct", "Product"), "does not export GemmaProduct"),
    ],
)
def test_a_library_that_cannot_be_used_gets_no_name(tmp_path, capsys, source, complaint):
    kernels = copy_kernels(tmp_path, source)

    with pytest.raises(NotBuilt):
        build(kernels, COMPILERS[:1])

    assert complaint in capsys.readouterr().err
    assert built(kernels) == []


def test_without_a_compiler_a_source_or_a_place_it_says_which(kernels):
    with pytest.raises(NotBuilt, match="none was found"):
        build(kernels, [])
    (kernels / "_build").rmdir()
    (kernels / "_build").touch()
    with pytest.raises(NotBuilt, match="_build cannot be written: File exists"):
        build(kernels, [])
    (kernels / "source" / "product.cc").unlink()
    with pytest.raises(NotBuilt, match=r"holds no \.cc file"):
        build(kernels, [])


@needs_a_compiler
def test_sources_that_change_while_they_compile_make_no_library(kernels, script):
    words = shlex.join(COMPILERS[0].words)
    slow = script("slow", f'{words} "$@" && echo >> {kernels / "source" / "product.cc"}')

    with pytest.raises(NotBuilt, match="changed meanwhile"):
        build(kernels, [slow])

    assert built(kernels) == []


# --- the command ------------------------------------------------------------------------------


def test_cxx_is_tried_first_with_its_options_and_ziglang_last(tmp_path, kernels, script):
    """Three compilers that fail; a folder called ziglang stands for the package."""
    package = tmp_path / "ziglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import sys\nsys.exit(' '.join(sys.argv[1:5]))\n")
    mine = script("mine", 'echo "mine $1"; exit 1')
    script("g++", "echo g++; exit 1")

    environment = {"CXX": f"{mine.words[0]} --fast", "PATH": str(tmp_path)}
    _, stderr = python(tmp_path, "-m", "model.kernels.build", **environment).communicate()

    *complaints, outcome = stderr.splitlines()
    assert complaints == [
        *("kernels: $CXX failed:", "mine --fast"),
        *("kernels: g++ failed:", "g++"),
        *("kernels: ziglang failed:", "c++ -mcpu=baseline -s -std=c++17"),
    ]
    assert outcome == (
        "kernels: not built: no C++ compiler works here (tried $CXX, g++, ziglang); "
        "products take the portable path."
    )


@pytest.mark.parametrize(("option", "statuses"), [((), (0, 0)), (("--require",), (1, 69))])
def test_that_nothing_is_built_is_a_failure_only_if_it_was_required(tmp_path, option, statuses):
    """Without a source, and without a compiler: a package that cannot run stands for ziglang."""
    copy_kernels(tmp_path / "no source", "").joinpath("source", "product.cc").unlink()
    copy_kernels(tmp_path / "no compiler", tiny_source())
    for folder in ("no source", "no compiler"):
        (tmp_path / folder / "ziglang").mkdir()
        (tmp_path / folder / "ziglang" / "__init__.py").touch()

        command = python(tmp_path / folder, "-m", "model.kernels.build", *option, PATH="/nowhere")
        stdout, stderr = command.communicate()

        assert command.returncode == statuses[folder == "no compiler"]
        assert stdout == ""
        outcome = stderr.splitlines()[-1]
        assert outcome.startswith("kernels: not built: ")
        assert outcome.endswith("portable path.") == (not option)


@needs_a_compiler
def test_two_builds_at_once_both_succeed_and_leave_one_library(tmp_path, kernels):
    builds = [python(tmp_path, "-m", "model.kernels.build", "--require") for _ in range(2)]

    outputs = [build.communicate() for build in builds]

    assert [build.returncode for build in builds] == [0, 0], outputs
    assert all(stdout.startswith("kernels: ") for stdout, _ in outputs)
    assert built(kernels) == [library_file(kernels)]
    assert python(tmp_path, "-m", "model.kernels.build").communicate() == (
        f"kernels: up to date ({library_file(kernels).name})\n",
        "",
    )


def test_the_check_of_a_library_needs_no_package(kernels):
    check = python(kernels, "-I", str(kernels / "exports.py"), "/nowhere.so")
    _, stderr = check.communicate()

    assert check.returncode == 1
    assert "/nowhere.so" in stderr
    assert "Traceback" not in stderr
