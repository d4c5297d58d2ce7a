"""Downloads from Kaggle and Hugging Face, from real servers on loopback into real directories."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from model.errors import (
    PresetDownloadFailed,
    PresetFileInvalid,
    PresetFileMissing,
    PresetNotFound,
    UnsupportedPreset,
)
from model.presets import hubs
from model.presets.hf_directory import HuggingFacePreset
from model.presets.hub_handles import HuggingFaceHandle, KaggleHandle, parse_handle
from model.presets.keras_directory import KerasPreset
from model.presets.resolve import open_reader
from tests.fakes.loopback_hubs import COMMIT, STORAGE, LoopbackHubs, Model
from tests.goldens import directory

ON_KAGGLE = "kaggle://keras/gemma2/keras/gemma2_2b_en/3"
ON_KAGGLE_NEWEST = "kaggle://keras/gemma2/keras/gemma2_2b_en"
ON_HUGGING_FACE = "hf://google/gemma-2-2b"
HANDLES = [ON_KAGGLE, ON_HUGGING_FACE]
FETCH = (
    "import pathlib, sys; from model.presets import hubs;"
    "print(hubs.fetch(sys.argv[1], pathlib.Path(sys.argv[2])))"
)
SECRET = "s3cr3t-t0k3n"

GEMMA1_KERAS = directory("gemma1_tiny") / "preset"
GEMMA2_KERAS = directory("gemma2_tiny") / "preset_sharded"
GEMMA2_HF = directory("gemma2_tiny") / "hf"


def golden_of(handle):
    """The sharded golden preset that each hub serves, and a shard of it."""
    if handle.startswith("hf://"):
        return GEMMA2_HF, "model-00001-of-00002.safetensors"
    return GEMMA2_KERAS, "model_00001.weights.h5"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty one, without anybody's tokens or settings."""
    for name in list(os.environ):
        if name.startswith(("HF_", "KAGGLE", "HUGGING", "XDG_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def cache(tmp_path, home):
    return tmp_path / "cache"


@pytest.fixture
def served(home, monkeypatch):
    """Starts a hub with the files of a directory, and leads both libraries to it."""
    running = []

    def serve(model):
        server = LoopbackHubs(model).__enter__()
        running.append(server)
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
        # Of this variable only kagglehub's addresses fall under it.
        monkeypatch.setenv("http_proxy", server.address)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        return server

    yield serve
    for server in running:
        server.close()


def assert_same_preset(found, expected):
    for (name, array), (other_name, other) in zip(found.arrays(), expected.arrays(), strict=True):
        assert name == other_name
        np.testing.assert_array_equal(array, other, err_msg=name)
    assert found.tokenizer_proto() == expected.tokenizer_proto()


def below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


# --- what arrives --------------------------------------------------------------------------------


@pytest.mark.parametrize("handle", HANDLES)
def test_a_downloaded_preset_is_the_one_that_the_hub_has_and_nothing_else(handle, served, cache):
    source, _ = golden_of(handle)
    model = Model.of(source)
    model.files |= {"pytorch_model.bin": b"pickle", "README.md": b"#", "evil.py": b"import os"}
    server = served(model)
    reader = open_reader(handle, cache)
    assert_same_preset(reader, open_reader(str(source), cache))
    downloaded = reader.source_files[0].parent
    assert all(path.lstat().st_mode & 0o170000 == 0o100000 for path in reader.source_files)
    for name in below(source):
        assert (downloaded / name).read_bytes() == (source / name).read_bytes()
    assert sorted(set(server.files_asked_for)) == below(source)
    assert hubs.cached_bytes(handle, cache) == sum(p.stat().st_size for p in source.rglob("*.*"))


def test_one_weights_file_is_as_good_as_shards(served, cache):
    served(Model.of(GEMMA1_KERAS))
    assert_same_preset(open_reader(ON_KAGGLE, cache), KerasPreset.open(GEMMA1_KERAS))


def test_a_hugging_face_repository_may_hold_a_keras_preset(served, cache):
    served(Model.of(GEMMA2_KERAS))
    assert_same_preset(open_reader("hf://keras/gemma2", cache), KerasPreset.open(GEMMA2_KERAS))


def test_a_kaggle_model_may_hold_a_hugging_face_directory(served, cache):
    served(Model.of(GEMMA2_HF))
    handle = "kaggle://google/gemma-2/transformers/gemma-2-2b/1"
    assert_same_preset(open_reader(handle, cache), HuggingFacePreset.open(GEMMA2_HF))


@pytest.mark.parametrize("handle", HANDLES)
def test_progress_grows_to_the_bytes_of_all_files(handle, served, cache):
    source, _ = golden_of(handle)
    served(Model.of(source))
    calls = []
    hubs.fetch(handle, cache, lambda *call: calls.append(call))
    # Config and index come before it is known what else is needed.
    early = {"config.json", "model.weights.json", "model.safetensors.index.json"}
    total = sum((source / name).stat().st_size for name in below(source) if name not in early)
    assert {(phase, whole) for phase, _, whole in calls} == {("download", float(total))}
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] == total


@pytest.mark.parametrize("handle", HANDLES)
def test_nothing_is_written_at_home_and_nothing_is_printed(handle, served, cache, home, capfd):
    served(Model.of(golden_of(handle)[0]))
    hubs.fetch(handle, cache)
    assert below(home) == []
    assert capfd.readouterr() == ("", "")


# --- credentials ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handle", "variables", "expected"),
    [
        (ON_KAGGLE, {"KAGGLE_API_TOKEN": SECRET}, f"Bearer {SECRET}"),
        # base64 of "me:key".
        (ON_KAGGLE, {"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "key"}, "Basic bWU6a2V5"),
        (ON_HUGGING_FACE, {"HF_TOKEN": SECRET}, f"Bearer {SECRET}"),
    ],
)
def test_credentials_of_the_environment_reach_the_hub_and_no_other_host(
    handle, variables, expected, served, cache, monkeypatch
):
    server = served(Model.of(golden_of(handle)[0]))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hubs.fetch(handle, cache)
    elsewhere = [r for r in server.requests if STORAGE in r.path or "/cdn/" in r.path]
    assert len(elsewhere) >= 3
    assert {r.authorization for r in elsewhere} == {None}
    assert {r.authorization for r in server.requests if r not in elsewhere} == {expected}


@pytest.mark.parametrize(
    ("handle", "file", "text"),
    [
        (ON_KAGGLE, ".kaggle/access_token", SECRET),
        (ON_HUGGING_FACE, ".cache/huggingface/token", SECRET),
    ],
)
def test_the_token_files_of_both_libraries_are_found(handle, file, text, served, cache, home):
    server = served(Model.of(golden_of(handle)[0]))
    (home / file).parent.mkdir(parents=True)
    (home / file).write_text(text)
    hubs.fetch(handle, cache)
    assert server.requests[0].authorization == f"Bearer {SECRET}"


def test_a_login_in_this_process_reaches_the_hub(served, cache):
    from kagglehub import config

    server = served(Model.of(GEMMA2_KERAS))
    config.set_kaggle_api_token(SECRET)
    try:
        hubs.fetch(ON_KAGGLE, cache)
    finally:
        config.clear_kaggle_credentials()
    assert server.requests[0].authorization == f"Bearer {SECRET}"


def test_credentials_that_cannot_be_read_are_named_and_not_quoted(served, cache, home):
    server = served(Model.of(GEMMA2_KERAS))
    (home / ".kaggle").mkdir()
    (home / ".kaggle" / "kaggle.json").write_text(f'{{"username": "me", "key": "{SECRET}"')
    with pytest.raises(PresetDownloadFailed, match=r"Kaggle cannot be read.*kaggle.json") as caught:
        hubs.fetch(ON_KAGGLE, cache)
    assert SECRET not in str(caught.value)
    assert server.requests == []


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("handle", "page", "variable", "error_code"),
    [
        (ON_KAGGLE, "https://www.kaggle.com/models/keras/gemma2", "KAGGLE_API_TOKEN", None),
        (ON_HUGGING_FACE, "https://huggingface.co/google/gemma-2-2b", "HF_TOKEN", "GatedRepo"),
    ],
)
def test_a_refusal_says_where_the_terms_are_and_how_to_log_in(
    handle, page, variable, error_code, status, served, cache, monkeypatch, caplog
):
    model = Model.of(golden_of(handle)[0])
    model.status, model.error_code = status, error_code
    served(model)
    monkeypatch.setenv(variable, SECRET)
    with pytest.raises(PresetDownloadFailed, match=f"HTTP {status}") as caught:
        hubs.fetch(handle, cache)
    message = str(caught.value)
    assert page in message
    assert variable in message
    assert "\n" not in message
    assert SECRET not in message + caplog.text


# --- what is not there ---------------------------------------------------------------------------


@pytest.mark.parametrize("handle", HANDLES)
def test_what_the_hub_does_not_know_is_not_found(handle, served, cache):
    model = Model({})
    model.status, model.error_code = 404, "RepoNotFound"
    served(model)
    with pytest.raises(PresetNotFound, match=f"has no {handle} "):
        hubs.fetch(handle, cache)


@pytest.mark.parametrize(
    ("handle", "what"),
    [(ON_KAGGLE, what) for what in ("tokenizer", "shard", "index", "config")]
    + [(ON_HUGGING_FACE, what) for what in ("shard", "config")],
)
def test_a_file_that_is_missing_on_the_hub_is_named(handle, what, served, cache):
    source, shard = golden_of(handle)
    names = {
        "tokenizer": ["tokenizer.model", "assets/tokenizer/vocabulary.spm"],
        "shard": [shard],
        "index": ["model.weights.json", "model.safetensors.index.json"],
        "config": ["config.json"],
    }[what]
    model = Model.of(source)
    model.files = {name: data for name, data in model.files.items() if name not in names}
    served(model)
    (missing,) = set(below(source)) & set(names)
    with pytest.raises((PresetFileMissing, PresetNotFound), match=f"has n.*{missing}"):
        hubs.fetch(handle, cache)
    assert not hubs.is_cached(handle, cache)


def test_a_framework_that_kaggle_does_not_have_is_not_found(served, cache):
    server = served(Model.of(GEMMA2_KERAS))
    with pytest.raises(PresetNotFound, match="no framework is called kerras"):
        hubs.fetch("kaggle://keras/gemma2/kerras/gemma2_2b_en", cache)
    assert server.requests == []


# --- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("handle", HANDLES)
def test_a_hub_that_is_not_there_is_named(handle, served, cache):
    served(Model({})).close()
    host = "127.0.0.1" if handle.startswith("hf://") else "localhost"
    with pytest.raises(PresetDownloadFailed, match=rf"cannot be reached \({host}\).*its path"):
        hubs.fetch(handle, cache)


def test_offline_by_setting_says_which_setting(served, cache, monkeypatch):
    server = served(Model.of(GEMMA2_HF))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PresetDownloadFailed, match="HF_HUB_OFFLINE"):
        hubs.fetch(ON_HUGGING_FACE, cache)
    assert server.requests == []


@pytest.mark.parametrize("handle", [ON_KAGGLE, f"{ON_HUGGING_FACE}@{COMMIT}"])
def test_a_version_that_is_here_is_served_without_a_question(handle, served, cache):
    server = served(Model.of(golden_of(handle)[0]))
    first = hubs.fetch(handle, cache)
    server.requests.clear()
    assert hubs.fetch(handle, cache) == first
    assert server.requests == []


@pytest.mark.parametrize("handle", [ON_KAGGLE_NEWEST, ON_HUGGING_FACE])
def test_the_newest_version_that_is_here_costs_one_question(handle, served, cache):
    server = served(Model.of(golden_of(handle)[0]))
    first = hubs.fetch(handle, cache)
    server.requests.clear()
    assert hubs.fetch(handle, cache) == first
    (request,) = server.requests
    assert request.method == "HEAD" or request.path.endswith("/GetModelInstance")


@pytest.mark.parametrize("handle", [ON_KAGGLE_NEWEST, ON_HUGGING_FACE])
def test_without_the_hub_a_complete_copy_is_used_and_the_log_says_so(handle, served, cache, caplog):
    model = Model.of(golden_of(handle)[0])
    server = served(model)
    first = hubs.fetch(handle, cache)
    model.status = 503
    assert hubs.fetch(handle, cache) == first
    assert f"(HTTP 503); the complete copy in {first} is used" in caplog.text
    caplog.clear()
    server.close()
    assert hubs.fetch(handle, cache) == first
    assert f"; the complete copy in {first} is used" in caplog.text


@pytest.mark.parametrize("handle", [ON_KAGGLE_NEWEST, ON_HUGGING_FACE])
def test_without_the_hub_an_incomplete_copy_is_not_used(handle, served, cache):
    source, shard = golden_of(handle)
    server = served(Model.of(source))
    first = hubs.fetch(handle, cache)
    server.close()
    whole = (first / shard).read_bytes()
    (first / shard).unlink()
    assert not hubs.is_cached(handle, cache)
    (first / shard).write_bytes(whole[:-1])
    assert not hubs.is_cached(handle, cache)
    with pytest.raises(PresetDownloadFailed, match="cannot be reached"):
        hubs.fetch(handle, cache)
    (first / shard).write_bytes(whole)
    assert hubs.is_cached(handle, cache)
    for marker in ("", "{", "[]", '{"revision": 1}', '{"revision": "3", "files": [1]}'):
        (first / ".complete.json").write_text(marker)
        assert hubs.cached_bytes(handle, cache) is None


def test_a_refusal_is_not_covered_up_by_an_old_copy(served, cache):
    model = Model.of(GEMMA2_HF)
    served(model)
    hubs.fetch(ON_HUGGING_FACE, cache)
    model.status = 403
    with pytest.raises(PresetDownloadFailed, match="HTTP 403"):
        hubs.fetch(ON_HUGGING_FACE, cache)


def test_a_branch_that_moved_is_followed_and_files_that_stayed_are_kept(served, cache):
    model = Model.of(GEMMA2_HF)
    server = served(model)
    hubs.fetch(ON_HUGGING_FACE, cache)
    server.requests.clear()
    model.commit = "f" * 40
    model.files["config.json"] = model.files["config.json"].replace(b"{", b"{\n", 1)
    found = hubs.fetch(ON_HUGGING_FACE, cache)
    assert (found / "config.json").read_bytes() == model.files["config.json"]
    assert server.files_asked_for == ["config.json"]


def test_shards_of_an_older_commit_do_not_hide_the_one_file_of_the_newer(served, cache):
    gemma1 = directory("gemma1_tiny") / "hf"
    model = Model.of(gemma1)
    served(model)
    hubs.fetch(ON_HUGGING_FACE, cache)
    model.commit, model.files = "f" * 40, Model.of(GEMMA2_HF).files
    assert_same_preset(open_reader(ON_HUGGING_FACE, cache), HuggingFacePreset.open(GEMMA2_HF))


def test_a_newer_version_on_kaggle_is_another_directory(served, cache):
    model = Model.of(GEMMA2_KERAS)
    server = served(model)
    third = hubs.fetch(ON_KAGGLE_NEWEST, cache)
    assert hubs.fetch(ON_KAGGLE, cache) == third
    model.version = 12
    twelfth = hubs.fetch(ON_KAGGLE_NEWEST, cache)
    assert (third.name, twelfth.name) == ("3", "12")
    server.close()
    # The newest by number; "12" sorts before "3" as text.
    assert hubs.cached_directory(ON_KAGGLE_NEWEST, cache) == twelfth


# --- transfers that go wrong ---------------------------------------------------------------------


# What the libraries have written when a transfer of so many bytes breaks off: they write by 1 and
# by 10 MiB.
BREAKS = [(ON_KAGGLE, 2_500_000, 2 << 20), (ON_HUGGING_FACE, 11_000_000, 10 << 20)]


def large_shard(model, shard):
    """So large that it is written in pieces. Nothing opens it."""
    model.files[shard] = bytes(range(256)) * (12 << 12)


@pytest.mark.parametrize(("handle", "num_sent", "num_kept"), BREAKS)
def test_a_transfer_that_breaks_off_goes_on_with_the_rest_only(
    handle, num_sent, num_kept, served, cache
):
    source, shard = golden_of(handle)
    model = Model.of(source)
    large_shard(model, shard)
    model.cuts[shard] = [num_sent]
    server = served(model)
    found = hubs.fetch(handle, cache)
    assert (found / shard).read_bytes() == model.files[shard]
    assert ranges_of(server, shard) == {None, f"bytes={num_kept}-"}


@pytest.mark.parametrize(("handle", "num_sent", "num_kept"), BREAKS)
def test_a_transfer_that_was_killed_goes_on_in_the_next_process(
    handle, num_sent, num_kept, served, cache
):
    source, shard = golden_of(handle)
    model = Model.of(source)
    large_shard(model, shard)
    model.stalls[shard] = num_sent
    server = served(model)
    process = subprocess.Popen([sys.executable, "-c", FETCH, handle, str(cache)])
    while max((p.stat().st_size for p in cache.rglob(f".{shard}.*part")), default=0) < num_kept:
        assert process.poll() is None
        time.sleep(0.02)
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Its child does not live on.
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()
    model.resumed.set()
    assert not hubs.is_cached(handle, cache)
    server.requests.clear()
    found = hubs.fetch(handle, cache)
    assert (found / shard).read_bytes() == model.files[shard]
    assert f"bytes={num_kept}-" in ranges_of(server, shard)
    # What had arrived whole was not asked for again.
    assert "config.json" not in server.files_asked_for


def part_of(handle, shard, model, cache):
    """Where an earlier attempt would have left a shard."""
    is_hf = handle.startswith("hf://")
    folder = cache / "downloads" / parse_handle(handle).folder / ("main" if is_hf else "3")
    folder.mkdir(parents=True)
    tag = hashlib.sha256(model.files[shard]).hexdigest()[:16] + "." if is_hf else ""
    return folder / f".{shard}.{tag}part"


def ranges_of(server, shard):
    """Of the requests that were answered with bytes of the shard."""
    elsewhere = [r for r in server.requests if r.file == shard and "resolve" not in r.path]
    return {r.range for r in elsewhere}


@pytest.mark.parametrize("handle", HANDLES)
def test_a_transfer_that_breaks_off_without_a_byte_is_tried_again(handle, served, cache):
    source, shard = golden_of(handle)
    model = Model.of(source)
    model.cuts[shard] = [1000, 0]
    served(model)
    assert_same_preset(open_reader(handle, cache), open_reader(str(source), cache))


@pytest.mark.parametrize("handle", HANDLES)
def test_a_wrong_byte_is_noticed_and_the_file_fetched_again(handle, served, cache, caplog):
    source, shard = golden_of(handle)
    model = Model.of(source)
    model.wrong_bytes[shard] = 1
    served(model)
    found = hubs.fetch(handle, cache)
    assert (found / shard).read_bytes() == model.files[shard]
    assert f"{shard} of {handle} is damaged" in caplog.text


@pytest.mark.parametrize("handle", HANDLES)
def test_a_file_that_is_wrong_twice_is_an_error_and_leaves_nothing_behind(handle, served, cache):
    source, shard = golden_of(handle)
    model = Model.of(source)
    model.wrong_bytes[shard] = 2
    served(model)
    with pytest.raises(PresetDownloadFailed, match=f"{shard} of {handle} arrived damaged twice"):
        hubs.fetch(handle, cache)
    assert not [name for name in below(cache) if shard in name]
    assert not hubs.is_cached(handle, cache)


@pytest.mark.parametrize("handle", HANDLES)
def test_a_damaged_beginning_from_an_earlier_attempt_is_not_kept(handle, served, cache):
    source, shard = golden_of(handle)
    model = Model.of(source)
    server = served(model)
    part_of(handle, shard, model, cache).write_bytes(b"x" * 1000)
    found = hubs.fetch(handle, cache)
    assert (found / shard).read_bytes() == model.files[shard]
    # It was continued first, and thrown away when its digest was wrong.
    assert "bytes=1000-" in ranges_of(server, shard)


def test_without_a_digest_the_size_is_still_compared(served, cache):
    source, shard = golden_of(ON_KAGGLE)
    model = Model.of(source)
    model.states_digests = False
    # Continued, it is longer than what the server says now.
    part_of(ON_KAGGLE, shard, model, cache).write_bytes(model.files[shard] + b"x")
    model.described_bytes[shard] = len(model.files[shard]) + 2
    served(model)
    assert (hubs.fetch(ON_KAGGLE, cache) / shard).read_bytes() == model.files[shard]


# --- hostile hubs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handle", "name"), [(ON_KAGGLE, "../../x"), (ON_HUGGING_FACE, "../../x"), (ON_KAGGLE, "/x")]
)
def test_no_name_in_an_index_is_asked_for_or_made_before_it_is_checked(
    handle, name, served, cache, tmp_path
):
    source, shard = golden_of(handle)
    suffix = ".safetensors" if handle.startswith("hf://") else ".weights.h5"
    index = "model.safetensors.index.json" if handle.startswith("hf://") else "model.weights.json"
    model = Model.of(source)
    model.files[index] = model.files[index].replace(shard.encode(), (name + suffix).encode())
    server = served(model)
    with pytest.raises(PresetFileInvalid, match="is not the name of a shard"):
        hubs.fetch(handle, cache)
    # The config and the index, and no shard at all.
    assert set(server.files_asked_for) == {"config.json", index}
    assert {path.split("/")[0] for path in below(tmp_path)} == {"cache"}
    assert not [path for path in below(cache) if path.endswith(suffix)]


@pytest.mark.parametrize("handle", HANDLES)
def test_a_config_of_50_megabytes_is_refused_before_it_is_sent(handle, served, cache):
    model = Model.of(golden_of(handle)[0])
    model.files["config.json"] += b" " * 50_000_000
    server = served(model)
    with pytest.raises(PresetFileInvalid, match=r"config.json .*at most 1,048,576 are read"):
        hubs.fetch(handle, cache)
    assert server.files_asked_for == []


def test_a_config_that_is_larger_than_described_is_not_kept(served, cache):
    model = Model.of(GEMMA2_KERAS)
    model.described_bytes["config.json"] = len(model.files["config.json"])
    model.files["config.json"] += b" " * 5_000_000
    served(model)
    with pytest.raises((PresetFileInvalid, PresetDownloadFailed), match=r"1,048,576"):
        hubs.fetch(ON_KAGGLE, cache)
    assert not hubs.is_cached(ON_KAGGLE, cache)


@pytest.mark.parametrize("handle", HANDLES)
def test_a_model_that_is_not_served_is_refused_before_its_weights_are_asked_for(
    handle, served, cache
):
    model = Model.of(golden_of(handle)[0])
    model.files["config.json"] = b'{"model_type": "llama", "architectures": []}'
    server = served(model)
    with pytest.raises(UnsupportedPreset, match="'llama'; only gemma"):
        hubs.fetch(handle, cache)
    assert server.files_asked_for == ["config.json"]


@pytest.mark.parametrize("handle", HANDLES)
def test_what_does_not_fit_on_the_disk_is_not_begun(handle, served, cache):
    source, shard = golden_of(handle)
    model = Model.of(source)
    model.described_bytes[shard] = 10**18
    server = served(model)
    with pytest.raises(PresetDownloadFailed, match=r"needs 1,000,000,000,\d{3},\d{3},\d{3} more"):
        hubs.fetch(handle, cache)
    assert shard not in server.files_asked_for


@pytest.mark.parametrize("handle", HANDLES)
def test_a_disk_that_is_full_amid_a_transfer_says_how_much_is_missing_where(handle, served, cache):
    source, shard = golden_of(handle)
    model = Model.of(source)
    served(model)
    part = part_of(handle, shard, model, cache)
    # A device on which every write finds the disk full.
    part.symlink_to("/dev/full")
    with pytest.raises(PresetDownloadFailed, match=rf"needs [\d,]+ more bytes in {part.parent}, "):
        hubs.fetch(handle, cache)


def test_a_cache_that_cannot_be_written_is_named(served, tmp_path):
    served(Model.of(GEMMA2_HF))
    (tmp_path / "file").touch()
    with pytest.raises(PresetDownloadFailed, match=r"file/downloads: Not a directory"):
        hubs.fetch(ON_HUGGING_FACE, tmp_path / "file")


# --- handles -------------------------------------------------------------------------------------


def test_handles_are_read_part_by_part():
    assert parse_handle(ON_KAGGLE) == KaggleHandle("keras", "gemma2", "keras", "gemma2_2b_en", 3)
    assert parse_handle(ON_KAGGLE_NEWEST).version is None
    assert parse_handle("hf://a/b.c-d_e@v1.0") == HuggingFaceHandle("a", "b.c-d_e", "v1.0")
    assert parse_handle("hf://a/b") == HuggingFaceHandle("a", "b", "main")


@pytest.mark.parametrize("handle", [ON_KAGGLE, ON_KAGGLE_NEWEST, ON_HUGGING_FACE, "hf://a/b@v1"])
def test_a_handle_is_written_as_it_was_read(handle):
    assert str(parse_handle(handle)) == handle


@pytest.mark.parametrize(
    "handle",
    [
        "kaggle://keras/gemma2/keras",
        "kaggle://keras/gemma2/keras/x/3/4",
        "kaggle://keras/gemma2/keras/x/0",
        "kaggle://keras/gemma2/keras/x/-1",
        "kaggle://keras/gemma2/keras/x/latest",
        "kaggle://keras/gemma2/keras/..",
        "kaggle://keras/../keras/x",
        "kaggle:///etc/passwd/x/y",
        "kaggle://keras/gemma2/keras/x?y=z",
        "kaggle://keras/gemma2/keras/x y",
        "kaggle://keras/gemma2/keras/%2e%2e",
        "hf://gemma",
        "hf://a/b/c",
        "hf://a/..",
        "hf://../b",
        "hf://a/b@",
        "hf://a/b@../x",
        "hf://a/b@a..b",
        "hf://a/b@refs/pr/1",
        "hf://a--b/c",
        "hf://a/b\n",
        "hf://user:token@evil.example/x",
    ],
)
def test_anything_else_is_no_handle_and_touches_no_disk(handle, tmp_path):
    with pytest.raises(PresetNotFound, match="is not a handle such as"):
        hubs.fetch(handle, tmp_path / "cache")
    assert below(tmp_path) == []


@pytest.mark.parametrize("handle", ["gs://bucket/x", "modelscope://a/b", "https://a.example/b"])
def test_other_schemes_are_refused_with_what_is_read(handle, tmp_path):
    with pytest.raises(PresetNotFound, match=r"presets come from kaggle://, hf:// and local"):
        open_reader(handle, tmp_path)


def test_two_processes_that_want_the_same_download_it_once(served, cache):
    server = served(Model.of(GEMMA2_HF))
    command = [sys.executable, "-c", FETCH, ON_HUGGING_FACE, str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {Path(process.communicate(timeout=60)[0].strip()) for process in processes}
    assert paths == {cache / "downloads" / "hf" / "google--gemma-2-2b" / "main"}
    assert server.files_asked_for.count("config.json") == 1
