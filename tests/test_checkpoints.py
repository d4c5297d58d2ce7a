"""Checkpoints on a disk: whole or not there, whenever the process that writes them is killed.

The killed process is a real one. It counts the calls that change the disk, and kills itself before
the one that it is told.
"""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.worker.checkpoints import NUM_KEPT, is_full, newest_checkpoint, write_checkpoint
from service.worker.durable_files import RecordDamaged, make_folder, read_record, write_record

REPOSITORY = Path(__file__).parents[1]
# Writes checkpoints 1, 2, ... until the call comes that it dies before.
WRITER = """
import os, signal, sys
from pathlib import Path

folder, fatal = Path(sys.argv[1]), int(sys.argv[2])
calls = []

def counted(name):
    own = getattr(os, name)
    def call(*arguments, **named):
        calls.append(name)
        if len(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*arguments, **named)
    setattr(os, name, call)

for name in ("fsync", "replace", "unlink", "mkdir", "open"):
    counted(name)

from service.worker.checkpoints import write_checkpoint
for step in range(1, 5):
    write_checkpoint(folder, step, b"%d " % step * 1000)
    print(step, flush=True)
print(" ".join(calls))
"""


def content_of(step):
    return b"%d " % step * 1000


def killed_writer(folder, fatal):
    """The steps that a writer told, and its status."""
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(folder), str(fatal)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return [line for line in done.stdout.splitlines() if line], done.returncode


def test_after_a_kill_at_any_call_the_newest_is_what_was_told_or_the_one_being_written(tmp_path):
    *steps, calls = killed_writer(tmp_path / "whole", 0)[0]
    assert steps == ["1", "2", "3", "4"]
    # The folders; then of each file: opened, flushed, renamed, the folder opened and flushed.
    written = ["open", "fsync", "replace", "open", "fsync"]
    names = calls.split()
    assert [name for name in names if name != "mkdir"][2 : 2 + 10] == [*written, *written]
    num_calls = len(names)
    assert num_calls > 40
    for fatal in range(1, num_calls + 1):
        folder = tmp_path / str(fatal)
        told, status = killed_writer(folder, fatal)
        assert status == -signal.SIGKILL
        last = int(told[-1]) if told else 0
        found = newest_checkpoint(folder, 100)
        expected = {content_of(step) if step else None for step in (last, last + 1)}
        assert found in expected, f"killed before call {fatal}, {names[fatal - 1]}"
        # And it goes on from there.
        write_checkpoint(folder, 9, content_of(9))
        assert newest_checkpoint(folder, 100) == content_of(9)
        assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "manifest", "manifest gone"])
def test_one_that_is_damaged_is_passed_over_for_the_one_before(tmp_path, damage):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, content_of(step))
    path = tmp_path / "00000003.checkpoint"
    manifest = tmp_path / "00000003.checkpoint.json"
    match damage:
        case "cut":
            os.truncate(path, 100)
        case "changed":
            path.write_bytes(b"x" + path.read_bytes()[1:])
        case "gone":
            path.unlink()
        case "manifest":
            manifest.write_text("{")
        case "manifest gone":
            manifest.unlink()
    assert newest_checkpoint(tmp_path, 1000) == content_of(2)
    write_checkpoint(tmp_path, 3, b"again")
    assert newest_checkpoint(tmp_path, 1000) == b"again"


def test_the_last_two_are_kept_and_nothing_else(tmp_path):
    for step in (1, 2, 30, 400):
        write_checkpoint(tmp_path, step, content_of(step))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 * NUM_KEPT
    assert names[0] == "00000030.checkpoint"
    # Step 400 was damaged, say, and the job went on from 30.
    write_checkpoint(tmp_path, 31, content_of(31))
    assert newest_checkpoint(tmp_path, 1000) == content_of(31)


def test_the_newest_is_none_of_a_later_step_than_is_remembered(tmp_path):
    for step in (4, 9):
        write_checkpoint(tmp_path, step, content_of(step))
    newest = {last: newest_checkpoint(tmp_path, last) for last in (3, 4, 8, 9, 10)}
    assert newest == {3: None, 4: b"4 " * 1000, 8: b"4 " * 1000, 9: b"9 " * 1000, 10: b"9 " * 1000}


def test_a_folder_without_any_has_none(tmp_path):
    assert newest_checkpoint(tmp_path, 1000) is None
    assert newest_checkpoint(tmp_path / "none", 1000) is None
    (tmp_path / "00000001.checkpoint").write_bytes(b"never finished")
    assert newest_checkpoint(tmp_path, 1000) is None
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_finds_no_room_leaves_what_was_there(tmp_path):
    write_checkpoint(tmp_path, 1, b"small")
    program = f"""
import resource
from pathlib import Path
from service.worker.checkpoints import is_full, write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_checkpoint(Path({str(tmp_path)!r}), 2, bytes(5000))
except OSError as error:
    print(is_full(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
    assert newest_checkpoint(tmp_path, 1000) == b"small"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False), (errno.EIO, False)],
)
def test_only_a_full_disk_is_full(number, expected):
    assert is_full(OSError(number, "x")) == expected


def test_a_record_is_private_and_does_not_follow_a_link(tmp_path):
    folder = tmp_path / "a" / "b"
    make_folder(folder)
    path = write_record(folder, "adapter", b"content")
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    assert read_record(path) == b"content"
    (folder / "other.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        write_record(folder, "other", b"content")
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(RecordDamaged, match="cannot be read"):
        read_record(folder / "none")
