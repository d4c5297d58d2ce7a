"""Transfers that break off, are killed, arrive damaged or are wanted twice."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from model.errors import PresetDownloadFailed
from model.presets import hubs
from model.presets.resolve import open_reader
from tests.downloads.presets import (
    GEMMA2_HF,
    HANDLES,
    ON_HUGGING_FACE,
    ON_KAGGLE,
    assert_same_preset,
    below,
    golden_of,
    part_of,
)
from tests.fakes.loopback_hubs import Model

FETCH = (
    "import pathlib, sys; from model.presets import hubs;"
    "print(hubs.fetch(sys.argv[1], pathlib.Path(sys.argv[2])))"
)
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


def test_two_processes_that_want_the_same_download_it_once(served, cache):
    server = served(Model.of(GEMMA2_HF))
    command = [sys.executable, "-c", FETCH, ON_HUGGING_FACE, str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {Path(process.communicate(timeout=60)[0].strip()) for process in processes}
    assert paths == {cache / "downloads" / "hf" / "google--gemma-2-2b" / "main"}
    assert server.files_asked_for.count("config.json") == 1
