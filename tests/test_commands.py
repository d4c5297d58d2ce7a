"""gemma-service presets, fetch and export: real processes, and a hub on loopback."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest

from model.adapter_exchange.files import open_adapter
from model.adapter_exchange.merged import merged_arrays
from model.presets.resolve import PRESET_NAMES, TINY, open_reader
from service.exit_status import ExitStatus
from tests import goldens
from tests.adapters import change_of
from tests.fakes.loopback_hubs import LoopbackHubs, Model
from tests.lora_files import lora_file
from tests.service_process import REPOSITORY, eventually, has_ended

ON_HUB = goldens.directory("gemma2_tiny") / "preset_sharded"
GEMMA3 = str(goldens.preset_directory("gemma3_tiny"))
CONFIG = goldens.backbone("gemma3_tiny").config
SHARD = "model_00001.weights.h5"
ON_HUGGING_FACE = goldens.directory("gemma2_tiny") / "hf"
FOREIGN = ("GEMMA_", "HF_", "HUGGING", "KAGGLE", "XDG_")
# Nobody listens there.
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def environment(tmp_path):
    """Of a person with an empty home, without anybody's tokens or settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN) and not name.lower().endswith("_proxy")
    }
    (tmp_path / "home").mkdir()
    return {
        **kept,
        "HOME": str(tmp_path / "home"),
        "GEMMA_CACHE_DIR": str(tmp_path / "cache"),
        **leading_to(NOWHERE),
    }


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def hub(environment):
    """Serves one preset under every name to processes with this environment."""
    with LoopbackHubs(Model.of(ON_HUB)) as server:
        environment |= leading_to(server.address)
        yield server


def leading_to(address):
    """Variables by which both libraries find a hub there."""
    return {
        "HF_ENDPOINT": address,
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "http_proxy": address,
        "no_proxy": "127.0.0.1",
    }


def run(environment, *words):
    return subprocess.run(
        [sys.executable, "-m", "service", *words],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def succeed(environment, *words):
    process = run(environment, *words)
    assert process.returncode == 0, process.stderr
    return process


def listed(environment):
    """What ``presets --json`` says, by name."""
    lines = succeed(environment, "presets", "--json").stdout.splitlines()
    return {facts["name"]: facts for facts in map(json.loads, lines)}


def phases(process):
    """Phase -> the last progress in it, out of the JSON lines on standard error."""
    lines = [json.loads(line) for line in process.stderr.splitlines()]
    return {line["phase"]: line for line in lines if line.get("event") == "progress"}


def num_bytes(directory):
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


# --- presets ----------------------------------------------------------------------------------


def test_the_table_has_every_name_and_sizes_that_a_person_can_read(environment):
    process = succeed(environment, "presets")
    header, *lines = process.stdout.split("\n\n")[0].splitlines()
    assert re.split(r"\s\s+", header) == [
        *("name", "parameters", "download", "float32", "bfloat16", "KV cache", "instruct"),
        "cached",
    ]
    rows = {cells[0]: cells[1:] for cells in (re.split(r"\s\s+", line) for line in lines)}
    assert tuple(rows) == PRESET_NAMES
    assert len(rows) == 34
    # 2,506,172,416 parameters, times 2 and 4 bytes.
    assert rows["gemma_2b_en"] == [
        *("2.51 B", "5.01 GB", "10.02 GB", "5.01 GB", "150.99 MB", "no", "no"),
    ]
    # 268,098,176 parameters.
    assert rows["gemma3_instruct_270m"] == [
        *("268.10 M", "536.20 MB", "1.07 GB", "536.20 MB", "48.76 MB", "yes", "no"),
    ]
    # 103,552 parameters; seven layers, of which one is global, with 4,096 and 512 positions.
    assert rows[TINY][:4] == ["103.55 K", "none", "414.21 KB", "207.10 KB"]
    assert rows[TINY][5:] == ["no", "yes"]
    assert len({len(line) for line in [header, *lines]}) == 1
    assert process.stderr == ""


def test_json_has_the_same_in_bytes_and_follows_the_setting_of_the_context(environment):
    presets = listed(environment | {"GEMMA_CONTEXT_TOKENS": "2048"})
    assert tuple(presets) == PRESET_NAMES
    assert presets["gemma_2b_en"] == {
        "name": "gemma_2b_en",
        "source": "kaggle://keras/gemma/keras/gemma_2b_en/3",
        "num_parameters": 2_506_172_416,
        "download_bytes": 5_012_344_832,
        "float32_bytes": 10_024_689_664,
        "bfloat16_bytes": 5_012_344_832,
        "context_tokens": 2048,
        # 18 layers with a head of 256, keys and values.
        "kv_cache_bytes_per_slot": 2 * 18 * 256 * 2048 * 4,
        "is_instruct": False,
        "is_cached": False,
        "cached_bytes": None,
    }
    # It was trained for 1,024 tokens, and has 26 layers with 4 heads.
    vault = presets["vault_gemma_1b_en"]
    assert vault["context_tokens"] == 1024
    assert vault["kv_cache_bytes_per_slot"] == 2 * 26 * 4 * 256 * 1024 * 4
    # pip has brought both.
    for name in (TINY, "gemma3_270m"):
        assert (presets[name]["source"], presets[name]["is_cached"]) == ("package", True)


def test_a_terminal_gets_whole_names_and_styles_however_narrow_it_is(environment):
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "service", "presets"],
        cwd=REPOSITORY,
        env=environment | {"TERM": "xterm", "COLUMNS": "40"},
        stdout=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        # The end of a terminal is an error.
        try:
            while piece := os.read(ours, 1 << 16):
                shown += piece
        except OSError:
            os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    assert all(name in text for name in PRESET_NAMES)
    assert "\x1b[2mgemma_2b_en " in text, "what is not here is dim"


def test_the_process_that_lists_or_converts_loads_no_jax():
    program = "import service.worker.commands, sys; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    modules = set(loaded.stdout.split())
    assert "model.presets.resolve" in modules
    assert modules & {"jax", "jaxlib", "keras"} == set()


# --- fetch ------------------------------------------------------------------------------------


def test_a_preset_is_fetched_once_and_is_then_here(environment, hub, cache):
    first = succeed(environment, "fetch", "gemma2_2b_en")
    shown = re.fullmatch(
        r"gemma2_2b_en is here now, ready to be served\n"
        r"files      ([\d,]+) bytes in (.*)\n"
        r"converted  ([\d,]+) bytes in (.*)\n",
        first.stdout,
    )
    files, directory, converted, converted_directory = shown.groups()
    assert directory == str(cache / "downloads/kaggle/keras/gemma2/keras/gemma2_2b_en/2")
    assert Path(converted_directory).parent == cache / "presets"
    assert int(converted.replace(",", "")) == num_bytes(converted_directory)
    assert 0 < int(files.replace(",", "")) <= num_bytes(directory)
    assert set(phases(first)) == {"download", "convert"}
    assert all(line["done"] == line["total"] > 0 for line in phases(first).values())

    # The name has a version in its handle: nobody is asked for it again.
    hub.requests.clear()
    second = succeed(environment, "fetch", "gemma2_2b_en")
    assert hub.requests == []
    assert second.stdout == first.stdout.replace("is here now", "was here already")
    assert second.stderr == ""

    facts = listed(environment)["gemma2_2b_en"]
    assert facts["is_cached"]
    assert facts["cached_bytes"] == num_bytes(ON_HUB)


def test_what_the_worker_logs_is_passed_on_and_a_damaged_entry_is_made_again(environment, cache):
    succeed(environment, "fetch", TINY)
    (weights,) = cache.glob("presets/*/*.safetensors")
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1])
    again = succeed(environment | {"GEMMA_SLOT": "3"}, "fetch", TINY)
    assert "tiny is here now" in again.stdout
    logged = [json.loads(line) for line in again.stderr.splitlines() if '"logger"' in line]
    assert [line["logger"] for line in logged] == ["__main__", "model.presets.converted"]
    assert "GEMMA_SLOT is not a setting" in logged[0]["message"]
    assert "thrown away and made again" in logged[1]["message"]


@pytest.mark.parametrize(
    ("signal_number", "is_for_worker", "status"),
    [
        (signal.SIGINT, False, ExitStatus.INTERRUPTED),
        (signal.SIGTERM, False, ExitStatus.TERMINATED),
        (signal.SIGKILL, False, -signal.SIGKILL),
        (signal.SIGKILL, True, ExitStatus.BUG),
    ],
)
def test_a_fetch_that_is_stopped_leaves_no_process_and_goes_on_where_it_was(
    environment, hub, cache, tmp_path, signal_number, is_for_worker, status
):
    # Beyond the mebibyte that kagglehub writes at once; trailing bytes are nothing to HDF5.
    hub.model.files[SHARD] += bytes(2 << 20)
    hub.model.stalls[SHARD] = 1_500_000
    words = [sys.executable, "-m", "service", "fetch", "gemma2_2b_en"]
    with (tmp_path / "stderr").open("w+") as stderr:
        process = subprocess.Popen(
            words, cwd=REPOSITORY, env=environment, stderr=stderr, start_new_session=True
        )

        def has_begun():
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            return max((part.stat().st_size for part in cache.rglob("*part")), default=0) >= 1 << 20

        assert eventually(has_begun, 30)
        (worker,) = psutil.Process(process.pid).children()
        family = [worker, *worker.children(recursive=True)]
        assert len(family) == 2, "the one that talks to the hub, too"
        if is_for_worker:
            worker.send_signal(signal_number)
        else:
            # As a terminal does it.
            os.killpg(process.pid, signal_number)
        assert process.wait(15) == status
        assert eventually(lambda: all(map(has_ended, family)))
    hub.model.resumed.set()
    said = [
        line for line in (tmp_path / "stderr").read_text().splitlines() if '"event"' not in line
    ]
    death = "gemma-service: fetch failed: its process ended with SIGKILL (out of memory?)."
    assert said == ([death] if is_for_worker else [])

    if signal_number is signal.SIGINT:
        hub.requests.clear()
        succeed(environment, "fetch", "gemma2_2b_en")
        assert "bytes=1048576-" in {r.range for r in hub.requests if r.file == SHARD}


# --- export -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "dtype", "rounded"),
    [("keras", "float32", np.float32), ("hugging-face", "bfloat16", ml_dtypes.bfloat16)],
)
def test_an_exported_preset_is_the_same_preset(environment, tmp_path, form, dtype, rounded):
    target = tmp_path / "new" / "preset"
    words = ["export", TINY, str(target), "--format", form, "--dtype", dtype]
    process = succeed(environment, *words)
    files = [path for path in target.rglob("*") if path.is_file()]
    assert process.stdout == f"{target}: {len(files)} files, {num_bytes(target):,} bytes\n"
    assert phases(process)["write"]["done"] == 103_552 * 4
    original, exported = open_reader(TINY, tmp_path), open_reader(str(target), tmp_path)
    assert exported.config == original.config
    assert exported.tokenizer_proto() == original.tokenizer_proto()
    arrays = dict(exported.arrays())
    for name, array in original.arrays():
        np.testing.assert_array_equal(arrays.pop(name), array.astype(rounded).astype(np.float32))
    assert arrays == {}
    if form == "keras":
        # How texts are packed is part of a Keras preset: 24 tokens in this one.
        packing = json.loads((target / "preprocessor.json").read_text())
        assert packing["config"]["sequence_length"] == 24


def test_an_exported_adapter_and_its_merged_preset_are_what_it_adds(environment, tmp_path):
    path = lora_file(tmp_path, "tone")
    adapter = open_adapter(path, CONFIG)
    for source, target in ((path, "peft"), (tmp_path / "peft", "again.lora.h5")):
        words = ["export", GEMMA3, str(tmp_path / target), f"--adapter=tone={source}"]
        succeed(environment, *words, f"--format={'keras' if target != 'peft' else 'peft'}")
        written = open_adapter(tmp_path / target, CONFIG)
        assert written.form.targets == adapter.form.targets
        for place in adapter.pairs:
            np.testing.assert_allclose(
                change_of(CONFIG, written, place), change_of(CONFIG, adapter, place), atol=1e-12
            )
    preset = open_reader(GEMMA3, tmp_path)
    expected = dict(merged_arrays(preset.arrays(), adapter))
    for form in ("keras", "hugging-face"):
        target = tmp_path / form
        words = ["export", GEMMA3, str(target), f"--adapter={path}", "--merged"]
        process = succeed(environment, *words, f"--format={form}")
        assert process.stdout.startswith(f"{target}: ")
        for name, array in open_reader(str(target), tmp_path).arrays():
            np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize(
    ("words", "status", "pattern"),
    [
        (["x", "--format=peft"], ExitStatus.USAGE, "need an --adapter"),
        (["x", "--format=keras", "--merged"], ExitStatus.USAGE, "need an --adapter"),
        (["x", "--format=peft", "--adapter=a", "--merged"], ExitStatus.USAGE, "not merged"),
        (["x", "--format=hugging-face", "--adapter=a"], ExitStatus.USAGE, "add --merged"),
        (["x", "--format=keras", "--adapter=a"], ExitStatus.USAGE, r"ends in \.lora\.h5"),
        (["x", "--format=peft", "--adapter=/none"], ExitStatus.BAD_PRESET, "/none is missing"),
    ],
)
def test_an_export_of_an_adapter_that_cannot_be_is_one_line(
    environment, tmp_path, words, status, pattern
):
    target, *options = words
    process = run(environment, "export", TINY, str(tmp_path / target), *options)
    assert_refused(process, status, pattern)


def test_an_export_that_is_interrupted_amid_a_large_array_leaves_nothing(
    environment, tmp_path, cache_dir
):
    folder = tmp_path / "exports"
    words = ["export", "gemma3_270m", str(folder / "preset"), "--format=keras"]
    with subprocess.Popen(
        [sys.executable, "-m", "service", *words, f"--cache-dir={cache_dir}"],
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        # 671 MB of it are embeddings.
        assert eventually(lambda: any(folder.glob(".preset-*/model*.h5")), 120)
        os.killpg(process.pid, signal.SIGINT)
        said = [line for line in process.stderr if not line.startswith('{"event"')]
    assert (process.returncode, said) == (ExitStatus.INTERRUPTED, [])
    assert list(folder.iterdir()) == []


# --- errors -----------------------------------------------------------------------------------


def assert_refused(process, status, pattern):
    """One line for a person, no traceback, and nothing that a program could take for a result."""
    lines = [line for line in process.stderr.splitlines() if not line.startswith('{"event"')]
    assert (process.returncode, len(lines)) == (status, 1), process.stderr
    assert re.match(rf"gemma-service: .*{pattern}", lines[0]), lines[0]
    assert process.stdout == ""


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["fetch"], "fetch: the following arguments are required: NAME; try gemma-service fetch"),
        (["fetch", ""], "NAME: String should have at least 1 character"),
        (["export", "tiny", "x"], "--format: Field required"),
        (
            ["export", "tiny", "x", "--format", "onnx"],
            "--format: .*'keras', 'hugging-face' or 'peft'",
        ),
    ],
)
def test_a_command_that_is_not_understood_says_what_it_lacks(environment, words, pattern):
    # A variable is no argument.
    process = run(environment | {"GEMMA_NAME": TINY, "GEMMA_FORMAT": "keras"}, *words)
    lines = [line for line in process.stderr.splitlines() if '"logger"' not in line]
    process.stderr = "\n".join(lines)
    assert_refused(process, ExitStatus.USAGE, pattern)


def test_a_preset_that_is_not_to_be_had_is_refused_in_one_line(environment):
    refusals = [
        ("gema3_1b", ExitStatus.BAD_PRESET, "no preset 'gema3_1b'. Did you mean gemma3_1b"),
        ("kaggle://gemma", ExitStatus.BAD_PRESET, "'kaggle://gemma' is not a handle"),
        ("hf://google/gemma-2-2b", ExitStatus.UNAVAILABLE, "cannot be reached"),
    ]
    for name, status, pattern in refusals:
        assert_refused(run(environment, "fetch", name), status, pattern)


def test_a_place_where_nothing_can_be_written_is_refused(environment, tmp_path):
    file = tmp_path / "file"
    file.touch()
    elsewhere = environment | {"GEMMA_CACHE_DIR": str(file / "cache")}
    for process, pattern in [
        (run(elsewhere, "fetch", TINY), r"cannot use .*file/cache"),
        # Before anything is downloaded: no hub can be reached here.
        (run(environment, "export", "gemma_2b_en", str(file), "--format=keras"), "exists already"),
        (run(environment, "export", TINY, str(file / "x"), "--format=keras"), "cannot be written"),
    ]:
        assert_refused(process, ExitStatus.CANNOT_CREATE, pattern)
    assert file.read_bytes() == b""


def test_a_backbone_alone_is_not_exported_to_a_format_that_needs_a_tokenizer(environment, tmp_path):
    source = tmp_path / "backbone"
    source.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        (source / name).write_bytes((ON_HUGGING_FACE / name).read_bytes())
    for path in ON_HUGGING_FACE.glob("*.safetensors"):
        (source / path.name).write_bytes(path.read_bytes())
    target = tmp_path / "target"
    process = run(environment, "export", str(source), str(target), "--format", "hugging-face")
    assert_refused(process, ExitStatus.BAD_PRESET, "has no tokenizer, which a Hugging Face")
    assert not target.exists()


def test_the_page_of_the_commands_lists_every_exit_status():
    page = (REPOSITORY / "docs" / "commands.md").read_text()
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == list(
        ExitStatus
    )
